"""The C allocator of a CPU server: by default it hands large blocks back to the kernel, and a step allocates them anew."""

import ctypes
import sys

from vllm.logger import init_logger

logger = init_logger("vllm.mtp")

# malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep up to 256 MiB of freed memory for the next step instead of unmapping every block above 128 KiB.

    Each step allocates the same activations; their page faults were a third of an expanded step of a small model. Another
    allocator (tcmalloc, jemalloc) keeps memory of itself, and takes no notice of this.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return
    for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 256 << 20), (M_TOP_PAD, 64 << 20)):
        if not mallopt(option, value):
            logger.warning("malloc refused option %d; steps may spend time in page faults", option)
