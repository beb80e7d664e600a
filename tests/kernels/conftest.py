"""Where the kernel tests run: on a GPU, or under Triton's interpreter in a process that was started for it.

Triton decides when it is imported whether it interprets, and vLLM imports it, so one process cannot do both. Without a GPU
`test_interpreted.py` runs this folder once more in a process of its own, and the other files are left to that process.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import vllm_mtp

ROOT = Path(__file__).parents[2]
if find_spec("vllm_mtp.kernels") is None:  # a bare GPU machine: the package's setup.cfg mapping is not installed
    vllm_mtp.__path__.append(str(ROOT))

from vllm_mtp.kernels.dispatch import interpreting  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS_TRITON = DEVICE.type == "cuda" or interpreting()
collect_ignore = [] if RUNS_TRITON else ["test_gated_lora.py", "test_comb_attention.py"]
if not interpreting():
    collect_ignore += ["test_interleaved.py"]
if interpreting() or find_spec("triton") is None:
    collect_ignore += ["test_compiles.py", "test_benchmarks.py"]


def examples(count: int) -> int:
    """How many of `count` examples to draw: a quarter on a GPU, where most of them wait for a compiler; KERNEL_EXAMPLES is another
    factor."""
    return max(1, round(count * float(os.environ.get("KERNEL_EXAMPLES", "0.25" if DEVICE.type == "cuda" else "1"))))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialized tensor is full of NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
