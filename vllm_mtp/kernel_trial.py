"""Tries the Triton kernels on the shapes of a served model before any request comes: what steps will run is compiled, and what it
gives is compared with the references. A kernel that fails on this GPU or with this Triton then serves nobody.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from vllm_mtp.kernels.comb_attention import CombInputs, CombLayout, comb_attention_, comb_attention_reference
from vllm_mtp.kernels.gated_lora import FUSED_MAX_ROWS, LowRankSlices, gated_lora, gated_lora_
from vllm_mtp.mask_attention import view

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest error beside the largest value that is expected."""
ROWS = (9, 25, 49, FUSED_MAX_ROWS, FUSED_MAX_ROWS + 1)
"""Rows of a step, at least one for each row of the kernel's table of block sizes (kernels/gated_lora/triton.py)."""
BLOCKS = 8
"""Of the cache that attention is tried on."""


class Disagreement(RuntimeError):
    """A kernel does not give what its reference gives."""


@dataclass(frozen=True)
class Product:
    """A linear layer: its outputs and inputs on this rank, and its weight [out, in] where the kernel reads that."""

    out: int
    inputs: int
    weight: torch.Tensor | None


def try_linears(products: Iterable[Product], rank: int, max_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    """Tries `gated_lora`, and `gated_lora_` beside it. Of layers of one shape the first is taken.

    Args:
        products: the layers.
        rank: of the LoRA.
        max_rows: most rows of a step.
        dtype, device: of the layers.

    Raises:
        Disagreement: a kernel gives something else.
        Exception: whatever Triton raises where it cannot compile or launch.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    first = {(each.out, each.inputs, each.weight is None): each for each in reversed(list(products))}
    for product in first.values():
        out, inputs, weight = product.out, product.inputs, product.weight
        lora = LowRankSlices.pack([(0, (normal(rank, inputs) / inputs**0.5).to(dtype), normal(out, rank).to(dtype))], out)
        for rows in sorted({min(rows, max_rows) for rows in ROWS}):
            x, num_real, n = normal(rows, inputs).to(dtype), torch.tensor([rows // 3], device=device), rows // 3
            name = f"gated_lora of {rows} rows, {inputs} to {out} features"
            y = normal(rows, out).to(dtype) if weight is None else F.linear(x, weight)
            expected = y.float() if weight is None else _exactly(x, weight)
            expected[n:] += F.linear(F.linear(x[n:].float(), lora.a[0].float()), lora.b.float())
            if weight is not None:
                _compare(name, gated_lora(x, weight, lora, num_real), expected)
            _compare(f"{name}, added", gated_lora_(y, x, lora, num_real), expected)


def _exactly(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T in float32, part by part: there may be no room for all of W in float32."""
    return torch.cat([F.linear(x.float(), part.float()) for part in weight.detach().split(4096)], 1)


@dataclass(frozen=True, order=True)
class Heads:
    """What the kernel is compiled for, of one of vLLM's attention layers."""

    heads: int
    kv_heads: int
    size: int
    window: int
    kept: int
    softcap: float
    sinks: bool
    fp8: bool

    @classmethod
    def of(cls, layer: Any, mask_window: int | None) -> "Heads":
        """Those of a layer, under a window of mask rows."""
        impl = layer.impl
        return cls(
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_size,
            *view(layer.sliding_window or 0, mask_window),
            float(impl.logits_soft_cap or 0),
            getattr(impl, "sinks", None) is not None,
            layer.kv_cache_dtype.startswith("fp8"),
        )


def try_attention(
    kinds: Iterable[Heads], longest_group: int, max_model_len: int, block: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Tries `comb_attention_`, with requests of one group and of a whole comb.

    Args:
        kinds: of the layers.
        longest_group: most mask rows of a group.
        max_model_len, block: tokens of a request, and of a block of the cache.
        dtype, device: of the queries.

    Raises:
        Disagreement, Exception: as `try_linears`.
    """
    for kind in sorted(set(kinds)):
        for inputs in _combs(kind, longest_group, max_model_len, block, dtype, device):
            exact = replace(inputs, **{name: getattr(inputs, name).float() for name in ("q", "k", "v")})
            name = f"comb_attention of {inputs.layout.max_rows} rows a request, {kind}"
            _compare(name, comb_attention_(torch.empty_like(inputs.q), *inputs.arguments()), comb_attention_reference(exact))


def _combs(
    kind: Heads, longest_group: int, max_model_len: int, block: int, dtype: torch.dtype, device: torch.device
) -> Iterator[CombInputs]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    cache = normal(BLOCKS, block, kind.kv_heads, 2 * kind.size).to(torch.float8_e4m3fn if kind.fp8 else dtype)
    keys, values = cache.split(kind.size, -1)
    scale = torch.ones(1, device=device) if kind.fp8 else None
    # As wide as the server's, for the work is split by it; requests end in the blocks that there are.
    width = -(-max_model_len // block)
    table = (torch.arange(width, device=device, dtype=torch.int32) % BLOCKS).expand(2, width).contiguous()
    most = min(BLOCKS * block, max_model_len) - 2 * longest_group
    for groups, length in ((1, 1), (1, longest_group), (longest_group + 1, longest_group)):
        request, prefix = [0] * groups + [1] * groups, [most + j for j in range(groups)] + list(range(groups))
        layout = CombLayout.of(request, [length] * 2 * groups, prefix, 2, device)
        rows = 2 * groups * length
        q, k, v = normal(rows, kind.heads + 2 * kind.kv_heads, kind.size).to(dtype).split([kind.heads, *[kind.kv_heads] * 2], 1)
        sinks = normal(kind.heads).to(dtype) if kind.sinks else None
        given = q, k, v, keys, values, table, layout, kind.size**-0.5, kind.window, kind.softcap, sinks, scale, scale, kind.kept
        yield CombInputs(*given)


def _compare(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    error = ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    if not error <= TOLERANCE[found.dtype]:  # NaN is not
        raise Disagreement(f"{name} is off by {error:.2g} of its largest value")
