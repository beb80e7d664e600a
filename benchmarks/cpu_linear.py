"""The demo model's linear layers on a CPU: our kernel, with the gated LoRA in passing, beside vLLM's and an update of its own.

    python -m benchmarks.cpu_linear --json cpu_linear.json

Milliseconds for all sixteen layers in a row, so that the weights (23 MB) come from where they lie between steps; medians, the two
in turns. On processors with AVX-512 or AVX2.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from vllm_mtp.kernels import cpu
from vllm_mtp.kernels.cpu.linear import PanelSlices, panels
from vllm_mtp.kernels.gated_lora import CpuLowRankSlices, LowRankSlices

from vllm_mtp.cpu_linear import PackedLinear
from vllm_mtp.machine import machine
from vllm_mtp.whole_files import write_figures

LAYERS = [(384, (384, 128, 128)), (384, (384,)), (384, (2176, 2176)), (2176, (384,))] * 4
"""Inputs, and outputs of each fused part."""
RANK = 32
STEPS = [(1, 1), (3, 3), (5, 3), (9, 3), (16, 16), (25, 5), (48, 32), (512, 512), (2048, 2048)]
"""Rows, and how many of them are real."""


def layers() -> list[tuple[Callable[..., object], Callable[..., object]]]:
    """Both forms of each layer, as functions of x and the number of real rows."""
    made = []
    for inputs, parts in LAYERS:
        outputs = sum(parts)
        weight = torch.randn(outputs, inputs).bfloat16()
        firsts = [sum(parts[:i]) for i in range(len(parts))]
        slices = LowRankSlices.pack(
            [(at, torch.randn(RANK, inputs), torch.randn(size, RANK)) for at, size in zip(firsts, parts, strict=True)], outputs
        )
        made.append(_forms(weight, slices))
    return made


def _forms(weight: torch.Tensor, slices: LowRankSlices) -> tuple[Callable[..., object], Callable[..., object]]:
    ops, outputs = torch.ops.vllm_mtp, weight.shape[0]
    in_panels, together, apart = panels(weight), PanelSlices.pack(slices), CpuLowRankSlices.pack(slices, torch.bfloat16)
    packed = PackedLinear(weight)

    def ours(x: torch.Tensor, num_real: torch.Tensor) -> object:
        if int(num_real) == x.shape[0]:
            return ops.linear_cpu(x, in_panels, None, outputs)
        return ops.gated_linear_cpu(x, in_panels, None, outputs, *together, num_real)

    def theirs(x: torch.Tensor, num_real: torch.Tensor) -> object:
        y = packed(x)
        if int(num_real) < x.shape[0]:
            ops.gated_lora_cpu_(y, x, *apart, num_real)
        return y

    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40, help="of each row, a tenth of it from 512 rows on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not cpu.has_linear():
        parser.error("this processor has neither AVX-512 nor AVX2")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    made, found = layers(), []
    print("| rows | real | ours, ms | vLLM's and an update, ms | ratio |\n|---|---|---|---|---|")
    for rows, real in STEPS:
        inputs, num_real = {size: torch.randn(rows, size).bfloat16() for size, _ in LAYERS}, torch.tensor([real])
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.repeats if rows < 512 else max(2, options.repeats // 10)):
            for form in (0, 1):
                start = time.perf_counter()
                for layer, (size, _) in zip(made, LAYERS, strict=True):
                    layer[form](inputs[size], num_real)
                times[form].append(1e3 * (time.perf_counter() - start))
        ours, theirs = map(statistics.median, times)
        found.append({"rows": rows, "real": real, "ours_ms": ours, "vllm_ms": theirs})
        print(f"| {rows} | {real} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.2f} |", flush=True)
    if options.json:
        facts = {"command": sys.argv, "machine": machine(), "threads": options.threads}
        write_figures(options.json, {**facts, "steps": found})


if __name__ == "__main__":
    main()
