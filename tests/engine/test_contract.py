"""The whole matrix of losslessness: 100 prompts of 128 tokens in every mode. Takes an hour; `make test-full` runs it. fp32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_mtp import demo

from .conftest import Engines, speculative

Plain = Callable[[int, int], list[list[int]]]
pytestmark = [pytest.mark.engine, pytest.mark.full]

every_k_and_layout = [
    pytest.mark.parametrize("layout", ["quadratic", "linear"]),
    pytest.mark.parametrize("k", [1, 4, 8]),
]


def everywhere(test: Any) -> Any:
    """Runs a test for each k and layout."""
    for mark in every_k_and_layout:
        test = mark(test)
    return test


@everywhere
@pytest.mark.parametrize("eager", [True, False])
def test_one_and_sixteen_clients(engines: Engines, prompts: list[str], plain: Plain, k: int, layout: str, eager: bool) -> None:
    expected = plain(100, 128)
    engine = engines(speculative(demo.ADAPTER, k, layout), enforce_eager=eager)
    assert engine.greedy(prompts[:100], 128) == expected
    assert engine.greedy(prompts[:100], 128, at_once=1) == expected


@everywhere
def test_random_weights(engines: Engines, prompts: list[str], plain: Plain, random_adapter: Path, k: int, layout: str) -> None:
    expected = plain(100, 128)
    assert engines(speculative(random_adapter, k, layout)).greedy(prompts[:100], 128) == expected


@everywhere
def test_chunked_prefill(engines: Engines, prompts: list[str], plain: Plain, k: int, layout: str) -> None:
    expected = plain(100, 128)
    engine = engines(speculative(demo.ADAPTER, k, layout), max_num_batched_tokens=96, max_num_seqs=8)
    assert engine.greedy(prompts[:100], 128) == expected


@pytest.mark.feature("prefix caching", "works", "see Limitations for multi-turn requests")
@everywhere
def test_prefix_caching(engines: Engines, prompts: list[str], plain: Plain, k: int, layout: str) -> None:
    expected = plain(100, 128)
    engine = engines(speculative(demo.ADAPTER, k, layout), enable_prefix_caching=True, block_size=32)
    assert engine.greedy(prompts[:100], 128) == expected
    hits = engine.metric("vllm:prefix_cache_hits")
    assert engine.greedy(prompts[:100], 128) == expected
    assert engine.metric("vllm:prefix_cache_hits") > hits


@everywhere
def test_preemption(engines: Engines, prompts: list[str], plain: Plain, k: int, layout: str) -> None:
    expected = plain(100, 128)
    engine = engines(speculative(demo.ADAPTER, k, layout), num_gpu_blocks_override=14, max_num_seqs=12)
    preempted = engine.metric("vllm:num_preemptions")
    assert engine.greedy(prompts[:100], 128) == expected
    assert engine.metric("vllm:num_preemptions") > preempted


def test_auto(engines: Engines, prompts: list[str], plain: Plain) -> None:
    expected = plain(100, 128)
    engine = engines(speculative(demo.ADAPTER, 8, "auto"))
    assert engine.greedy(prompts[:100], 128) == expected
    assert engine.greedy(prompts[:100], 128, at_once=1) == expected
