"""Mask rows on the kernel for GPUs, beside the rows that the server's backend serves; no engine, and the kernel's reference."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_mtp.kernels.comb_attention import CombInputs, CombLayout, comb_attention_reference

from vllm_mtp.gpu_attention import GpuCombAttention
from vllm_mtp.layout import plan_groups, shapes_of
from vllm_mtp.mask_attention import KEPT, view
from vllm_mtp.plan import EngineStep

HEADS, KV_HEADS, SIZE, BLOCK, K = 4, 2, 16, 8, 2


class Backend:
    """An attention layer of vLLM whose backend marks the rows that it is asked for."""

    def __init__(self, cache_dtype: str = "auto") -> None:
        self.head_size, self.sliding_window, self.kv_cache_dtype = SIZE, None, cache_dtype
        self._q_scale, self._k_scale, self._v_scale = torch.tensor(0.5), torch.tensor(2.0), torch.tensor(3.0)
        self.impl = SimpleNamespace(forward=self.attend, do_kv_cache_update=self.write, scale=SIZE**-0.5, logits_soft_cap=None)
        self.written: list[tuple[int, int, list[int]]] = []

    def attend(self, layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any, output: Any) -> torch.Tensor:
        if metadata is not None:
            output[: metadata.num_actual_tokens] = 7
        return output

    def write(self, layer: Any, key: torch.Tensor, value: torch.Tensor, cache: Any, slots: torch.Tensor) -> None:
        self.written.append((len(key), len(value), slots.tolist()))


def step(cache_dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Two requests that verify K drafts each behind 19 and 4 tokens, and a cache for them."""
    torch.manual_seed(0)
    num_rows, request_len = (K + 1, K + 1), torch.tensor([19, 4])
    groups = plan_groups(num_rows, shapes_of((K,) * (K + 1), (K, K)), K, 99, 99, BLOCK, torch.device("cpu"))
    assert groups is not None
    rows = sum(num_rows) + groups.num_rows
    table = torch.tensor([[4, 1, 3], [2, 0, 0]], dtype=torch.int32)
    return {
        "groups": groups,
        "step": EngineStep(num_rows, (), request_len, 19, table),
        "query": torch.randn(rows, HEADS, SIZE),
        "key": torch.randn(rows, KV_HEADS, SIZE),
        "value": torch.randn(rows, KV_HEADS, SIZE),
        "cache": torch.randn(5, KV_HEADS, BLOCK, 2 * SIZE).to(cache_dtype),
    }


def expected(given: dict[str, Any], query: torch.Tensor, **scales: torch.Tensor) -> torch.Tensor:
    keys, values = given["cache"].transpose(1, 2).split(SIZE, -1)
    lengths = [17, 18, 19, 2, 3, 4]  # behind the last token, and behind each draft that may be accepted
    layout = CombLayout.of([0] * 3 + [1] * 3, [K] * 6, lengths, 2, torch.device("cpu"))
    own = given["key"][6:], given["value"][6:]
    return comb_attention_reference(
        CombInputs(query[6:], *own, keys, values, given["step"].block_table, layout, SIZE**-0.5, **scales)
    )


def test_a_window_of_mask_rows_is_no_wider_than_the_layers() -> None:
    assert view(0, None) == (0, 0)
    assert view(64, None) == (64, 0)
    assert view(0, 64) == (64, KEPT)
    assert view(128, 64) == (64, KEPT)
    assert view(32, 64) == (32, 0)


@pytest.mark.parametrize("quantized", [False, True])
def test_mask_rows_follow_the_backends_rows(quantized: bool) -> None:
    layer, attention = Backend("fp8" if quantized else "auto"), GpuCombAttention()
    attention.wrap(layer)
    given = step(torch.float8_e4m3fn if quantized else torch.float32)
    groups, engine_step = given["groups"], given["step"]
    planned = attention.plan(groups, groups.prefix_len(engine_step.request_len), engine_step, BLOCK, 5)
    query = given["query"].to(torch.float8_e4m3fn) if quantized else given["query"]
    output = torch.zeros_like(given["query"])
    attention.begin(planned, attention.prepare(planned))
    layer.impl.do_kv_cache_update(layer, given["key"], given["value"], given["cache"], torch.arange(8))
    layer.impl.forward(
        layer, query, given["key"], given["value"], given["cache"], SimpleNamespace(num_actual_tokens=8), output=output
    )
    attention.end()
    assert layer.written == [(6, 6, [0, 1, 2, 3, 4, 5])]
    assert (output[:6] == 7).all()
    scales = {"k_scale": layer._k_scale, "v_scale": layer._v_scale} if quantized else {}
    torch.testing.assert_close(output[6:], expected(given, query.float() * (0.5 if quantized else 1), **scales))


def test_other_steps_are_the_backends() -> None:
    layer, attention = Backend(), GpuCombAttention()
    attention.wrap(layer)
    given, output = step(), torch.zeros(18, HEADS, SIZE)
    layer.impl.do_kv_cache_update(layer, given["key"], given["value"], given["cache"], torch.arange(4))
    layer.impl.forward(
        layer, *(given[name] for name in ("query", "key", "value", "cache")), SimpleNamespace(num_actual_tokens=4), output=output
    )
    assert layer.written == [(18, 18, [0, 1, 2, 3])]
    assert (output[:4] == 7).all()
    assert not output[4:].any()
