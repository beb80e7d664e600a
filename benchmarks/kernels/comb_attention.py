"""Comb attention at an 8 B model's heads: the kernel, plain decode rows, forked sequences and FlexAttention with the same mask.

`decode` is the kernel on one group of k + 1 rows, what verification alone reads. `forks` is torch's attention on 1 + k dense copies
of each sequence: it reads the prefix 1 + k times. `flex` has one dense sequence a request and the comb's mask. `window` is the
kernel where mask rows see the last 4096 tokens and the first four (`mask_window`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from vllm_mtp.kernels.comb_attention import CombLayout, comb_attention_

from .cells import Cell, Cells
from .timing import Call, copies


@dataclass(frozen=True)
class Heads:
    """Attention of one layer."""

    heads: int
    kv_heads: int
    head_size: int
    block: int


WINDOW, KEPT = 4096, 4
HEADS_8B, SMOKE = Heads(32, 8, 128, 16), Heads(4, 2, 16, 16)


def paged_call(
    h: Heads, lengths: list[int], batch: int, context: int, device: torch.device, window: int = 0
) -> partial[torch.Tensor]:
    """The kernel on requests of `context` tokens with groups of these lengths, one token further each, in a shuffled cache."""
    per_request = -(-context // h.block)
    cache = torch.randn(2, batch * per_request, h.block, h.kv_heads, h.head_size, device=device).bfloat16()
    table = torch.randperm(batch * per_request, device=device).view(batch, per_request).int()
    groups = [(request, length, context - len(lengths) + 1 + j) for request in range(batch) for j, length in enumerate(lengths)]
    request, length, prefix = (list(column) for column in zip(*groups, strict=True))
    layout = CombLayout.of(request, length, prefix, batch, device)
    rows = batch * sum(lengths)
    q = torch.randn(rows, h.heads, h.head_size, device=device).bfloat16()
    k, v = (torch.randn(rows, h.kv_heads, h.head_size, device=device).bfloat16() for _ in range(2))
    given = q, k, v, cache[0], cache[1], table, layout, h.head_size**-0.5, window
    return partial(comb_attention_, torch.empty_like(q), *given, kept=KEPT if window else 0)


def forks_call(h: Heads, k: int, batch: int, context: int, device: torch.device) -> Call:
    """torch's causal attention of k rows on each of batch (k + 1) dense sequences."""
    from torch.nn.attention.bias import causal_lower_right

    q = torch.randn(batch * (k + 1), h.heads, k, h.head_size, device=device).bfloat16()
    shape = (batch * (k + 1), h.kv_heads, context + k, h.head_size)
    keys, values = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    mask: Any = causal_lower_right(k, context + k)
    return partial(F.scaled_dot_product_attention, q, keys, values, mask, enable_gqa=True)


def flex_call(h: Heads, k: int, batch: int, context: int, device: torch.device) -> Call:
    """FlexAttention, compiled, on [prefix, mask rows] of each request."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows = k * (k + 1)

    def seen(b: torch.Tensor, head: torch.Tensor, i: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        group, own = i // k, n - context
        prefix = n < context - k + group
        return prefix | ((own >= 0) & (own // k == group) & (own <= i))

    mask = create_block_mask(seen, None, None, rows, context + rows, device=str(device))
    q = torch.randn(batch, h.heads, rows, h.head_size, device=device).bfloat16()
    shape = (batch, h.kv_heads, context + rows, h.head_size)
    keys, values = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    attend: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return partial(attend, q, keys, values, block_mask=mask, enable_gqa=True)


def make(h: Heads, k: int, batch: int, context: int, variant: str, device: torch.device) -> list[Call]:
    """Calls over as many caches as L2 cannot hold."""

    def one() -> Call:
        if variant == "forks":
            return forks_call(h, k, batch, context, device)
        if variant == "flex":
            return flex_call(h, k, batch, context, device)
        lengths = [k + 1] if variant == "decode" else [k] * (k + 1)
        return paged_call(h, lengths, batch, context, device, WINDOW if variant == "window" else 0)

    if variant == "flex":
        torch._dynamo.reset()  # shapes of earlier cells count towards its limit of recompilations
    reads = 4 * batch * context * h.kv_heads * h.head_size * ((k + 1) if variant == "forks" else 1)
    return [one() for _ in range(copies(reads))]


def cells(device: torch.device, smoke: bool) -> Cells:
    """Combs of k = 4 and 8 over contexts and batches whose KV fits."""
    h = SMOKE if smoke else HEADS_8B
    for k in (2,) if smoke else (4, 8):
        for context in (40,) if smoke else (1024, 8192, 32768):
            for batch in (2,) if smoke else (1, 8, 32):
                for variant in ("comb", "decode") if smoke else ("comb", "decode", "window", "forks", "flex"):
                    if variant == "window" and context <= WINDOW:
                        continue
                    read = WINDOW if variant == "window" else context
                    rows = k + 1 if variant == "decode" else k * (k + 1)
                    cached = 4 * batch * read * h.kv_heads * h.head_size
                    own = 4 * batch * rows * (h.heads + h.kv_heads) * h.head_size
                    flops = 4 * batch * rows * read * h.heads * h.head_size
                    yield Cell(
                        "comb_attention",
                        variant,
                        {"k": k, "context": context, "batch": batch, "rows": batch * rows},
                        cached + own,
                        flops,
                        partial(make, h, k, batch, context, variant, device),
                    )
