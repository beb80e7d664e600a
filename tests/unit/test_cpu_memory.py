"""Freed memory is kept for the next step, but not without bound."""

import ctypes
import sys
from pathlib import Path

import pytest

from vllm_mtp import cpu_memory

MALLOC = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
pytestmark = pytest.mark.skipif(MALLOC is None, reason="needs glibc's malloc")


def resident() -> int:
    """Memory of this process [MiB]."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20


def test_memory_between_blocks_in_use_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert resident() - before > 500
    assert not memory.trim()  # not yet
    monkeypatch.setattr(cpu_memory, "TRIM_SECONDS", 0.0)
    assert memory.trim()
    assert resident() - before < 150
    for pin in pins:
        libc.free(pin)
