"""Gated LoRA at an 8 B model's layers: the plain product alone, with two torch products per slice, fused, and added."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from vllm_mtp.kernels.gated_lora import LowRankSlices, gated_lora

from .cells import Cell, Cells
from .timing import Call, copies


@dataclass(frozen=True)
class Layer:
    """A linear layer: name, inputs, and outputs of each fused part."""

    name: str
    inputs: int
    parts: tuple[int, ...]


LAYERS_8B = (
    Layer("qkv", 4096, (4096, 1024, 1024)),
    Layer("o", 4096, (4096,)),
    Layer("gate_up", 4096, (14336, 14336)),
    Layer("down", 14336, (4096,)),
)
SMOKE = (Layer("qkv", 48, (40, 16, 16)),)


def make_slices(layer: Layer, rank: int, device: torch.device) -> LowRankSlices:
    """Random A and B for every part."""
    slices, at = [], 0
    for size in layer.parts:
        a, b = torch.randn(rank, layer.inputs, device=device), torch.randn(size, rank, device=device)
        slices.append((at, (a / layer.inputs**0.5).bfloat16(), b.bfloat16()))
        at += size
    return LowRankSlices.pack(slices, at)


def two_products(x: torch.Tensor, weight: torch.Tensor, lora: LowRankSlices, spans: list[list[int]], n: int) -> torch.Tensor:
    """Base product, then two small products a slice, as a wrapper without kernels does it; n is known on the host."""
    y = F.linear(x, weight)
    for a, (first, end) in zip(lora.a, spans, strict=True):
        y[n:, first:end].addmm_(x[n:] @ a.T, lora.b[first:end].T)
    return y


def make(layer: Layer, rows: int, n: int, rank: int, variant: str, device: torch.device) -> list[Call]:
    """Calls over as many weights as L2 cannot hold."""
    out, num_real = sum(layer.parts), torch.tensor([n], device=device)
    calls: list[Call] = []
    for _ in range(copies(2 * out * layer.inputs)):
        x = torch.randn(rows, layer.inputs, device=device).bfloat16()
        weight = (torch.randn(out, layer.inputs, device=device) / layer.inputs**0.5).bfloat16()
        lora = make_slices(layer, rank, device)
        if variant == "gemm":
            calls.append(partial(F.linear, x, weight))
        elif variant == "torch":
            calls.append(partial(two_products, x, weight, lora, lora.spans.tolist(), n))
        else:
            calls.append(partial(gated_lora, x, weight, lora, num_real, None, variant))
    return calls


def cells(device: torch.device, smoke: bool) -> Cells:
    """Every layer at a batch of combs: k real rows and one more a request, then its mask rows."""
    for layer in SMOKE if smoke else LAYERS_8B:
        for k, batch in ((2, 1),) if smoke else ((2, 1), (4, 1), (8, 1), (4, 8), (8, 8), (4, 32)):
            rank, rows, n, out = 8 if smoke else 128, batch * (k + 1) ** 2, batch * (k + 1), sum(layer.parts)
            base_bytes = 2 * (out * layer.inputs + rows * (layer.inputs + out))
            lora_bytes = 2 * rank * (len(layer.parts) * layer.inputs + out)
            base_flops = 2 * rows * out * layer.inputs
            lora_flops = 2 * (rows - n) * rank * (len(layer.parts) * layer.inputs + out)
            shape = {"layer": layer.name, "k": k, "batch": batch, "rows": rows, "rank": rank}
            for variant in ("gemm", "torch", "fused", "add"):
                plain = variant == "gemm"
                yield Cell(
                    "gated_lora",
                    variant,
                    shape,
                    base_bytes + (0 if plain else lora_bytes),
                    base_flops + (0 if plain else lora_flops),
                    partial(make, layer, rows, n, rank, variant, device),
                )
