"""The references against independent dense computations: what the kernels are measured by must itself be right."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_mtp.kernels.comb_attention import CombInputs, comb_attention_, comb_attention_reference
from vllm_mtp.kernels.gated_lora import (
    LowRankSlices,
    gated_lora,
    gated_lora_,
    gated_lora_add_reference,
    gated_lora_reference,
)

from .comb_cases import Case, cases
from .conftest import DEVICE, RUNS_TRITON


def dense_row(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, prefix: int, sink: torch.Tensor | None, case: Case
) -> torch.Tensor:
    """One query head over the keys before it, `prefix` of them cached, and its own, the last; written as sums, not as softmax."""
    window, cap = case.options["window"] or len(keys), case.options["softcap"]
    first = max(0, len(keys) - window)
    seen = [*range(min(case.options["kept"], prefix, first)), *range(first, len(keys))]
    keys, values = keys[seen], values[seen]
    scores = [float(q @ key) * case.options["scale"] for key in keys]
    if cap:
        scores = [cap * float(torch.tanh(torch.tensor(score / cap, dtype=torch.float64))) for score in scores]
    weights = torch.tensor(scores, dtype=torch.float64).exp()
    total = weights.sum() + (0 if sink is None else sink.double().exp())
    return (weights[:, None].to(values) * values).sum(0) / total.to(values)


@settings(deadline=None, max_examples=25)
@given(cases(dtypes=(torch.float32,)))
def test_comb_attention_is_causal_attention_on_prefix_and_group(case: Case) -> None:
    if case.key_cache.dtype == torch.uint8:
        case.key_cache, case.value_cache = (c.view(torch.float8_e4m3fn) for c in (case.key_cache, case.value_cache))
    found, repeat, row = case.reference(), case.q.shape[1] // case.k.shape[1], 0
    assert found.dtype == torch.float64
    sinks = case.options.get("sinks")
    for request, length, prefix in case.groups:
        k_scale, v_scale = (float(case.options.get(name, 1.0)) for name in ("k_scale", "v_scale"))
        keys = torch.cat([case.tokens[request][0][:prefix].double() * k_scale, case.k[row : row + length].double()])
        values = torch.cat([case.tokens[request][1][:prefix].double() * v_scale, case.v[row : row + length].double()])
        for i in range(length):
            for head in range(case.q.shape[1]):
                end, kv = prefix + i + 1, head // repeat
                sink = None if sinks is None else sinks[head]
                expected = dense_row(case.q[row + i, head].double(), keys[:end, kv], values[:end, kv], prefix, sink, case)
                torch.testing.assert_close(found[row + i, head], expected, rtol=1e-6, atol=1e-9)
        row += length
    assert not found[row:].any()


@settings(deadline=None, max_examples=10)
@given(cases(dtypes=(torch.float32,)))
def test_plain_cases_equal_torchs_attention(case: Case) -> None:
    case.options = {"scale": case.options["scale"]}
    if case.key_cache.element_size() == 1:
        return
    found, repeat, row = case.reference(), case.q.shape[1] // case.k.shape[1], 0
    for request, length, prefix in case.groups:
        rows = slice(row, row + length)
        keys, values = (
            torch.cat([cached[:prefix], own[rows]]).double().repeat_interleave(repeat, 1).transpose(0, 1)
            for cached, own in zip(case.tokens[request], (case.k, case.v), strict=True)
        )
        seen = torch.ones(length, prefix + length, dtype=torch.bool, device=DEVICE).tril(prefix)
        query = case.q[rows].double().transpose(0, 1)
        expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, seen, scale=case.options["scale"])
        torch.testing.assert_close(found[rows], expected.transpose(0, 1), rtol=1e-6, atol=1e-9)
        row += length


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 9), st.integers(0, 11), st.integers(0, 2**31))
def test_gated_lora_equals_merged_weights_row_by_row(rows: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    x, weight, bias, slices = (
        normal(rows, 7),
        normal(12, 7),
        normal(12),
        [(1, normal(2, 7), normal(4, 2)), (7, normal(3, 7), normal(5, 3))],
    )
    merged = weight.clone()
    for at, a, b in slices:
        merged[at : at + len(b)] += 0.5 * b @ a
    lora, num_real = LowRankSlices.pack(slices, 12, scale=0.5), torch.tensor([n], device=DEVICE)
    expected = [(merged if i >= n else weight) @ row + bias for i, row in enumerate(x)]
    found = gated_lora_reference(x, weight, lora, num_real, bias)
    torch.testing.assert_close(found, torch.stack(expected) if rows else x.new_empty(0, 12))
    torch.testing.assert_close(gated_lora_add_reference(x @ weight.T + bias, x, lora, num_real), found)


@pytest.mark.skipif(RUNS_TRITON, reason="operations run their kernels here")
def test_without_a_gpu_the_operations_are_their_references() -> None:
    x, weight, y = torch.randn(5, 8), torch.randn(6, 8), torch.randn(5, 6)
    lora = LowRankSlices.pack([(0, torch.randn(2, 8), torch.randn(6, 2))], 6)
    n = torch.tensor([2])
    update = torch.cat([torch.zeros(2, 6), x[2:] @ lora.a[0].T @ lora.b.T])
    torch.testing.assert_close(gated_lora(x, weight, lora, n), x @ weight.T + update)
    torch.testing.assert_close(gated_lora_(y.clone(), x, lora, n), y + update)


@settings(deadline=None, max_examples=10)
@given(cases(dtypes=(torch.float32,)))
def test_rows_behind_the_last_request_are_not_written(case: Case) -> None:
    out = torch.full_like(case.q, float("nan"))
    out[case.num_rows :] = 7
    assert comb_attention_(out, *case.given(), **case.options) is out
    assert (out[case.num_rows :] == 7).all()
    assert not out[: case.num_rows].isnan().any()
    if case.key_cache.dtype != torch.uint8:
        expected = comb_attention_reference(CombInputs(*case.given(), **case.options))[: case.num_rows]
        torch.testing.assert_close(out[: case.num_rows], expected, rtol=1e-4, atol=1e-4)
