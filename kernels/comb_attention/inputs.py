"""What comb attention reads, checked in one place and handed on as one thing."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from .layout import CombLayout

MAX_HEAD_SIZE = 256
MOST_KEPT = 32  # tokens, the fewest of a tile of keys


@dataclass(frozen=True)
class CombInputs:
    """The arguments of `comb_attention_` behind `out`, which describes them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    layout: CombLayout
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    kept: int = 0

    def arguments(self) -> tuple[Any, ...]:
        """The same in the order of `comb_attention_`."""
        return tuple(getattr(self, each.name) for each in fields(self))

    def check(self, out: torch.Tensor) -> None:
        """Raises ValueError if shapes or dtypes do not fit each other and `out`."""
        q, k, v, sinks = self.q, self.k, self.v, self.sinks
        kv_heads, head_size = k.shape[1], q.shape[2]
        if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or {k.dtype, v.dtype, out.dtype} != {q.dtype}:
            raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype} and out {out.dtype} must be one float type")
        if q.shape[1] % kv_heads or k.shape != v.shape or k.shape != (q.shape[0], kv_heads, head_size) or out.shape != q.shape:
            raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and out {tuple(out.shape)} do not fit")
        if head_size > MAX_HEAD_SIZE:
            raise ValueError(f"head size {head_size} is above {MAX_HEAD_SIZE}; such layers must run as forked sequences")
        for cache in (self.key_cache, self.value_cache):
            if cache.dim() != 4 or cache.shape[2:] != (kv_heads, head_size) or cache.stride(3) != 1:
                raise ValueError(
                    f"cache {tuple(cache.shape)} is not [blocks, block, {kv_heads}, {head_size}] with contiguous heads"
                )
            if cache.dtype != q.dtype and cache.element_size() != 1:
                raise ValueError(f"a cache of {cache.dtype} does not serve queries of {q.dtype}")
        requests = self.layout.row_start.shape[0] - 1
        if requests != self.block_table.shape[0]:
            raise ValueError(f"{requests} requests in the layout, {self.block_table.shape[0]} in the block table")
        if not 0 <= self.kept < MOST_KEPT:
            raise ValueError(f"{self.kept} tokens cannot be kept in view: 0 to {MOST_KEPT - 1} can")
        if sinks is not None and sinks.shape != (q.shape[1],):
            raise ValueError(f"sinks {tuple(sinks.shape)} must be [{q.shape[1]}]")
