"""Freed memory is kept for the next step, but not without bound."""

import ctypes
import subprocess
import sys

import pytest

MALLOC = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
pytestmark = pytest.mark.skipif(MALLOC is None, reason="needs glibc's malloc")

HOLES = """
import ctypes
from pathlib import Path

from vllm_mtp import cpu_memory


def resident():  # memory of this process [MiB]
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20


libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
memory = cpu_memory.FreedMemory()
memory.keep()
before, blocks, pins = resident(), [], []
for _ in range(600):  # a megabyte each; what stays between them finds no hole elsewhere
    blocks.append(libc.malloc(1 << 20))
    ctypes.memset(blocks[-1], 1, 1 << 20)
    pins.append(libc.malloc(1 << 16))
for block in blocks:
    libc.free(block)
print(resident() - before, memory.trim())  # not yet
cpu_memory.TRIM_SECONDS = 0.0
print(memory.trim(), resident() - before)
"""


def test_memory_between_blocks_in_use_is_given_back() -> None:
    # In a process of its own: what other tests have freed would serve these blocks too.
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    kept, early, trimmed, left = done.stdout.split()
    assert (early, trimmed) == ("False", "True")
    assert int(kept) > 500
    assert int(left) < 150
