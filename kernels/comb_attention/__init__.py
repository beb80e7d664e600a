"""Comb attention: mask rows of all groups of a request against its paged KV, and against their own group's keys.

    out[i] = softmax(scale q[i] K^T) V over the cached tokens before L, then the rows of i's group up to i

with L the prefix length of i's group. The groups of a request are forks of one sequence that end at different tokens. They read its
cache together, once, and their own K/V never enter it. The tree mask follows from group numbers and prefix lengths.
"""

import torch

from ..dispatch import runs_triton
from .layout import CombLayout
from .reference import comb_attention_reference

__all__ = ["CombLayout", "comb_attention_", "comb_attention_reference"]


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
    _check(out, q, k, v, key_cache, value_cache, block_table, layout, sinks)
    torch.ops.vllm_mtp.comb_attention_(
        out, q, k, v, key_cache, value_cache, block_table,
        layout.prefix_len, layout.group_start, layout.group_of_row, layout.row_start, layout.max_rows,
        scale, window, softcap, sinks, k_scale, v_scale,
    )  # fmt: skip
    return out


def _floats(cache: torch.Tensor) -> torch.Tensor:
    """vLLM keeps fp8 caches as bytes."""
    return cache.view(torch.float8_e4m3fn) if cache.dtype == torch.uint8 else cache


def _check(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    layout: CombLayout,
    sinks: torch.Tensor | None,
) -> None:
    kv_heads, head_size = k.shape[1], q.shape[2]
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or {k.dtype, v.dtype, out.dtype} != {q.dtype}:
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype} and out {out.dtype} must be one float type")
    if q.shape[1] % kv_heads or k.shape != v.shape or k.shape != (q.shape[0], kv_heads, head_size) or out.shape != q.shape:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and out {tuple(out.shape)} do not fit")
    if head_size > 256:
        raise ValueError(f"head size {head_size} is above 256; such layers must run as forked sequences")
    for cache in (key_cache, value_cache):
        if cache.dim() != 4 or cache.shape[2:] != (kv_heads, head_size) or cache.stride(3) != 1:
            raise ValueError(f"cache {tuple(cache.shape)} is not [blocks, block, {kv_heads}, {head_size}] with contiguous heads")
        if cache.dtype != q.dtype and cache.element_size() != 1:
            raise ValueError(f"a cache of {cache.dtype} does not serve queries of {q.dtype}")
    if layout.row_start.shape[0] != block_table.shape[0] + 1:
        raise ValueError(f"{layout.row_start.shape[0] - 1} requests in the layout, {block_table.shape[0]} in the block table")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks {tuple(sinks.shape)} must be [{q.shape[1]}]")


def _comb_attention_(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    prefix_len: torch.Tensor,
    group_start: torch.Tensor,
    group_of_row: torch.Tensor,
    row_start: torch.Tensor,
    max_rows: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    layout = CombLayout(prefix_len, group_start, group_of_row, row_start, max_rows)
    given = (q, k, v, key_cache, value_cache, block_table, layout, scale, window, softcap, sinks, k_scale, v_scale)
    if runs_triton(q):
        from .triton import launch

        launch(out, *given)
        return
    rows = int(row_start[-1])
    out[:rows] = comb_attention_reference(*given)[:rows]


def _comb_attention_fake_(*_: object) -> None:
    return None


_library = torch.library.Library("vllm_mtp", "FRAGMENT")
_library.define(
    "comb_attention_(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor key_cache, Tensor value_cache, Tensor block_table, "
    "Tensor prefix_len, Tensor group_start, Tensor group_of_row, Tensor row_start, int max_rows, float scale, int window, "
    "float softcap, Tensor? sinks, Tensor? k_scale, Tensor? v_scale) -> ()"
)
_library.impl("comb_attention_", _comb_attention_, "CompositeExplicitAutograd")
_library._register_fake("comb_attention_", _comb_attention_fake_)
