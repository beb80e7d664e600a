"""What steps cost goes from one start of a server to the next. fp32."""

from pathlib import Path

import pytest

from vllm_mtp import cost_cache, demo

from .conftest import Engines, speculative

pytestmark = pytest.mark.engine


def test_a_server_begins_with_what_the_one_before_it_found(
    engines: Engines, prompts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(cost_cache, "SECONDS", 0.0)
    engines.close()
    engine = engines(speculative(demo.ADAPTER, 4, "auto"))
    assert not engine.proposer.control.cost.is_fitted
    expected = engine.greedy(prompts[:4], 64)
    found = list(engine.proposer.control.cost.terms)
    engines.close()
    (file,) = tmp_path.rglob("step_cost/*.json")
    engine = engines(speculative(demo.ADAPTER, 4, "auto"))
    control = engine.proposer.control
    assert control.cost.is_fitted
    assert list(control.cost.terms) == pytest.approx(found)
    assert engine.greedy(prompts[:4], 64) == expected
    assert list(tmp_path.rglob("step_cost/*.json")) == [file]
    engines.close()
    engine = engines(speculative(demo.ADAPTER, 2, "auto"))  # another configuration
    assert not engine.proposer.control.cost.is_fitted
    engines.close()
