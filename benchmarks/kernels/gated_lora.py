"""Gated LoRA at an 8 B model's layers: the plain product alone, with two torch products per slice, with vLLM's own kernels for
request adapters (punica, where vLLM is installed), fused, and added.
"""

from collections.abc import Callable
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


def punica(
    weight: torch.Tensor, lora: LowRankSlices, spans: list[list[int]], rows: int, n: int
) -> Callable[[torch.Tensor], object]:
    """Base product, then vLLM's shrink and expand (lora/ops/triton_ops) with one adapter for rows from n on and none before.

    Raises:
        ImportError: vLLM is not installed, or has found no Triton.
    """
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        raise ImportError("vLLM has found no Triton that it can use")
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    device = weight.device
    of_row = torch.where(torch.arange(rows, device=device) < n, -1, 0).int()
    meta = LoRAKernelMeta.make(1, rows, device)
    meta.prepare_tensors(of_row)
    given = meta.meta_args(rows, False)
    a = [each.contiguous()[None] for each in lora.a]
    b = [lora.b[first:end].contiguous()[None] for first, end in spans]
    low = torch.empty(len(a), rows, lora.a.shape[1], dtype=torch.float32, device=device)

    def product(x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, weight)
        lora_shrink(x, a, low.zero_(), *given, lora.scale)
        lora_expand(low, b, y, *given, offset_start=0, add_inputs=True)
        return y

    return product


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
        elif variant == "punica":
            calls.append(partial(punica(weight, lora, lora.spans.tolist(), rows, n), x))
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
            for variant in ("gemm", "torch", "punica", "fused", "add"):
                plain = variant == "gemm"
                yield Cell(
                    "gated_lora",
                    variant,
                    shape,
                    base_bytes + (0 if plain else lora_bytes),
                    base_flops + (0 if plain else lora_flops),
                    partial(make, layer, rows, n, rank, variant, device),
                )
