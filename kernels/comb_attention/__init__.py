"""Comb attention: mask rows of all groups of a request against its paged KV, and against their own group's keys.

    out[i] = softmax(scale q[i] K^T) V over the cached tokens before L, then the rows of i's group up to i

with L the prefix length of i's group. The groups of a request are forks of one sequence that end at different tokens. They read its
cache together, once, and their own K/V never enter it. The tree mask follows from group numbers and prefix lengths.
"""

from typing import Any

import torch

from ..dispatch import runs_triton
from .inputs import MAX_HEAD_SIZE, CombInputs
from .layout import CombLayout
from .reference import comb_attention_reference

__all__ = ["MAX_HEAD_SIZE", "CombInputs", "CombLayout", "comb_attention_", "comb_attention_reference"]


def comb_attention_(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    layout: CombLayout,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    kept: int = 0,
) -> torch.Tensor:
    """Attention of mask rows, written into `out`.

    Runs the Triton kernel on GPUs and under Triton's interpreter, `comb_attention_reference` elsewhere. A torch operation: no graph
    break; capturable and free of host synchronization where it runs the kernel.

    Args:
        out: [M, H, D], last dimension contiguous; rows that belong to no request are not written.
        q: queries of the mask rows, [M, H, D], float32, float16 or bfloat16, H a multiple of H_kv, D up to 256.
        k: the mask rows' own keys, [M, H_kv, D], dtype of q.
        v: and values, [M, H_kv, D].
        key_cache: paged keys as [blocks, block, H_kv, D] with any strides but the last (both of vLLM's layouts are views of that),
            dtype of q, or 8 bit floats; uint8 is read as float8_e4m3fn.
        value_cache: paged values, likewise.
        block_table: blocks of each request, [R, W]; entries behind a request's longest prefix are not read.
        layout: the groups.
        scale: factor of the scores, usually D^-0.5.
        window: keys that a row sees, itself included (vLLM: sliding_window); 0 for all.
        softcap: cap of the scores, cap tanh(score / cap); 0 for none.
        sinks: a logit per head that takes part in the softmax and has no value, [H], or None.
        k_scale: factor of cached keys, one float32 on the device, or None for 1.
        v_scale: factor of cached values, likewise.
        kept: first cached tokens of a request that its rows see whatever the window; below 32. Large models lean on them (Xiao et
            al. 2023, *Efficient Streaming Language Models with Attention Sinks*).

    Returns:
        out.

    Raises:
        ValueError: if shapes or dtypes do not fit.

    Example:
        >>> layout = CombLayout.of(request=[0, 0], length=[2, 2], prefix_len=[5, 6], num_requests=1, device=torch.device("cpu"))
        >>> q, k, v = torch.randn(4, 2, 16), torch.randn(4, 1, 16), torch.randn(4, 1, 16)
        >>> cache = torch.randn(2, 8, 16, 1, 16)
        >>> table = torch.tensor([[3]])
        >>> comb_attention_(torch.empty_like(q), q, k, v, cache[0], cache[1], table, layout, scale=0.25).shape
        torch.Size([4, 2, 16])
    """
    key_cache, value_cache = _floats(key_cache), _floats(value_cache)
    CombInputs(
        q, k, v, key_cache, value_cache, block_table, layout, scale, window, softcap, sinks, k_scale, v_scale, kept
    ).check(out)  # fmt: skip
    options = (scale, window, softcap, sinks, k_scale, v_scale, kept)
    groups = (layout.prefix_len, layout.group_start, layout.group_of_row, layout.row_start, layout.max_rows)
    torch.ops.vllm_mtp.comb_attention_(out, q, k, v, key_cache, value_cache, block_table, *groups, *options)
    return out


def _floats(cache: torch.Tensor) -> torch.Tensor:
    """vLLM keeps fp8 caches as bytes."""
    return cache.view(torch.float8_e4m3fn) if cache.dtype == torch.uint8 else cache


def _comb_attention_(out: torch.Tensor, *given: Any) -> None:
    """The operation; `given` is in the order of its schema, which has the layout's fields in the layout's place."""
    fields: list[Any] = [*given[:6], CombLayout(*given[6:11]), *given[11:]]
    inputs = CombInputs(*fields)
    if runs_triton(out):
        from .triton import launch

        launch(out, inputs)
        return
    rows = int(inputs.layout.row_start[-1])
    out[:rows] = comb_attention_reference(inputs)[:rows]


def _comb_attention_fake_(*_: object) -> None:
    return None


_library = torch.library.Library("vllm_mtp", "FRAGMENT")
_library.define(
    "comb_attention_(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor key_cache, Tensor value_cache, Tensor block_table, "
    "Tensor prefix_len, Tensor group_start, Tensor group_of_row, Tensor row_start, int max_rows, float scale, int window, "
    "float softcap, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, int kept) -> ()"
)
_library.impl("comb_attention_", _comb_attention_, "CompositeExplicitAutograd")
_library._register_fake("comb_attention_", _comb_attention_fake_)
