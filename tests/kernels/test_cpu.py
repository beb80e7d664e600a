"""The CPU kernels against the references."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_mtp.kernels import cpu
from vllm_mtp.kernels.comb_attention import CombInputs, CombLayout, comb_attention_reference
from vllm_mtp.kernels.cpu.linear import PanelSlices, panels
from vllm_mtp.kernels.gated_lora import CpuLowRankSlices, LowRankSlices, gated_lora_add_reference, gated_lora_reference

from vllm_mtp.sampler_head import SamplerHead

from .conftest import RUNS_TRITON

pytestmark = pytest.mark.skipif(RUNS_TRITON, reason="the other process tests them")
DTYPES = st.sampled_from(cpu.DTYPES)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    cpu.load()


@settings(max_examples=60, deadline=None)
@given(
    dtype=DTYPES,
    real=st.integers(0, 5),
    masks=st.integers(0, 40),
    inputs=st.sampled_from([1, 16, 50, 384]),
    sizes=st.lists(st.sampled_from([1, 17, 32, 100]), min_size=1, max_size=3),
    rank=st.sampled_from([1, 5, 16, 33]),
    gap=st.sampled_from([0, 7]),
    seed=st.integers(0, 2**31),
)
def test_gated_lora(
    dtype: torch.dtype, real: int, masks: int, inputs: int, sizes: list[int], rank: int, gap: int, seed: int
) -> None:
    """Any shapes, outputs that no slice has, rows of a wider tensor; real rows keep their bits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    firsts = [0, *accumulate(size + gap for size in sizes)]
    parts = [(at, normal(rank, inputs) / inputs**0.5, normal(size, rank)) for at, size in zip(firsts, sizes, strict=False)]
    slices = LowRankSlices.pack([(at, a.to(dtype).float(), b.to(dtype).float()) for at, a, b in parts], firsts[-1])
    x, y = normal(real + masks, inputs + 3).to(dtype)[:, :inputs], normal(real + masks, firsts[-1] + 5).to(dtype)[:, : firsts[-1]]
    num_real = torch.tensor([real])
    double = LowRankSlices(slices.a.double(), slices.b.double(), slices.spans)
    wanted = gated_lora_add_reference(y.double(), x.double(), double, num_real)
    before = y.clone()
    torch.ops.vllm_mtp.gated_lora_cpu_(y, x, *CpuLowRankSlices.pack(slices, dtype), num_real)
    assert torch.equal(y[:real], before[:real])
    scale = wanted.abs().max().clamp(min=1) if wanted.numel() else 1.0
    assert ((y.double() - wanted).abs() <= TOLERANCE[dtype] * scale).all()


@pytest.mark.skipif(not cpu.has_linear(), reason="the processor has neither AVX-512 nor AVX2")
@settings(max_examples=40, deadline=None)
@given(
    real=st.integers(0, 14),
    masks=st.integers(0, 110),
    inputs=st.sampled_from([2, 50, 384]),
    sizes=st.lists(st.sampled_from([1, 17, 32, 100]), min_size=1, max_size=3),
    rank=st.sampled_from([1, 5, 16, 33]),
    gap=st.sampled_from([0, 7]),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_linear(real: int, masks: int, inputs: int, sizes: list[int], rank: int, gap: int, biased: bool, seed: int) -> None:
    """Any shapes, slices that end within a panel, outputs that no slice has, rows of a wider tensor; real rows are to the bit what
    they are alone, and what they are without a LoRA."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    firsts = [0, *accumulate(size + gap for size in sizes)]
    parts = [(at, normal(rank, inputs) / inputs**0.5, normal(size, rank)) for at, size in zip(firsts, sizes, strict=False)]
    slices = LowRankSlices.pack([(at, a.bfloat16().float(), b.bfloat16().float()) for at, a, b in parts], firsts[-1])
    weight, bias = (normal(firsts[-1], inputs) / inputs**0.5).bfloat16(), normal(firsts[-1]).bfloat16() if biased else None
    x, num_real = normal(real + masks, inputs + 4).bfloat16()[:, :inputs], torch.tensor([real])
    double = LowRankSlices(slices.a.double(), slices.b.double(), slices.spans)
    wanted = gated_lora_reference(x.double(), weight.double(), double, num_real, None if bias is None else bias.double())
    w, ops = panels(weight), torch.ops.vllm_mtp
    y = ops.gated_linear_cpu(x, w, bias, firsts[-1], *PanelSlices.pack(slices), num_real)
    scale = wanted.abs().max().clamp(min=1) if wanted.numel() else 1.0
    assert ((y.double() - wanted).abs() <= 1e-2 * scale).all()
    plain = ops.linear_cpu(x[:real], w, bias, firsts[-1])
    assert torch.equal(y[:real], plain)
    assert all(torch.equal(plain[i : i + 1], ops.linear_cpu(x[i : i + 1], w, bias, firsts[-1])) for i in range(real))


@pytest.mark.skipif(not cpu.has_linear(), reason="the processor has neither AVX-512 nor AVX2")
@settings(max_examples=40, deadline=None)
@given(
    requests=st.integers(1, 5),
    k=st.integers(1, 4),
    width=st.sampled_from([16, 48, 384]),
    vocab=st.sampled_from([7, 33, 2048]),
    candidates=st.sampled_from([1, 2, 6]),
    residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_drafter(requests: int, k: int, width: int, vocab: int, candidates: int, residual: bool, seed: int) -> None:
    """Every draft is one of the plain head's candidates, and of those the sampler head's best, given the draft before it."""
    torch.manual_seed(seed)
    head = SamplerHead(width, residual).bfloat16().requires_grad_(False)
    for norm in (head.norm_1, head.norm_2):
        norm.weight.normal_(1, 0.3), norm.bias.normal_()
    w, e, hidden = (torch.randn(n, width).bfloat16() for n in (vocab + 3, vocab + 1, requests * k + 2))
    rows, sampled = torch.randperm(len(hidden))[: requests * k].view(requests, k), torch.randint(vocab, (requests,))
    weight = head.linear_1.weight
    drafts, probabilities = torch.ops.vllm_mtp.draft_cpu(
        *(hidden, rows, sampled, panels(w), w, e, panels(weight[:, :width]), panels(weight[:, width:]), head.linear_1.bias),
        *(head.norm_1.weight, head.norm_1.bias, head.norm_1.eps, panels(head.linear_2.weight), head.linear_2.bias),
        *(head.norm_2.weight, head.norm_2.bias, head.norm_2.eps, residual, vocab, candidates),
    )
    head, w, e, states = head.double(), w[:vocab].double(), e.double(), hidden[rows].double()
    previous = torch.cat([sampled[:, None], drafts[:, :-1]], 1)
    plain, scores = states @ w.T, head(e[previous], states) @ w.T
    chosen = drafts[..., None]
    least = plain.topk(candidates).values[..., -1:]
    near = 0.02  # of the largest score: both heads round to bfloat16
    assert (plain.gather(2, chosen) >= least - near * plain.abs().amax()).all()
    best = scores.masked_fill(plain < least + near * plain.abs().amax(), -torch.inf).amax(2, keepdim=True)
    among = scores.gather(2, plain.topk(candidates).indices)
    told_apart = (plain >= least - near * plain.abs().amax()).sum(2) == candidates
    sure = (scores.gather(2, chosen) - among.logsumexp(2, keepdim=True)).exp()[..., 0]
    close = (probabilities / sure).log().abs() < 3 * near * scores.abs().amax()
    assert (close | ~told_apart).all()
    assert (scores.gather(2, chosen) >= best - near * scores.abs().amax()).all()


def test_panels_want_pairs() -> None:
    with pytest.raises(ValueError, match="3 is odd"):
        panels(torch.zeros(4, 3))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_comb_attention(data: st.DataObject) -> None:
    """Ragged groups, requests without any, prefixes of nothing and over many blocks, windows, soft caps; rows of a fused qkv.

    What no row may read is NaN: cache slots behind a request's tokens, and blocks of nobody.
    """
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, block, size = draw(DTYPES), draw(st.sampled_from([16, 32, 128])), draw(st.sampled_from([16, 64, 96]))
    kv_heads, shared = draw(st.sampled_from([(1, 1), (2, 3), (3, 2)]))
    lengths = draw(st.lists(st.integers(0, 300), min_size=1, max_size=3))
    rows = [draw(st.integers(0, min(4, length))) for length in lengths]
    groups = [
        (request, draw(st.integers(1, 5)), max(0, length - ahead))
        for request, length in enumerate(lengths)
        for ahead in reversed(range(draw(st.integers(0, 4))))
    ] or [(0, 1, lengths[0])]
    layout = CombLayout.of(*(list(column) for column in zip(*groups, strict=True)), len(lengths), torch.device("cpu"))
    masks, real = sum(length for _, length, _ in groups), sum(rows)
    fused = torch.randn(real + masks, (shared + 2) * kv_heads, size, generator=generator).to(dtype)
    q, k, v = fused.split([shared * kv_heads, kv_heads, kv_heads], 1)

    width = max(lengths) // block + 1
    table = torch.randperm(len(lengths) * width + 1, generator=generator)[:-1].view(len(lengths), width).int()
    keys = torch.full((table.numel() + 1, block, kv_heads, size), torch.nan, dtype=dtype)
    values = keys.clone()
    for request, length in enumerate(lengths):
        for first in range(0, length, block):
            tokens = min(block, length - first)
            for half in (keys, values):
                half[table[request, first // block], :tokens] = torch.randn(tokens, kv_heads, size, generator=generator).to(dtype)
    # vLLM's cache: K of a block as [D, tokens], V behind it as [tokens, D].
    cache = torch.cat([keys.permute(0, 2, 3, 1).flatten(2), values.transpose(1, 2).flatten(2)], 2)
    cache = cache.view(len(keys), kv_heads, block, 2 * size)

    options = size**-0.5, draw(st.sampled_from([0, 0, 1, 9, 64])), draw(st.sampled_from([0.0, 0.0, 2.0]))
    of_masks = draw(st.sampled_from([None, None, 0, 1, 9, 64])), draw(st.sampled_from([0, 1, 4]))
    window, kept = of_masks if of_masks[0] is not None else (options[1], 0)

    def attended(starts: tuple[torch.Tensor, ...], real: int, *counts: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(fused[:, : shared * kv_heads])
        counts = counts or (None, None)
        torch.ops.vllm_mtp.comb_attention_cpu_(out, q, k, v, cache, table, *starts, real, *options, *counts, *of_masks)
        return out

    def wanted(layout: CombLayout, qkv: tuple[torch.Tensor, ...], window: int, kept: int) -> torch.Tensor:
        doubles = (tensor.double() for tensor in (*qkv, keys, values))
        return comb_attention_reference(CombInputs(*doubles, table, layout, options[0], window, options[2], kept=kept))

    starts = (layout.prefix_len.long(), layout.group_start.long(), layout.group_of_row.long(), layout.row_start.long())
    masks_alone = attended(starts, real)
    assert not masks_alone[:real].any()
    expected = wanted(layout, (q[real:], k[real:], v[real:]), window, kept)
    assert ((masks_alone[real:].double() - expected).abs() <= TOLERANCE[dtype]).all()

    # A real row is a group of one row, whose key and value happen to be in the cache.
    last = [(request, length - ahead) for request, length in enumerate(lengths) for ahead in range(rows[request], 0, -1)]
    of_real = torch.zeros(0, shared * kv_heads, size, dtype=torch.double)
    if last:
        requests, positions = (list(column) for column in zip(*last, strict=True))
        blocks, slots = table[requests, [at // block for at in positions]].long(), torch.tensor(positions) % block
        alone = CombLayout.of(requests, [1] * real, positions, len(lengths), torch.device("cpu"))
        of_real = wanted(alone, (q[:real], keys[blocks, slots], values[blocks, slots]), options[1], 0)
    counts = torch.tensor([0, *accumulate(rows)]).int(), torch.tensor(lengths).int()
    together = attended(starts, real, *counts)
    assert ((together[:real].double() - of_real).abs() <= TOLERANCE[dtype]).all()
    assert ((together[real:].double() - expected).abs() <= TOLERANCE[dtype]).all()
    without_masks = attended((torch.zeros(0).long(),) * 4, len(q), *counts)
    assert torch.equal(without_masks[:real], together[:real]), "a row's sum depends on the rows beside it"


def test_a_compiler_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for compiler, said in (("false", "could not build"), ("/nowhere/g++", "could not be started")):
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises(cpu.NotBuilt, match=said):
            cpu.load.__wrapped__()
