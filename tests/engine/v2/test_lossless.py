"""On the V2 runner too, output is plain vLLM's: greedy token by token, sampled in distribution. fp32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.worker.cpu.model_runner import CPUModelRunner

from tests.architectures import ARCHITECTURES
from tests.engine import test_lossless_sampled as sampled
from tests.engine.conftest import Engine, Engines, speculative
from tests.engine.feature_models import random_adapter_for, random_model
from tests.foreign_models import noise_lora
from vllm_mtp import demo
from vllm_mtp.runner.v2 import MaskTokenSpeculator

pytestmark = pytest.mark.engine
SMALL: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 320}
Plain = Callable[[int, int], list[list[int]]]


@pytest.fixture(scope="module")
def plain(engines: Engines, prompts: list[str]) -> Plain:
    """(number of prompts, tokens) -> what plain vLLM gives on this runner."""
    known: dict[tuple[int, int], list[list[int]]] = {}

    def outputs(count: int, tokens: int) -> list[list[int]]:
        if (count, tokens) not in known:
            known[count, tokens] = engines(**SMALL).greedy(prompts[:count], tokens)
        return known[count, tokens]

    return outputs


def speculating(engines: Engines, config: dict[str, Any], **options: Any) -> Engine:
    engine = engines(config, **{**SMALL, **options})
    assert isinstance(engine.runner, CPUModelRunner)  # V2
    assert isinstance(engine.runner.speculator, MaskTokenSpeculator)
    return engine


# 24 mask rows are a comb of 4 for one request and one of 2 for four: drafts, rows and layout follow the batch.
@pytest.mark.parametrize(("k", "layout", "budget"), [(8, "quadratic", None), (4, "auto", 24), (2, (2, 1, 1), None)])
def test_greedy(engines: Engines, prompts: list[str], plain: Plain, k: int, layout: Any, budget: int | None) -> None:
    expected = plain(4, 24)
    engine = speculating(engines, speculative(demo.ADAPTER, k, layout, max_mask_rows=budget))
    outputs, per_forward = engine.forwards(lambda: engine.greedy(prompts[:4], 24))
    assert outputs == expected
    assert per_forward > 1.4


def test_random_adapter(engines: Engines, prompts: list[str], plain: Plain, random_adapter: Path) -> None:
    expected = plain(4, 24)
    assert speculating(engines, speculative(random_adapter, 4)).greedy(prompts[:4], 24) == expected


@pytest.mark.usefixtures("asynchronous")
def test_asynchronous_scheduling(engines: Engines, prompts: list[str], plain: Plain) -> None:
    expected = plain(4, 24)
    engines.close()
    # Prompts come in chunks of as many rows as a decode, and the cache is so small that requests preempt each other.
    engine = speculating(
        engines,
        speculative(demo.ADAPTER, 4),
        block_size=32,
        num_gpu_blocks_override=11,
        long_prefill_token_threshold=5,
        enable_prefix_caching=True,
    )
    assert isinstance(engine.llm.llm_engine.engine_core.engine_core.scheduler, AsyncScheduler)
    preempted = engine.metric("vllm:num_preemptions")
    outputs, per_forward = engine.forwards(lambda: engine.greedy(prompts[:4], 24))
    assert outputs == expected
    assert per_forward > 1.4
    assert engine.metric("vllm:num_preemptions") > preempted
    hits = engine.metric("vllm:prefix_cache_hits")
    assert engine.greedy(prompts[:2], 24) == expected[:2]
    assert engine.metric("vllm:prefix_cache_hits") > hits
    engines.close()


def test_up_to_the_models_length(engines: Engines, prompts: list[str]) -> None:
    options = {**SMALL, "max_model_len": 56}
    short = [prompt[-90:] for prompt in prompts[:3]]
    expected = engines(**options).greedy(short, 100, ignore_eos=True)
    assert speculating(engines, speculative(demo.ADAPTER, 8), **options).greedy(short, 100, ignore_eos=True) == expected


@pytest.mark.full
def test_sampled_tokens_have_plains_distribution(engines: Engines, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against plain vLLM on the V1 runner, which needs no interpreter and can give as many samples as before."""

    def sample(engine: Engine, seed: int, samples: int, temperature: float = 1.0) -> sampled.Counts:
        monkeypatch.setattr(sampled, "SAMPLES", samples)
        return sampled.sample(engine, prompts[1], seed, temperature, top_p=1.0)  # vLLM's top-p kernel is not for the interpreter

    monkeypatch.setattr(sampled, "TOKENS", 2)
    options = {**SMALL, "max_num_seqs": 50}
    with monkeypatch.context() as v1:
        v1.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        engines.close()
        plain = sample(engines(**options), 1, 2000)
        few = sample(engines(**options), 2, 100)
        cooler = sample(engines(**options), 3, 100, temperature=0.5)
        engines.close()
    engine = speculating(engines, speculative(demo.ADAPTER, 2), **options)
    ours, per_forward = engine.forwards(lambda: sample(engine, 4, 100))
    engine = speculating(engines, speculative(demo.ADAPTER, 2, draft_sample_method="probabilistic"), **options)
    drawn, drawn_per_forward = engine.forwards(lambda: sample(engine, 5, 100))
    found = {"floor": few, "ours": ours, "ours, probabilistic drafts": drawn, "cooler": cooler}
    values = {name: sampled.smallest([plain], [other]) for name, other in found.items()}
    print(", ".join(f"p({name} = plain) = {value:.3g}" for name, value in values.items()))
    assert per_forward > 1.01
    assert drawn_per_forward > 1.01
    assert values["floor"] > 1e-3
    assert values["ours"] > 1e-3
    assert values["ours, probabilistic drafts"] > 1e-3
    assert values["cooler"] < 1e-3


@pytest.mark.full
@pytest.mark.parametrize("name", ["gemma3", "olmo2", "phi3", "qwen3_moe"])
def test_other_architectures(engines: Engines, prompts: list[str], tmp_path: Path, name: str) -> None:
    base = random_model(tmp_path / "base", **ARCHITECTURES[name].config)
    expected = engines(model=str(base), **SMALL).greedy(prompts[:4], 16, ignore_eos=True)
    adapter = random_adapter_for(base, tmp_path / "adapter")
    engine = speculating(engines, speculative(adapter, 2), model=str(base))
    assert engine.greedy(prompts[:4], 16, ignore_eos=True) == expected


@pytest.mark.full
def test_foreign_weights(engines: Engines, prompts: list[str], plain: Plain, tmp_path: Path) -> None:
    expected = plain(4, 24)
    adapter = noise_lora(demo.BASE, tmp_path / "uno")
    engine = speculating(engines, speculative(adapter, 2, mask_token_id=2048))
    assert engine.greedy(prompts[:4], 24) == expected
