"""bfloat16 on a CPU, where linear layers run on a kernel of ours: the weights are those of the base, also after they changed."""

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.model_executor.layers.linear import LinearBase
from vllm_mtp.kernels.cpu import has_linear

from vllm_mtp import demo
from vllm_mtp.cpu_linear import PanelLinear

from .conftest import Engine, Engines, speculative
from .feature_models import retrained_base

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not has_linear(), reason="the processor has neither AVX-512 nor AVX2")]
PROMPTS = demo.prompts()[:8]
BFLOAT16: dict[str, Any] = {"dtype": "bfloat16"}


def one_by_one(engine: Engine) -> list[list[int]]:
    return engine.greedy(PROMPTS, 48, at_once=1)


NEAR_TIE = 0.13
"""Between the log-probabilities of the two best tokens: two steps of bfloat16 in logits from 8 to 16."""


def margins(engine: Engine) -> list[list[float]]:
    """How far ahead the best token is of the second one, at every token of `one_by_one`."""
    params, found = SamplingParams(temperature=0.0, max_tokens=48, logprobs=2), []
    for prompt in PROMPTS:
        (output,) = engine.llm.generate([prompt], params, use_tqdm=False)
        best = [sorted(each.logprob for each in of.values())[-2:] for of in output.outputs[0].logprobs or ()]
        found.append([first - second for second, first in best])
    return found


def margins_where_they_part(found: list[list[int]], plain: list[list[int]], of_plain: list[list[float]]) -> list[float]:
    """Plain vLLM's margin at the first token in which answers differ, of those that do."""

    def first_difference(one: list[int], other: list[int]) -> int | None:
        return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)

    places = map(first_difference, found, plain)
    return [margins[i] for i, margins in zip(places, of_plain, strict=True) if i is not None]


def same(found: list[list[int]], wanted: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.full)])
def test_answers_are_plains_and_those_of_reloaded_weights(engines: Engines, tmp_path: Path, eager: bool) -> None:
    """Where answers part, plain vLLM's two best tokens are nearly tied: what differs is the order of sums, of attention and, on
    processors without AVX-512, of linear layers."""
    ours, retrained = speculative(demo.ADAPTER, 4), retrained_base(tmp_path / "base")
    engine = engines(enforce_eager=eager, **BFLOAT16)
    plain, of_plain = one_by_one(engine), margins(engine)
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
    assert all(margin < NEAR_TIE for margin in margins_where_they_part(found, plain, of_plain))
    assert same(found, plain) >= 4
    assert again == found
    assert reloaded == wanted
    assert same(reloaded, found) < 7
