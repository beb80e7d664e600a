"""The benchmark's second forward gives the drafts that the full comb gives, and what is decoded is what plain vLLM decodes."""

import pytest

from benchmarks.two_forwards import two_forwards
from vllm_mtp import demo

from .conftest import Engines, speculative

pytestmark = pytest.mark.engine
K = 4


@pytest.mark.parametrize("at_once", [1, 5])
def test_a_forward_of_their_own_gives_the_same_drafts(engines: Engines, prompts: list[str], at_once: int) -> None:
    expected = engines().greedy(prompts[:5], 40, ignore_eos=True)
    engine = engines(speculative(demo.ADAPTER, K))
    shared = engine.forwards(lambda: engine.greedy(prompts[:5], 40, at_once=at_once, ignore_eos=True))
    counters = engine.proposer.planner.counters
    masks = counters.mask_rows
    with two_forwards(engine.proposer, K) as own:
        apart = engine.forwards(lambda: engine.greedy(prompts[:5], 40, at_once=at_once, ignore_eos=True))
    assert own.forwards > 40 / (K + 1)
    assert apart == shared
    assert apart[0] == expected
    assert 0 < counters.mask_rows - masks <= own.forwards * at_once * K
    assert engine.greedy(prompts[:5], 40, ignore_eos=True) == expected
