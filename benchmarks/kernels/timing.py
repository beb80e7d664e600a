"""How a call is timed, and the two rates that floors are made of."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

L2_BYTES = 50e6
Call = Callable[[], object]


def copies(num_bytes: float) -> int:
    """Input sets that a call of `num_bytes` rotates through so that none is found in L2."""
    return max(2, min(64, round(4 * L2_BYTES / num_bytes))) if torch.cuda.is_available() else 1


def time_us(calls: Sequence[Call], repeats: int = 30) -> dict[str, float]:
    """Microseconds of one call: median, least and most over replays of one CUDA graph that makes all `calls` in turn.

    Without a GPU (`--smoke`) each call is made once, and the time means nothing.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for call in calls:
            call()
        took = 1e6 * (time.perf_counter() - start) / len(calls)
        return {"median_us": took, "min_us": took, "max_us": took}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls, *calls]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [1e3 * a.elapsed_time(b) / len(calls) for a, b in pairwise(marks)]
    return {"median_us": statistics.median(times), "min_us": min(times), "max_us": max(times)}


def measured_rates(device: torch.device, smoke: bool) -> dict[str, float]:
    """Copy bandwidth (bytes read and written) in B/s, and the rate of a large bf16 product in FLOP/s."""
    size, n = (1 << 12, 32) if smoke else (1 << 32, 8192)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    copy = time_us([lambda: target.copy_(source)])["median_us"]
    product = time_us([lambda: a @ b])["median_us"]
    return {"copy_bytes_per_s": 2e6 * size / copy, "matmul_flop_per_s": 2e6 * n**3 / product}


def facts(device: torch.device) -> dict[str, Any]:
    """What a time depends on: device and versions."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, Triton's interpreter"
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__}
