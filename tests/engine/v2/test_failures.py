"""On the V2 runner too, an exception in code of ours ends speculation and nothing else, but for a graph without its plan: that ends
the engine."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engine.conftest import Engine, Engines, speculative
from tests.engine.test_failures import failing
from vllm_mtp import breaker, demo

from .test_lossless import SMALL, speculating

pytestmark = [pytest.mark.engine, pytest.mark.full]
PARTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "planning a step": (lambda speculator: speculator.planner, "plan"),
    "running a forward with mask rows": (lambda speculator: speculator.expansion, "expanded"),
    "drafting": (lambda speculator: speculator, "draft"),
}


@pytest.fixture(scope="module")
def expected(engines: Engines, prompts: list[str]) -> list[list[int]]:
    return engines(**SMALL).greedy(prompts[:3], 16)


@pytest.fixture
def engine(expected: list[list[int]], engines: Engines) -> Iterator[Engine]:
    """Speculates; whatever ended that in a test is forgotten after it."""
    engine = speculating(engines, speculative(demo.ADAPTER, 4))
    opened, before = engine.runner.speculator.breaker, breaker.failures.copy()
    yield engine
    opened.cause, breaker.failures[:] = None, before


@pytest.mark.parametrize("part", PARTS)
def test_requests_go_on(
    engine: Engine, prompts: list[str], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    owner, name = PARTS[part][0](engine.runner.speculator), PARTS[part][1]
    fails, calls = failing(getattr(owner, name), 3)
    monkeypatch.setattr(owner, name, fails)
    for _ in range(2):
        assert engine.greedy(prompts[:3], 16) == expected
    assert len(calls) == 4
    assert engine.runner.speculator.breaker.cause == f"{part}: RuntimeError: injected"
    monkeypatch.undo()
    # What V2 has scheduled it verifies: drafts are zeros now, and none of them is accepted but by chance.
    _, per_forward = engine.forwards(lambda: engine.greedy(prompts[:3], 16))
    assert per_forward < 1.1


def test_a_graph_is_never_replayed_without_its_plan(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    speculator = engine.runner.speculator

    def fails(*_: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(speculator, "_step", fails)
    with pytest.raises(RuntimeError, match="injected"):
        speculator._plan(None, None, replayed=True, capture=False)
    assert not speculator.breaker.is_open
    assert speculator._plan(None, None, replayed=False, capture=False) is None
    assert speculator.breaker.is_open
