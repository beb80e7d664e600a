"""Comb attention over a paged cache: flash decoding in which all groups of a request are one block of queries."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..dispatch import num_sms
from ..dot import dot
from .inputs import CombInputs

LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Config:
    """BQ queries (rows times heads of one KV head) and BN keys a tile; splits cut the context between programs."""

    bq: int
    bn: int
    warps: int
    stages: int
    splits: int


# Reasoned, not tuned: no GPU has run this table yet. For an H200 (132 SMs, 4.8 TB/s, 989 dense bf16 TFLOP/s).
#
# 8 B shapes (32 heads, 8 KV heads of 128), one request, 32 k tokens: KV is 134 MB, 28 us from HBM. Every mask row costs
# 4 x 32 x 128 x 32 k = 0.54 GFLOP: 20 rows (k = 4) 11 us at the peak rate, 72 rows (k = 8) 39 us. So a comb of k = 4 is bound by
# bytes and one of k = 8 by arithmetic, whatever the kernel; the intensity passes 206 FLOP per byte at about 52 rows.
# * BQ holds all queries of a KV head where they fit (k = 4: 20 x 4 = 80 of 128), so a KV tile is read once. Beyond, tiles of
#   queries are neighbours in the grid and read the same KV tile at about the same time: once from HBM, again from L2.
# * 128 x 128 float32 accumulators fill eight warps; larger heads and float32 take half the queries and half the keys.
# * Two or three stages of 32 kB (K and V, 64 keys) keep the 23 kB an SM in flight that fill HBM. 128 keys a tile spill registers.
# * Splits put a program on every SM. Each writes rows x heads x D float32 (k = 4: 0.3 MB), 16 of them 4 % of 32 k tokens' KV.
MIN_TILES = 4  # KV tiles a split must have left to be worth its partial result


def choose_config(
    max_rows: int, heads: int, kv_heads: int, head_size: int, requests: int, context: int, sms: int, itemsize: int
) -> Config:
    """The launch for requests of up to `max_rows` mask rows and `context` tokens (an upper bound) on a GPU of `sms` SMs."""
    queries = max_rows * (heads // kv_heads)
    bq = min(64 if head_size > 128 or itemsize == 4 else 128, max(16, triton.next_power_of_2(queries)))
    bn = 32 if itemsize == 4 or head_size > 128 else 64
    programs = triton.cdiv(queries, bq) * kv_heads * requests
    wanted = (sms if bq == 128 else 2 * sms) // programs
    warps, stages = 8 if bq == 128 or head_size > 128 else 4, 2 if itemsize == 4 else 3
    return Config(bq, bn, warps, stages, max(1, min(wanted, context // (bn * MIN_TILES), 64)))


@triton.jit
def _attend(acc, top, total, scores, v, PRECISION: tl.constexpr):
    """One step of the running softmax, in base 2: accumulator, largest score and sum of weights after more keys."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(top - shift)
    acc = dot(weights.to(v.dtype), v, acc * decay[:, None], PRECISION)
    return acc, new_top, total * decay + tl.sum(weights, 1)


@triton.jit
def _score(q, k, factor, softcap, CAPPED: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """log2(e) cap tanh(factor q k^T / cap), or without the cap."""
    scores = dot(q, tl.trans(k), tl.zeros([BQ, BN], tl.float32), PRECISION) * factor
    if CAPPED:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    return scores * LOG2_E


@triton.jit
def _cached_keys(
    acc, top, total, q, factor, softcap, prefix, position, tile_0, tile_1, max_prefix, window, kept,
    key_ptr, value_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt, d, inside_d,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends the paged keys of tiles tile_0 .. tile_1 - 1; MASKED where a tile may reach behind a row's prefix or window."""
    for tile in range(tile_0, tile_1):
        at = tile * BN + tl.arange(0, BN)
        written = at < max_prefix if MASKED else at >= 0
        block = tl.load(table_ptr + at // BLOCK, mask=written, other=0).to(tl.int64)
        inside = written[:, None] & inside_d[None, :]
        k = tl.load(key_ptr + (block * stride_kb + (at % BLOCK) * stride_kt)[:, None] + d[None, :], mask=inside, other=0.0)
        scores = _score(q, k.to(q.dtype), factor, softcap, CAPPED, BQ, BN, PRECISION)
        if MASKED:
            seen = at[None, :] < prefix[:, None]
            if WINDOW:
                seen = seen & ((position[:, None] - at[None, :] < window) | (at < kept)[None, :])
            scores = tl.where(seen, scores, float("-inf"))
        # A weight of 0 does not silence a NaN, so values of unwritten slots must not be read at all.
        v = tl.load(value_ptr + (block * stride_vb + (at % BLOCK) * stride_vt)[:, None] + d[None, :], mask=inside, other=0.0)
        acc, top, total = _attend(acc, top, total, scores, v.to(q.dtype), PRECISION)
    return acc, top, total


# What changes from step to step is no part of what is compiled: the first step of 16 rows shall not wait for a compiler.
@triton.jit(do_not_specialize=["kept", "num_rows", "q_tiles", "splits", "stride_os"])
def comb_attention_kernel(
    out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, key_ptr, value_ptr, table_ptr,
    prefix_ptr, group_start_ptr, group_ptr, row_start_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr,
    scale, softcap, window, kept, num_rows, heads, q_tiles, splits,
    stride_os, stride_o, stride_oh, stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_table,
    stride_kb, stride_kt, stride_kch, stride_vb, stride_vt, stride_vch,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, REPEAT: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[i] = sum_n softmax_n(scale q[i] K[n]) V[n], n over the cached tokens before L and the rows of i's group up to i

    with L the prefix length of i's group; window, first tokens kept in view, soft cap, sink and fp8 scales where given. A program
    owns up to BQ queries of one request and KV head, whatever groups they belong to, and one split of the context; split 0 attends
    the groups' own keys as well, and the tokens that are kept in view.
    With SPLIT, out is the partial result [splits, M, H, D] and lse [splits, M, H] its base-2 log of summed weights; -inf, and no
    partial result, for a row that sees none of the split's keys.
    """
    q_tile = tl.program_id(0) % q_tiles
    split = tl.program_id(0) // q_tiles
    kv_head = tl.program_id(1)
    request = tl.program_id(2)
    row_0 = tl.load(row_start_ptr + request).to(tl.int32)
    row_1 = tl.load(row_start_ptr + request + 1).to(tl.int32)
    query = q_tile * BQ + tl.arange(0, BQ)
    row = row_0 + query // REPEAT
    head = kv_head * REPEAT + query % REPEAT
    live = row < row_1
    if row_0 + q_tile * BQ // REPEAT >= row_1:
        return

    group = tl.load(group_ptr + row, mask=live, other=0).to(tl.int32)
    prefix = tl.load(prefix_ptr + group, mask=live, other=0).to(tl.int32)
    start = tl.load(group_start_ptr + group, mask=live, other=0).to(tl.int32)
    position = prefix + row - start
    max_prefix = tl.max(prefix, 0)
    min_prefix = tl.min(tl.where(live, prefix, max_prefix), 0)
    d = tl.arange(0, BD)
    inside_d = d < D
    inside_q = live[:, None] & inside_d[None, :]
    q = tl.load(q_ptr + (row * stride_q + head * stride_qh)[:, None] + d[None, :], mask=inside_q, other=0.0)
    factor, value_factor = scale, 1.0
    if k_scale_ptr is not None:
        factor = scale * tl.load(k_scale_ptr)
    if v_scale_ptr is not None:
        value_factor = tl.load(v_scale_ptr).to(tl.float32)

    acc = tl.zeros([BQ, BD], tl.float32)
    top = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    if split == 0:
        own_0 = tl.min(tl.where(live, start, row_1), 0)
        own_1 = tl.minimum(row_1, row_0 + (q_tile * BQ + BQ - 1) // REPEAT + 1)
        for first in range(own_0, own_1, BN):
            key = first + tl.arange(0, BN)
            inside = (key < own_1)[:, None] & inside_d[None, :]
            k = tl.load(k_ptr + (key * stride_k + kv_head * stride_kh)[:, None] + d[None, :], mask=inside, other=0.0)
            v = tl.load(v_ptr + (key * stride_v + kv_head * stride_vh)[:, None] + d[None, :], mask=inside, other=0.0)
            scores = _score(q, k, scale, softcap, CAPPED, BQ, BN, PRECISION)
            seen = (key[None, :] >= start[:, None]) & (key[None, :] <= row[:, None])
            if WINDOW:
                seen = seen & (row[:, None] - key[None, :] < window)
            scores = tl.where(seen, scores, float("-inf"))
            acc, top, total = _attend(acc, top, total, scores, v, PRECISION)
        acc = acc / value_factor  # the scale belongs to cached values only; all are multiplied by it at the end

    first_tile = 0
    full_end = min_prefix // BN
    if WINDOW:
        first_tile = tl.maximum(tl.min(tl.where(live, position, max_prefix), 0) - window + 1, 0) // BN
        full_end = 0
    last_tile = tl.cdiv(max_prefix, BN)
    per_split = tl.cdiv(tl.maximum(last_tile - first_tile, 0), splits)
    tile_0 = first_tile + split * per_split
    tile_1 = tl.minimum(tile_0 + per_split, last_tile)
    full_end = tl.maximum(tl.minimum(tile_1, full_end), tile_0)
    key_ptr += kv_head.to(tl.int64) * stride_kch
    value_ptr += kv_head.to(tl.int64) * stride_vch
    table_ptr += request * stride_table
    if WINDOW:
        # The tokens that are kept in view, where the window does not begin in their tile.
        kept_end = tl.where((split == 0) & (kept > 0) & (first_tile > 0), 1, 0)
        acc, top, total = _cached_keys(
            acc, top, total, q, factor, softcap, prefix, position, 0, kept_end, max_prefix, window, kept,
            key_ptr, value_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt, d, inside_d,
            True, WINDOW, CAPPED, BLOCK, BQ, BN, PRECISION,
        )  # fmt: skip
    else:
        acc, top, total = _cached_keys(
            acc, top, total, q, factor, softcap, prefix, position, tile_0, full_end, max_prefix, window, kept,
            key_ptr, value_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt, d, inside_d,
            False, WINDOW, CAPPED, BLOCK, BQ, BN, PRECISION,
        )  # fmt: skip
    acc, top, total = _cached_keys(
        acc, top, total, q, factor, softcap, prefix, position, full_end, tile_1, max_prefix, window, kept,
        key_ptr, value_ptr, table_ptr, stride_kb, stride_kt, stride_vb, stride_vt, d, inside_d,
        True, WINDOW, CAPPED, BLOCK, BQ, BN, PRECISION,
    )  # fmt: skip
    acc = acc * value_factor

    written = live
    out_ptrs = out_ptr + split * stride_os + (row.to(tl.int64) * stride_o + head * stride_oh)[:, None] + d[None, :]
    if SPLIT:
        seen_any = total > 0
        written = live & seen_any
        acc = acc / tl.where(seen_any, total, 1.0)[:, None]
        lse = tl.where(seen_any, top + tl.log2(tl.where(seen_any, total, 1.0)), float("-inf"))
        tl.store(lse_ptr + (split * num_rows + row) * heads + head, lse, mask=live)
    else:
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32) * LOG2_E
            new_top = tl.maximum(top, sink)
            decay = tl.exp2(top - new_top)
            acc = acc * decay[:, None]
            total = total * decay + tl.exp2(sink - new_top)
        acc = acc / tl.where(live, total, 1.0)[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=written[:, None] & inside_d[None, :])


@triton.jit(do_not_specialize=["requests", "num_rows", "splits"])
def combine_kernel(
    out_ptr, partial_ptr, lse_ptr, row_start_ptr, sinks_ptr, requests, num_rows, heads, splits, stride_o, stride_oh,
    D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """out[i] = sum_s 2^(lse[s, i]) partial[s, i] / (sum_s 2^(lse[s, i]) + e^sink)

    A program owns one row and BH heads. Rows behind the last request's are left alone, splits with nothing to say are not read.
    """
    row = tl.program_id(0)
    if row >= tl.load(row_start_ptr + requests).to(tl.int32):
        return
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    d = tl.arange(0, BD)
    inside = (head < heads)[:, None] & (d < D)[None, :]
    acc = tl.zeros([BH, BD], tl.float32)
    if sinks_ptr is not None:
        top = tl.load(sinks_ptr + head, mask=head < heads, other=0.0).to(tl.float32) * LOG2_E
        total = tl.full([BH], 1.0, tl.float32)
    else:
        top = tl.full([BH], float("-inf"), tl.float32)
        total = tl.zeros([BH], tl.float32)
    for split in range(splits):
        at = (split * num_rows + row).to(tl.int64) * heads + head
        lse = tl.load(lse_ptr + at, mask=head < heads, other=float("-inf"))
        seen = inside & (lse != float("-inf"))[:, None]
        partial = tl.load(partial_ptr + (at * D)[:, None] + d[None, :], mask=seen, other=0.0)
        new_top = tl.maximum(top, lse)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay = tl.exp2(top - shift)
        weight = tl.exp2(lse - shift)
        acc = acc * decay[:, None] + weight[:, None] * partial
        total = total * decay + weight
        top = new_top
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * stride_o + head[:, None] * stride_oh + d[None, :], out, mask=inside)


def launch(out: torch.Tensor, inputs: CombInputs, config: Config | None = None) -> None:
    """Writes out as `comb_attention_` does; block sizes by `choose_config` where not given."""
    q, k, v, layout, sinks = inputs.q, inputs.k, inputs.v, inputs.layout, inputs.sinks
    key_cache, value_cache, block_table = inputs.key_cache, inputs.value_cache, inputs.block_table
    (rows, heads, head_size), kv_heads, requests = q.shape, k.shape[1], block_table.shape[0]
    if rows == 0 or layout.max_rows == 0 or requests == 0:
        return
    block, repeat = key_cache.shape[1], heads // kv_heads
    context = block_table.shape[1] * block
    config = config or choose_config(
        layout.max_rows, heads, kv_heads, head_size, requests, context, num_sms(q.device), q.element_size()
    )
    q_tiles, splits = triton.cdiv(layout.max_rows * repeat, config.bq), config.splits
    split, bd = splits > 1, max(16, triton.next_power_of_2(head_size))
    target = q.new_empty(splits, rows, heads, head_size, dtype=torch.float32) if split else out[None]
    lse = q.new_empty(splits if split else 0, rows, heads, dtype=torch.float32)
    comb_attention_kernel[(q_tiles * splits, kv_heads, requests)](
        target, lse, q, k, v, key_cache, value_cache, block_table,
        layout.prefix_len, layout.group_start, layout.group_of_row, layout.row_start, sinks, inputs.k_scale, inputs.v_scale,
        inputs.scale, inputs.softcap, inputs.window, inputs.kept, rows, heads, q_tiles, splits,
        target.stride(0), target.stride(1), target.stride(2), q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        v.stride(0), v.stride(1), block_table.stride(0),
        key_cache.stride(0), key_cache.stride(1), key_cache.stride(2),
        value_cache.stride(0), value_cache.stride(1), value_cache.stride(2),
        SPLIT=split, WINDOW=inputs.window > 0, CAPPED=inputs.softcap > 0, REPEAT=repeat, BLOCK=block,
        D=head_size, BD=bd, BQ=config.bq, BN=config.bn, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if split:
        combine_kernel[(rows, triton.cdiv(heads, 4))](
            out, target, lse, layout.row_start, sinks, requests, rows, heads, splits, out.stride(0), out.stride(1),
            D=head_size, BD=bd, BH=4, num_warps=4,
        )  # fmt: skip
