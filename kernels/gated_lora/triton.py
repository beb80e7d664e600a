"""The gated LoRA in one launch, with or without the base product."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..dispatch import MAX_COUNTERS, counters, num_sms
from ..dot import dot


@dataclass(frozen=True)
class Config:
    """Block sizes of a launch. BM rows, BN output features (or ranks), BK inputs a step; splits cut K between programs."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    split_base: int = 1
    split_shrink: int = 1


# Reasoned, not tuned: no GPU has run this table yet. For an H200 (132 SMs, 4.8 TB/s, 50 MB L2, about 206 bf16 FLOP per byte).
#
# A decode step reads W once from HBM, so W's bytes are the floor: qkv 50 MB, o 34 MB, gate_up 235 MB, down 117 MB at 8 B. A and B
# of rank 128 add 9.4 %, 6.3 %, 4.0 % and 4.0 % to that; launch and tail must fit in what is left of 10 % (qkv: next to nothing).
# * x A^T is the product of x with R = S r further rows of "W": its tiles run beside the base tiles, in the same launch, not before
#   them in a launch of their own (1-2 us of 12 us). Base tiles wait for it only after their own loop over K.
# * Recomputing x A^T in each tile instead would read A (1-3 MB) from L2 once per tile: 64 tiles read more than W has.
# * About 3 MB must be in flight to fill HBM (4.5 TB/s x 700 ns): 23 kB an SM. Three or four stages of 16-32 kB hold that with one
#   program an SM, so splitting K serves only to put a program on every SM.
# * Each tile reads all of x: L2 traffic grows by rows / BN of W's bytes. 81 rows and BN = 32 would read 2.5 W. So BN grows with
#   the rows, and K is split where tiles are then too few (o, down: 4096 / 128 = 32 tiles, 4 splits). A split costs
#   8 rows BN bytes of L2 (write and read of fp32 partials), below 10 % of W's bytes from K = 4096 and 4 splits on.
# * 128 x 256 tiles (gate_up) leave few registers: ranks are expanded 32 at a time there, which is what compiles without spills.
# * Up to 32 rows mma m16n8k16 is enough (2 rows FLOP per W element); from 64 rows on BM is a wgmma tile.
# (rows up to, BM, BN, BK, warps, stages)
DECODE_TABLE = ((16, 16, 32, 128, 4, 5), (32, 32, 64, 128, 4, 4), (64, 64, 128, 64, 4, 4), (128, 128, 128, 64, 8, 3))
MIN_STEPS = 4  # BK steps a split must have left to be worth its partial sums


def choose_config(m: int, n: int, k: int, ranks: int, sms: int, base: bool, itemsize: int = 2) -> Config:
    """The launch for x [m, k], `n` output features and `ranks` = S r low-rank features on a GPU of `sms` SMs."""
    _, bm, bn, bk, warps, stages = next((row for row in DECODE_TABLE if m <= row[0]), DECODE_TABLE[-1])
    if itemsize == 4:  # twice the bytes a tile: half the depth keeps shared memory below 227 kB
        bk //= 2
    if bm == 128 and itemsize == 2 and sms < -(-n // bn) <= 2 * sms:
        bn *= 2  # gate_up: 112 tiles in one wave; 224 would need two, as registers allow one program an SM
    row_tiles, steps = -(-m // bm), max(1, k // (bk * MIN_STEPS))
    base_tiles, shrink_tiles = row_tiles * -(-n // bn), row_tiles * -(-ranks // bn)
    split_base = max(1, min(sms // base_tiles, steps, 8)) if base else 1
    # Beside base tiles the shrink only has to be done before they are; alone, it is the launch and wants the whole GPU.
    split_shrink = 2 * split_base if base else sms // shrink_tiles
    return Config(bm, bn, bk, warps, stages, split_base, max(1, min(split_shrink, steps, 16)))


@triton.jit
def _arrive(acc, part_ptr, counter_ptr, split, num_splits, rows, num_rows, BM: tl.constexpr, BN: tl.constexpr):
    """Hands in one split's partial sum. The last split to arrive gets their total, always added in the same order."""
    offsets = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    live = (rows < num_rows)[:, None]
    tl.store(part_ptr + split * (BM * BN) + offsets, acc, mask=live)
    tl.debug_barrier()  # all threads' stores come before the one thread's release below
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_splits - 1
    if last:
        acc = tl.zeros([BM, BN], tl.float32)
        for s in range(num_splits):
            acc += tl.load(part_ptr + s * (BM * BN) + offsets, mask=live, other=0.0, cache_modifier=".cg")
        tl.store(counter_ptr, 0)
    return acc, last


@triton.jit
def _expand(
    acc, t_ptr, b_ptr, spans_ptr, rows, cols, col_0, m, out, ranks, rank, num_slices,
    BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + t_s B_s^T for every slice s that the tile's columns touch."""
    r = tl.arange(0, BR)
    for s in range(num_slices):
        first = tl.load(spans_ptr + 2 * s)
        end = tl.load(spans_ptr + 2 * s + 1)
        if (col_0 < end) & (col_0 + BN > first):
            mine = (cols >= first) & (cols < end) & (cols < out)
            for r_0 in range(0, rank, BR):
                low = (r_0 + r) < rank
                t = tl.load(
                    t_ptr + rows[:, None] * ranks + (s * rank + r_0 + r)[None, :],
                    mask=(rows < m)[:, None] & low[None, :],
                    other=0.0,
                    cache_modifier=".cg",  # written by another SM during this launch
                )
                b = tl.load(b_ptr + cols[:, None] * rank + (r_0 + r)[None, :], mask=mine[:, None] & low[None, :], other=0.0)
                acc = dot(t.to(b.dtype), tl.trans(b), acc, PRECISION)
    return acc


# What changes from step to step is no part of what is compiled: the first step of 16 rows shall not wait for a compiler.
@triton.jit(do_not_specialize=["m", "num_slices", "row_tiles", "shrink_tiles", "split_shrink", "split_base"])
def gated_lora_kernel(
    y_ptr, x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, spans_ptr, n_ptr, t_ptr, part_ptr, counter_ptr, scale,
    m, out, k, ranks, rank, num_slices, stride_y, stride_x, stride_w,
    row_tiles, shrink_tiles, split_shrink, split_base,
    BASE: tl.constexpr, BIAS: tl.constexpr, TICKETS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y[i] = x[i] W^T + bias + [i >= n] scale (x[i] A^T) B^T        (BASE)
    y[i] = y[i]            + [i >= n] scale (x[i] A^T) B^T        (not BASE; rows before n are not touched)

    Programs are tiles of two kinds. *Shrink* tiles come first: t = scale x A^T, [rows, S r], 0 before row n. *Expand* tiles own
    [BM rows, BN outputs] of y: their base product over K, then t B^T as soon as the row tile's shrink tiles have reported ready.
    Shrink tiles wait for nothing and start first, so waiting ends whatever number of programs the GPU holds at a time; TICKETS
    numbers programs by their start where they do not all fit at once. K is cut between splits; the last one to arrive adds up.

    Counters, all 0 between launches: started programs, finished programs, ready shrink tiles of each row tile, arrived splits
    of each tile.
    """
    program = tl.program_id(0)
    if TICKETS:
        program = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    n = tl.load(n_ptr).to(tl.int32)
    num_shrink = row_tiles * shrink_tiles * split_shrink
    shrink = program < num_shrink
    work = tl.where(shrink, program, program - num_shrink)
    splits = tl.where(shrink, split_shrink, split_base)
    split = work % splits
    tile = work // splits
    row_tile = tile % row_tiles
    col_0 = (tile // row_tiles) * BN
    # Without the base product only mask rows count, and row tiles begin at the first of them.
    row_0 = row_tile * BM
    if not BASE:
        row_0 += n
    rows = row_0 + tl.arange(0, BM)
    rows_64 = rows.to(tl.int64)
    cols = col_0 + tl.arange(0, BN)
    live = (rows < m)[:, None]
    gated = (row_0 < m) & (row_0 + BM > n) & (n < m)
    active = gated
    source_ptr, stride_source, num_cols = a_ptr, k, ranks
    per_split = tl.cdiv(tl.cdiv(k, BK), splits) * BK
    k_0 = split * per_split
    k_1 = tl.minimum(k_0 + per_split, k)
    if BASE:
        active = gated | (not shrink)
        source_ptr = tl.where(shrink, a_ptr, w_ptr)
        stride_source = tl.where(shrink, k, stride_w)
        num_cols = tl.where(shrink, ranks, out)
        k_1 = tl.where(active, k_1, k_0)
    else:
        k_1 = tl.where(active & shrink, k_1, k_0)

    acc = tl.zeros([BM, BN], tl.float32)
    step = tl.arange(0, BK)
    x_ptrs = x_ptr + rows_64[:, None] * stride_x + step[None, :]
    w_ptrs = source_ptr + cols.to(tl.int64)[:, None] * stride_source + step[None, :]
    for at in range(k_0, k_1, BK):
        inside = (at + step < k)[None, :]
        x = tl.load(x_ptrs + at, mask=live & inside, other=0.0, eviction_policy="evict_last")
        w = tl.load(w_ptrs + at, mask=(cols < num_cols)[:, None] & inside, other=0.0, eviction_policy="evict_first")
        acc = dot(x, tl.trans(w), acc, PRECISION)

    complete = active
    if active & (splits > 1):
        counter = tl.where(shrink, 0, row_tiles * shrink_tiles) + tile
        part = counter * (BM * BN) * tl.maximum(split_shrink, split_base)
        acc, complete = _arrive(acc, part_ptr + part, counter_ptr + 2 + row_tiles + counter, split, splits, rows, m, BM, BN)
    ready_ptr = counter_ptr + 2 + row_tile
    if complete:
        if shrink:
            t = tl.where((rows >= n)[:, None], acc * scale, 0.0)
            tl.store(t_ptr + rows_64[:, None] * ranks + cols[None, :], t, mask=live & (cols < ranks)[None, :])
            tl.debug_barrier()  # all threads' stores come before the one thread's release
            tl.atomic_add(ready_ptr, 1, sem="release")
        else:
            inside = live & (cols < out)[None, :]
            y_ptrs = y_ptr + rows_64[:, None] * stride_y + cols[None, :]
            if BIAS:
                acc += tl.load(bias_ptr + cols, mask=cols < out, other=0.0).to(tl.float32)[None, :]
            if not BASE:
                acc = tl.load(y_ptrs, mask=inside, other=0.0).to(tl.float32)
            if gated:
                while tl.atomic_add(ready_ptr, 0, sem="acquire") < shrink_tiles:
                    pass
                acc = _expand(
                    acc, t_ptr, b_ptr, spans_ptr, rows, cols, col_0, m, out, ranks, rank, num_slices, BN, BR, PRECISION
                )  # fmt: skip
            tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=inside)

    # Whoever finishes last leaves the counters as it found them, for the next launch.
    if tl.atomic_add(counter_ptr + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(counter_ptr, 0)
        tl.store(counter_ptr + 1, 0)
        for i in range(row_tiles):
            tl.store(counter_ptr + 2 + i, 0)


def launch(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    spans: torch.Tensor,
    scale: float,
    num_real: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Writes y [M, out] of x [M, in] and weight [out, in]; without a weight adds the LoRA onto y in place.

    Args:
        y, x, weight: last dimension contiguous.
        lora_a, lora_b, spans, scale: as `LowRankSlices`.
        num_real: N, one int32 or int64 on the device.
        config: block sizes; by `choose_config` where not given.
    """
    (m, k), out = x.shape, y.shape[1]
    num_slices, rank, _ = lora_a.shape
    ranks = num_slices * rank
    if m == 0 or out == 0:
        return
    sms = num_sms(x.device)
    config = config or choose_config(m, out, k, ranks, sms, weight is not None, x.element_size())
    row_tiles, base_tiles = triton.cdiv(m, config.bm), triton.cdiv(out, config.bn)
    shrink_tiles = triton.cdiv(ranks, config.bn)
    num_programs = row_tiles * (shrink_tiles * config.split_shrink + base_tiles * config.split_base)
    tiles = row_tiles * (shrink_tiles + (base_tiles if config.split_base > 1 else 0))
    if 2 + row_tiles + tiles > MAX_COUNTERS:
        raise ValueError(f"{m} rows make {tiles} tiles, more than {MAX_COUNTERS} counters can serve; split the batch")
    splits = max(config.split_shrink, config.split_base)
    partial = x.new_empty(tiles * splits * config.bm * config.bn if splits > 1 else 0, dtype=torch.float32)
    gated_lora_kernel[(num_programs,)](
        y, x, weight, bias, lora_a, lora_b, spans, num_real,
        x.new_empty(m, ranks, dtype=torch.float32), partial, counters(x.device), scale,
        m, out, k, ranks, rank, num_slices, y.stride(0), x.stride(0), 0 if weight is None else weight.stride(0),
        row_tiles, shrink_tiles, config.split_shrink, config.split_base,
        BASE=weight is not None, BIAS=bias is not None, TICKETS=num_programs > sms,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        BM=config.bm, BN=config.bn, BK=config.bk, BR=min(32 if config.bn == 256 else 64, max(16, triton.next_power_of_2(rank))),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
