"""The breaker opens once; where ranks share a model, the rank ends."""

import pytest

from vllm_mtp import breaker


@pytest.fixture(autouse=True)
def failures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An empty list in the place of the process's own."""
    monkeypatch.setattr(breaker, "failures", [])
    return breaker.failures


def test_the_first_cause_stays(failures: list[str]) -> None:
    opened = breaker.Breaker(lambda: 1)
    assert not opened.is_open
    opened.trip("planning", RuntimeError("first"))
    opened.trip("drafting", RuntimeError("second"))
    assert opened.is_open
    assert failures == [opened.cause] == ["planning: RuntimeError: first"]


def test_of_several_ranks_none_goes_on_alone(failures: list[str]) -> None:
    closed = breaker.Breaker(lambda: 2)
    with pytest.raises(SystemExit):
        closed.trip("planning", RuntimeError("only here"))
    assert not closed.is_open
    assert not failures
