"""Requests with mask rows behind them, in dense form and as a paged cache whose unused slots are NaN."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from vllm_mtp.kernels.comb_attention import CombInputs, CombLayout, comb_attention_reference

from .conftest import DEVICE


@dataclass
class Case:
    """One attention call.

    Attributes:
        q, k, v: the mask rows, and rows behind the last request's.
        tokens: cached keys and values of each request, [length, H_kv, D] twice, as the cache holds them.
        key_cache, value_cache, block_table, layout, options: the call's further arguments.
        groups: (request, length, prefix length) of each group.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tokens: list[tuple[torch.Tensor, torch.Tensor]]
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    layout: CombLayout
    options: dict[str, Any]
    groups: list[tuple[int, int, int]]

    @property
    def num_rows(self) -> int:
        """Rows that belong to a request."""
        return sum(length for _, length, _ in self.groups)

    def given(self) -> tuple[Any, ...]:
        """The positional arguments behind `out`."""
        return self.q, self.k, self.v, self.key_cache, self.value_cache, self.block_table, self.layout

    def reference(self) -> torch.Tensor:
        """The reference in float64."""
        case = replace(self, q=self.q.double(), k=self.k.double(), v=self.v.double())
        return comb_attention_reference(CombInputs(*case.given(), **self.options))


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)) -> Case:
    """Ragged groups, padding groups, requests without any, empty prefixes, contexts over many blocks, every cache layout."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    kv_heads, repeat = draw(st.sampled_from([(1, 1), (1, 5), (2, 1), (2, 3), (3, 4)]))
    head_size, block = draw(st.sampled_from([16, 40, 64, 96])), draw(st.sampled_from([16, 32, 48, 128]))
    fp8 = draw(st.booleans()) and draw(st.booleans())

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    groups: list[tuple[int, int, int]] = []
    lengths = []
    for request in range(draw(st.integers(1, 3))):
        length = draw(st.one_of(st.sampled_from([0, 1, block - 1, block, block + 1]), st.integers(0, 300)))
        lengths.append(length)
        ahead = draw(st.integers(0, min(4, length)))
        groups += [(request, draw(st.integers(0, 5)), length - ahead + j) for j in range(draw(st.integers(0, ahead + 1)))]
    layout = CombLayout.of(*(list(column) for column in zip(*groups, strict=True)), len(lengths), DEVICE) if groups else None
    if layout is None:
        groups = [(0, 1, lengths[0])]
        layout = CombLayout.of([0], [1], lengths[:1], len(lengths), DEVICE)

    cache_dtype = torch.float8_e4m3fn if fp8 else dtype
    tokens = [(normal(n, kv_heads, head_size).to(cache_dtype), normal(n, kv_heads, head_size).to(cache_dtype)) for n in lengths]
    width = max(1, -(-max(lengths) // block)) + draw(st.integers(0, 2))
    num_blocks = len(lengths) * width + 1
    order = torch.randperm(num_blocks, generator=generator)[: len(lengths) * width].view(len(lengths), width)

    def empty(arrangement: str, *halves: int) -> torch.Tensor:
        heads_first = arrangement == "heads first"
        shape = (num_blocks, kv_heads, block, head_size) if heads_first else (num_blocks, block, kv_heads, head_size)
        # A float8 NaN is made as a byte: not every torch fills float8 tensors.
        full = torch.full((*halves, *shape), 0x7F, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
        full = full if fp8 else full.to(dtype)
        return full.transpose(-3, -2) if heads_first else full

    arrangement = draw(st.sampled_from(["halves", "pairs", "heads first", "apart"]))
    if arrangement == "apart":
        cache = [empty("halves"), empty("heads first")]
    elif arrangement == "pairs":
        cache = list(empty("halves", 2).reshape(num_blocks, 2, block, kv_heads, head_size).unbind(1))
    else:
        cache = list(empty(arrangement, 2))
    for request, pair in enumerate(tokens):
        for half, values in enumerate(pair):
            for first in range(0, len(values), block):
                part = values[first : first + block]
                cache[half][int(order[request, first // block]), : len(part)] = part

    rows, padding = sum(length for _, length, _ in groups), draw(st.sampled_from([0, 3]))
    fused = normal(rows + padding, (repeat + 2) * kv_heads, head_size).to(dtype)
    q, k, v = fused.split([repeat * kv_heads, kv_heads, kv_heads], 1)
    options: dict[str, Any] = {"scale": head_size**-0.5, "window": draw(st.sampled_from([0, 0, 1, 7, 64]))}
    options["kept"] = draw(st.sampled_from([0, 0, 1, 4]))
    options["softcap"] = draw(st.sampled_from([0.0, 0.0, 2.0]))
    if draw(st.booleans()):
        options["sinks"] = normal(repeat * kv_heads).to(dtype) * 3
    if fp8:
        options["k_scale"] = torch.tensor(0.7, device=DEVICE)
        options["v_scale"] = torch.tensor([1.9], device=DEVICE)
    keys, values = (half.view(torch.uint8) for half in cache) if fp8 and draw(st.booleans()) else (cache[0], cache[1])
    table = order.to(DEVICE, draw(st.sampled_from([torch.int32, torch.int64])))
    return Case(q, k, v, tokens, keys, values, table, layout, options, groups)
