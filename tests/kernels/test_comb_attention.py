"""The comb attention kernel against its reference in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_mtp.kernels.comb_attention import CombInputs, CombLayout, comb_attention_, comb_attention_reference
from vllm_mtp.kernels.comb_attention.triton import Config, choose_config, launch

from .comb_cases import Case, cases
from .conftest import DEVICE, examples

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


UNTOUCHED = 7.0


def poisoned(case: Case) -> torch.Tensor:
    """An output whose rows of no request hold a value that no kernel would write."""
    out = torch.full_like(case.q, float("nan"))
    out[case.num_rows :] = UNTOUCHED
    return out


def assert_close(case: Case, found: torch.Tensor) -> None:
    if case.key_cache.dtype == torch.uint8:
        case.key_cache, case.value_cache = (c.view(torch.float8_e4m3fn) for c in (case.key_cache, case.value_cache))
    rows, expected = case.num_rows, case.reference()
    assert (found[rows:] == UNTOUCHED).all()
    if rows:
        error = (found[:rows].double() - expected[:rows]).abs().max() / expected[:rows].abs().max()
        assert error.item() <= TOLERANCE[found.dtype]  # NaN fails


@settings(deadline=None, max_examples=examples(100))
@given(cases())
def test_equals_the_formula(case: Case) -> None:
    out = poisoned(case)
    assert comb_attention_(out, *case.given(), **case.options) is out
    assert_close(case, out)


@settings(deadline=None, max_examples=examples(120))
@given(cases(), st.sampled_from([16, 32]), st.sampled_from([16, 64]), st.integers(1, 5))
def test_every_tile_and_split_does_its_part(case: Case, bq: int, bn: int, splits: int) -> None:
    if case.key_cache.dtype == torch.uint8:
        case.key_cache, case.value_cache = (c.view(torch.float8_e4m3fn) for c in (case.key_cache, case.value_cache))
    out = poisoned(case)
    launch(out, CombInputs(*case.given(), **case.options), Config(bq, bn, 4, 2, splits))
    assert_close(case, out)


def comb(k: int, prefix: int, head_size: int = 64, heads: int = 4, kv_heads: int = 1, block: int = 16) -> dict[str, Any]:
    """A quadratic comb of k behind one request, float32."""
    rows, blocks = k * (k + 1), -(-(prefix + k) // block)
    return {
        "q": torch.randn(rows, heads, head_size, device=DEVICE),
        "k": torch.randn(rows, kv_heads, head_size, device=DEVICE),
        "v": torch.randn(rows, kv_heads, head_size, device=DEVICE),
        "key_cache": torch.randn(blocks, block, kv_heads, head_size, device=DEVICE),
        "value_cache": torch.randn(blocks, block, kv_heads, head_size, device=DEVICE),
        "block_table": torch.randperm(blocks, device=DEVICE)[None],
        "layout": CombLayout.of([0] * (k + 1), [k] * (k + 1), [prefix + j for j in range(k + 1)], 1, DEVICE),
        "scale": head_size**-0.5,
    }


@pytest.mark.parametrize(("head_size", "heads", "kv_heads"), [(64, 8, 2), (128, 7, 1), (192, 4, 4), (256, 4, 1)])
def test_a_comb_of_eight_with_large_heads(head_size: int, heads: int, kv_heads: int) -> None:
    call = comb(8, 500, head_size, heads, kv_heads, block=128)
    out = torch.full_like(call["q"], float("nan"))
    comb_attention_(out, **call)
    expected = comb_attention_reference(CombInputs(**{**call, **{name: call[name].double() for name in "qkv"}}))
    assert ((out - expected).abs().max() / expected.abs().max()).item() <= 1e-5


def test_a_group_does_not_see_other_groups_nor_tokens_behind_its_prefix() -> None:
    call = comb(4, 30)
    first = comb_attention_(torch.empty_like(call["q"]), **call)
    call["k"][4:8] += 1  # the second group's own keys
    slot = int(call["block_table"][0, 32 // 16]), 32 % 16  # the token behind the prefix of groups 0 .. 2
    call["key_cache"][slot] += 1
    second = comb_attention_(torch.empty_like(call["q"]), **call)
    changed = (first != second).flatten(1).any(1)
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4 + [True] * 8


def test_prefix_lengths_change_without_a_new_layout() -> None:
    call = comb(2, 30)
    for lengths in ([0, 1, 2], [15, 16, 17], [30, 31, 32]):
        call["layout"].prefix_len.copy_(torch.tensor(lengths))
        found = comb_attention_(torch.empty_like(call["q"]), **call)
        expected = comb_attention_reference(CombInputs(**{**call, **{name: call[name].double() for name in "qkv"}}))
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def operation(call: dict[str, Any], out: torch.Tensor) -> tuple[Any, ...]:
    layout = call["layout"]
    tensors = [call[name] for name in ("q", "k", "v", "key_cache", "value_cache", "block_table")]
    rows = (layout.prefix_len, layout.group_start, layout.group_of_row, layout.row_start, layout.max_rows)
    return (out, *tensors, *rows, call["scale"], 0, 0.0, None, None, None, 0)


def test_operation_keeps_torchs_contract() -> None:
    call = comb(2, 20)
    torch.library.opcheck(
        torch.ops.vllm_mtp.comb_attention_.default,
        operation(call, torch.zeros_like(call["q"])),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_into_one_graph() -> None:
    call = comb(2, 20)
    expected = comb_attention_(torch.empty_like(call["q"]), **call)

    def attend(out: torch.Tensor) -> torch.Tensor:
        return comb_attention_(out, **call) * 2

    found = torch.compile(attend, fullgraph=True, backend="aot_eager")(torch.empty_like(call["q"]))
    assert torch.equal(found, expected * 2)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_a_captured_graph_reads_prefix_lengths_anew() -> None:
    call = comb(4, 300)
    out = torch.empty_like(call["q"])
    comb_attention_(out, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        comb_attention_(out, **call)
    for prefix in (0, 77, 300):
        call["layout"].prefix_len.copy_(torch.arange(prefix, prefix + 5))
        out.fill_(float("nan"))
        graph.replay()
        expected = comb_attention_reference(CombInputs(**{**call, **{name: call[name].double() for name in "qkv"}}))
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(6, 3, 64)}, "do not fit"),
        ({"q": torch.randn(6, 4, 64).half()}, "one float type"),
        ({"key_cache": torch.randn(2, 16, 2, 64)}, "is not"),
        ({"value_cache": torch.randn(2, 16, 1, 128)[..., ::2]}, "contiguous"),
        ({"key_cache": torch.randn(2, 16, 1, 64).half()}, "does not serve"),
        ({"block_table": torch.zeros(2, 2, dtype=torch.int32)}, "1 requests in the layout"),
        ({"sinks": torch.zeros(3)}, "sinks"),
        ({"kept": 32}, "cannot be kept in view"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    call = {**comb(2, 20), **change}
    with pytest.raises(ValueError, match=message):
        comb_attention_(torch.empty(6, 4, 64, device=DEVICE), **call)


def test_heads_above_256_are_refused() -> None:
    call = comb(2, 20, head_size=320)
    with pytest.raises(ValueError, match="320"):
        comb_attention_(torch.empty_like(call["q"]), **call)


def test_groups_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="order"):
        CombLayout.of([1, 0], [2, 2], [5, 5], 2, DEVICE)


@pytest.mark.parametrize(("k", "requests"), [(4, 1), (8, 1), (4, 8), (8, 32)])
def test_decode_of_an_8b_model_fills_the_gpu(k: int, requests: int) -> None:
    config = choose_config(k * (k + 1), 32, 8, 128, requests, 32768, 132, 2)
    programs = -(-k * (k + 1) * 4 // config.bq) * 8 * requests * config.splits
    assert programs >= 0.7 * 132
    assert config.splits == 1 or programs <= 2 * 132
