"""Probabilistic drafts on the V2 runner: nothing but the number of accepted drafts changes. fp32.

That the output keeps its distribution is in test_lossless.py.
"""

from typing import Any

import pytest

from tests.engine.conftest import Engine, Engines, speculative
from tests.engine.test_probabilistic_drafts import sampled
from vllm_mtp import demo

pytestmark = pytest.mark.engine
SMALL: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 320}


def drafting(engines: Engines) -> Engine:
    return engines(speculative(demo.ADAPTER, 4, draft_sample_method="probabilistic"), **SMALL)


def test_greedy_requests_are_plains_and_seeded_ones_repeat(engines: Engines, prompts: list[str]) -> None:
    expected = engines(**SMALL).greedy(prompts[:4], 16)
    engine = drafting(engines)
    assert engine.greedy(prompts[:4], 16) == expected
    mixed, again = (sampled(engine, prompts[:4], [0.0, 1.0, 0.7, 0.0], 16) for _ in range(2))
    assert mixed == again
    assert (mixed[0], mixed[3]) == (expected[0], expected[3])


def test_steps_without_masks_leave_no_distribution_behind(
    engines: Engines, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = drafting(engines)
    assert engine.forwards(lambda: sampled(engine, prompts[:4], [1.0] * 4, 16))[1] > 1
    monkeypatch.setattr(engine.runner.speculator, "_lengths", lambda num_requests: (0,) * 5)
    # Token 0 is drafted for all. With the distribution of the drafts before it, under which it is impossible, it would be accepted.
    assert engine.forwards(lambda: sampled(engine, prompts[:4], [1.0] * 4, 6))[1] == 1
