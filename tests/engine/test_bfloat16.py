"""bfloat16 on a CPU, where linear layers run on a kernel of ours: the weights are those of the base, also after they changed."""

from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.layers.linear import LinearBase
from vllm_mtp.kernels.cpu import has_linear

from vllm_mtp import demo
from vllm_mtp.cpu_linear import PanelLinear

from .conftest import Engine, Engines, speculative
from .feature_models import retrained_base

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not has_linear(), reason="the processor has no AVX-512 BF16")]
PROMPTS = demo.prompts()[:8]
BFLOAT16: dict[str, Any] = {"dtype": "bfloat16"}


def one_by_one(engine: Engine) -> list[list[int]]:
    return engine.greedy(PROMPTS, 48, at_once=1)


def same(found: list[list[int]], wanted: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.full)])
def test_answers_are_plains_and_those_of_reloaded_weights(engines: Engines, tmp_path: Path, eager: bool) -> None:
    """One request at a time plain vLLM runs one row, and ours sums each of its rows just so; what is left are attention kernels,
    which round by the number of rows: at most one prompt of eight may differ."""
    ours, retrained = speculative(demo.ADAPTER, 4), retrained_base(tmp_path / "base")
    plain = one_by_one(engines(enforce_eager=eager, **BFLOAT16))
    wanted = one_by_one(engines(ours, enforce_eager=eager, model=str(retrained), **BFLOAT16))
    engine = engines(ours, enforce_eager=eager, **BFLOAT16)
    layers = [layer for layer in engine.runner.model.modules() if isinstance(layer, LinearBase)]
    assert len(layers) == 16
    assert all(isinstance(layer.cpu_linear, PanelLinear) and not layer.weight.numel() for layer in layers)

    found, per_forward = engine.forwards(lambda: one_by_one(engine))
    assert per_forward > 1.8
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(retrained)})
    reloaded = one_by_one(engine)
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(demo.BASE)})
    again = one_by_one(engine)
    assert same(found, plain) >= 7
    assert again == found
    assert reloaded == wanted
    assert same(reloaded, found) < 7
