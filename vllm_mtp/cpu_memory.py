"""The C allocator on a CPU: by default it hands large blocks back to the kernel, and a step allocates them anew."""

import ctypes
import logging
import sys
import time

logger = logging.getLogger("vllm.mtp")

# malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEPT, TOP_PAD = 256 << 20, 64 << 20
TRIM_SECONDS = 60.0


class _MallInfo(ctypes.Structure):
    """malloc.h, struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    )


class FreedMemory:
    """Makes glibc's malloc keep up to 256 MiB of freed memory for the next step instead of unmapping every block above 128 KiB.

    Each step allocates the same activations; their page faults were a third of an expanded step of a small model. Another
    allocator (tcmalloc, jemalloc) keeps memory of itself, and takes no notice of this.

    malloc's own limit holds for the end of its heap only. Between blocks in use, freed ones of all sizes that prompts have come to
    lie, 0.9 GB after an hour of mixed traffic on a model of 12 M parameters; `trim` returns those.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
        self.mallopt, self.mallinfo, self.malloc_trim = (
            getattr(libc, name, None) for name in ("mallopt", "mallinfo2", "malloc_trim")
        )  # glibc has them, mallinfo2 from 2.33 on
        if self.mallinfo is not None:
            self.mallinfo.restype = _MallInfo
        if self.malloc_trim is not None:
            self.malloc_trim.argtypes = [ctypes.c_size_t]
        self.looked = time.monotonic()

    def keep(self, most: int = KEPT) -> None:
        """From now on freed memory is kept, at the heap's end up to `most` bytes."""
        if self.mallopt is None:
            return
        for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, most), (M_TOP_PAD, TOP_PAD)):
            if not self.mallopt(option, value):
                logger.warning("malloc refused option %d; steps may spend time in page faults", option)

    def trim(self) -> bool:
        """Returns freed memory to the kernel where more of it is kept than should be; looks once a minute. Whether it did."""
        now = time.monotonic()
        if now - self.looked < TRIM_SECONDS or self.mallinfo is None or self.malloc_trim is None:
            return False
        self.looked = now
        if self.mallinfo().fordblks <= KEPT:
            return False
        self.malloc_trim(TOP_PAD)
        return True
