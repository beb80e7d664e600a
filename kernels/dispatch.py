"""Which implementation an operation runs: Triton where Triton can run, the reference elsewhere."""

import os
from functools import cache
from importlib.util import find_spec

import torch


def interpreting() -> bool:
    """Whether kernels run under Triton's interpreter, on any device; Triton reads the variable when it is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def runs_triton(x: torch.Tensor) -> bool:
    """Whether `x`'s operation runs the Triton kernel: on a GPU, or under Triton's interpreter."""
    return (x.is_cuda or interpreting()) and _has_triton()


@cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU. Under the interpreter 4, so that small shapes meet split reductions too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


_counters: dict[torch.device, torch.Tensor] = {}
MAX_COUNTERS = 1 << 16


def counters(device: torch.device) -> torch.Tensor:
    """Zeros that kernels count arrivals in, [MAX_COUNTERS] int32; a kernel leaves them zero.

    One buffer a device, so launches that use it may not overlap on two streams.

    Raises:
        RuntimeError: if the first call happens while a CUDA graph is captured: zeroing would be recorded, not done.
    """
    if device not in _counters:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("run the operation once before capturing it in a CUDA graph: its counters do not exist yet")
        _counters[device] = torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)
    return _counters[device]
