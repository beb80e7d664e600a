"""What steps cost, from one start of a server to the next: kept where it can be, and never believed where it makes no sense."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_mtp import cost_cache
from vllm_mtp.cost_cache import MOST_BYTES, NUM_TERMS, CostCache
from vllm_mtp.forecast import Batch, StepCost
from vllm_mtp.load import LoadControl

FACTS = {"configuration": "abc", "threads": 2}
TERMS = [0.002, 1e-4, 2e-5, 3e-4, 0.0, -1e-6, 1e-6, 3e-5]


@pytest.fixture(autouse=True)
def at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_cache, "SECONDS", 0.0)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(cost_cache.logger, "warning", lambda text, *of: found.append(text % of))
    return found


def test_a_server_knows_what_steps_cost_the_one_before_it(tmp_path: Path) -> None:
    before = StepCost()
    before.observe(Batch(4, 4, 100), 0.010)
    before.observe(Batch(4, 40, 100), 0.025)
    CostCache(FACTS, tmp_path).keep(list(before.terms))
    terms = CostCache(FACTS, tmp_path).read()
    assert terms is not None
    control = LoadControl(8, cost=StepCost(terms))
    for batch in (Batch(1, 1), Batch(4, 40, 100), Batch(16, 200, 3000)):
        assert control.cost.predict(batch) == pytest.approx(before.predict(batch))
    assert control.cost.is_fitted
    assert CostCache({**FACTS, "threads": 3}, tmp_path).read() is None


def test_what_was_kept_is_soon_corrected_where_it_is_wrong() -> None:
    cost = StepCost([100 * term for term in TERMS])
    for _ in range(4):
        cost.observe(Batch(4, 4, 100), 0.010)
        cost.observe(Batch(4, 40, 100), 0.025)
    assert cost.predict(Batch(4, 40, 100)) == pytest.approx(0.025, rel=0.02)
    assert cost.predict(Batch(4, 4, 100)) == pytest.approx(0.010, rel=0.02)


def _text(**changes: Any) -> bytes:
    return json.dumps({"facts": FACTS, "terms": TERMS, **changes}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        _text()[:-9],
        _text(terms=TERMS[1:]),
        _text(terms=[float("nan"), *TERMS[1:]]),
        _text(terms=[0.0] * NUM_TERMS),
        _text(terms=[1e300, *TERMS[1:]]),
        _text(terms=["1", *TERMS[1:]]),
        _text(more=1),
        _text(facts={"x": "y" * MOST_BYTES}),
    ],
)
def test_a_file_that_makes_no_sense_is_named_and_left(tmp_path: Path, warnings: list[str], content: bytes) -> None:
    cache = CostCache(FACTS, tmp_path)
    cache.path.parent.mkdir(parents=True)
    cache.path.write_bytes(content)
    assert cache.read() is None
    assert len(warnings) == 1
    assert str(cache.path) in warnings[0]
    cache.keep(TERMS)
    assert cache.read() == TERMS


def test_a_folder_that_cannot_be_written_is_named_once(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "vllm_mtp").write_text("in the way")
    cache = CostCache(FACTS, tmp_path)
    for _ in range(3):
        cache.keep(TERMS)
    assert len(warnings) == 1
    assert str(cache.path) in warnings[0]


def test_it_is_not_written_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_cache, "SECONDS", 1000.0)
    cache = CostCache(FACTS, tmp_path)
    cache.keep(TERMS)
    assert not cache.path.exists()
    cache.next_write = 0.0
    cache.keep(TERMS)
    assert cache.read() == TERMS
    cache.keep([1.0] * NUM_TERMS)
    assert cache.read() == TERMS
    assert list(cache.path.parent.iterdir()) == [cache.path]
