"""Freed memory is kept for the next step, but not without bound."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")

PROGRAM = """
import torch
from vllm_mtp import cpu_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

memory = cpu_memory.FreedMemory()
memory.keep()
before, pins = resident(), []
blocks = []
for _ in range(600):  # a megabyte each; what stays between them finds no hole elsewhere
    blocks.append(torch.ones(1 << 18))
    pins.append(torch.ones(1 << 14))
del blocks
kept = resident() - before
early = memory.trim()
cpu_memory.TRIM_SECONDS = 0.0
print(kept, early, memory.trim(), resident() - before)
"""


def test_memory_between_blocks_in_use_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    kept, early, late, left = done.stdout.split()
    assert int(kept) > 500
    assert (early, late) == ("False", "True")
    assert int(left) < 150
