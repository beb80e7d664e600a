"""Probabilistic drafts: more of them are accepted above temperature 0, and nothing else changes. fp32.

That the output keeps its distribution is in test_lossless_sampled.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
from vllm import SamplingParams

from vllm_mtp import demo

from .conftest import Engine, Engines, speculative

pytestmark = pytest.mark.engine
PROMPTS = 16


def probabilistic(engines: Engines, **options: Any) -> Engine:
    return engines(speculative(demo.ADAPTER, 4, draft_sample_method="probabilistic"), **options)


def sampled(engine: Engine, prompts: list[str], temperatures: list[float], max_tokens: int, seeded: bool = True) -> list[list[int]]:
    """Tokens of each prompt at its own temperature."""
    params = [
        SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=i if seeded else None)
        for i, temperature in enumerate(temperatures)
    ]
    return [list(output.outputs[0].token_ids) for output in engine.llm.generate(prompts, params, use_tqdm=False)]


def test_greedy_requests_are_plains_alone_and_beside_others(
    engines: Engines, prompts: list[str], plain: Callable[[int, int], list[list[int]]]
) -> None:
    expected = plain(PROMPTS, 48)
    engine = probabilistic(engines)
    assert engine.greedy(prompts[:PROMPTS], 48) == expected
    mixed = sampled(engine, prompts[:PROMPTS], [0.0, 1.0] * (PROMPTS // 2), 48)
    assert mixed[::2] == expected[::2]
    assert mixed[1::2] != expected[1::2]


def test_seeded_requests_give_the_same_again(engines: Engines, prompts: list[str]) -> None:
    engine = probabilistic(engines)
    outputs = [sampled(engine, prompts[:4], [1.0, 0.0, 0.7, 1.3], 48) for _ in range(2)]
    assert outputs[0] == outputs[1]
    unseeded = [sampled(engine, prompts[:4], [1.0] * 4, 48, seeded=False) for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_more_drafts_are_accepted_at_temperature_1(engines: Engines, prompts: list[str]) -> None:
    def tokens_per_forward(engine: Engine) -> float:
        return engine.forwards(lambda: sampled(engine, prompts[:PROMPTS], [1.0] * PROMPTS, 96))[1]

    ours = tokens_per_forward(probabilistic(engines))
    greedy = tokens_per_forward(engines(speculative(demo.ADAPTER, 4)))
    print(f"tokens a forward at temperature 1: {ours:.2f}, with greedy drafts {greedy:.2f}")
    assert ours > 1.1 * greedy


@pytest.mark.full
def test_compiled(engines: Engines, prompts: list[str], plain: Callable[[int, int], list[list[int]]]) -> None:
    expected = plain(PROMPTS, 48)
    engine = probabilistic(engines, enforce_eager=False)
    assert engine.greedy(prompts[:PROMPTS], 48) == expected
    assert sampled(engine, prompts[:PROMPTS], [0.0, 1.0] * (PROMPTS // 2), 48)[::2] == expected[::2]
    assert engine.forwards(lambda: sampled(engine, prompts[:PROMPTS], [1.0] * PROMPTS, 96))[1] > 1.4
