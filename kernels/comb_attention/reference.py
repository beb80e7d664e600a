"""Comb attention in plain torch, group by group: the oracle of the tests, and what runs where Triton does not."""

from itertools import pairwise

import torch

from .inputs import CombInputs


def paged(cache: torch.Tensor, blocks: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of a request, [length, heads, D], from a cache [blocks, block, heads, D]."""
    position = torch.arange(length, device=cache.device)
    return cache[blocks[position // cache.shape[1]].long(), position % cache.shape[1]]


def comb_attention_reference(inputs: CombInputs) -> torch.Tensor:
    """out [M, H, D] of `comb_attention_`. Rows of no group are zero. Reads the layout on the host."""
    q, k, v, layout, softcap, window = inputs.q, inputs.k, inputs.v, inputs.layout, inputs.softcap, inputs.window
    dtype, repeat = (q.dtype if q.dtype == torch.float64 else torch.float32), q.shape[1] // k.shape[1]
    out, row_start = torch.zeros_like(q), layout.row_start.tolist()
    request = 0
    for (first, end), length in zip(pairwise(layout.group_start.tolist()), layout.prefix_len.tolist(), strict=True):
        if first == end:
            continue
        while row_start[request + 1] <= first:
            request += 1
        keys = paged(inputs.key_cache, inputs.block_table[request], length).to(dtype) * (
            1 if inputs.k_scale is None else inputs.k_scale
        )
        values = paged(inputs.value_cache, inputs.block_table[request], length).to(dtype) * (
            1 if inputs.v_scale is None else inputs.v_scale
        )
        keys = torch.cat([keys, k[first:end].to(dtype)]).repeat_interleave(repeat, 1)
        values = torch.cat([values, v[first:end].to(dtype)]).repeat_interleave(repeat, 1)
        scores = inputs.scale * torch.einsum("mhd,nhd->hmn", q[first:end].to(dtype), keys)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        ahead = torch.arange(length, length + end - first, device=q.device)[:, None] - torch.arange(len(keys), device=q.device)
        seen = ahead >= 0
        if window:
            seen &= (ahead < window) | (torch.arange(len(keys), device=q.device) < min(inputs.kept, length))
        scores = scores.masked_fill(~seen, -torch.inf)
        if inputs.sinks is not None:  # a logit that takes part in the sum and has no value
            scores = torch.cat([scores, inputs.sinks.to(dtype)[:, None, None].expand(-1, end - first, 1)], 2)
        weights = scores.softmax(2)[:, :, : len(keys)]
        out[first:end] = torch.einsum("hmn,nhd->mhd", weights, values).to(q.dtype)
    return out
