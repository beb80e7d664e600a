"""Greedy output equals plain vLLM's, token by token, whatever the drafts are and however the engine batches. fp32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_mtp import demo

from .conftest import Engine, Engines, speculative

Plain = Callable[[int, int], list[list[int]]]
pytestmark = pytest.mark.engine


@pytest.mark.parametrize("layout", ["quadratic", "linear"])
@pytest.mark.parametrize("k", [1, 4, 8])
def test_sixteen_at_once(engines: Engines, prompts: list[str], plain: Plain, k: int, layout: str) -> None:
    expected = plain(100, 128)
    engine = engines(speculative(demo.ADAPTER, k, layout))
    outputs, per_forward = engine.forwards(lambda: engine.greedy(prompts[:100], 128))
    assert outputs == expected
    assert per_forward > 1.2  # drafts were there to be verified


@pytest.mark.parametrize(("k", "layout"), [(1, "quadratic"), (4, "linear"), (4, "quadratic"), (8, "quadratic")])
def test_one_at_a_time(engines: Engines, prompts: list[str], plain: Plain, k: int, layout: str) -> None:
    expected = plain(100, 128)[:10]
    assert engines(speculative(demo.ADAPTER, k, layout)).greedy(prompts[:10], 128, at_once=1) == expected


@pytest.mark.parametrize("layout", [(4, 3, 2, 1, 1), (4, 0, 0, 0, 4), (2, 2, 2, 2, 2), "auto"])
def test_other_layouts(engines: Engines, prompts: list[str], plain: Plain, layout: Any) -> None:
    expected = plain(100, 128)[:24]
    assert engines(speculative(demo.ADAPTER, 4, layout)).greedy(prompts[:24], 128) == expected


def test_steps_without_drafts_are_not_verified(
    engines: Engines, prompts: list[str], plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain(100, 128)[:12]
    engine, verifications = engines(speculative(demo.ADAPTER, 4, (0,) * 5)), []
    verify = engine.runner.rejection_sampler.forward
    monkeypatch.setattr(engine.runner.rejection_sampler, "forward", lambda *a, **k: (verifications.append(1), verify(*a, **k))[1])
    assert engine.greedy(prompts[:12], 128) == expected
    assert not verifications
    assert engine.proposer.planner.counters.mask_rows == 0


@pytest.mark.parametrize("candidates", [1, 4096])
def test_candidates_change_drafts_only(engines: Engines, prompts: list[str], plain: Plain, candidates: int) -> None:
    expected = plain(100, 128)[:12]
    assert engines(speculative(demo.ADAPTER, 4, candidates=candidates)).greedy(prompts[:12], 128) == expected


@pytest.mark.parametrize("layout", ["quadratic", "linear"])
def test_random_adapter(engines: Engines, prompts: list[str], plain: Plain, random_adapter: Path, layout: str) -> None:
    expected = plain(100, 128)[:24]
    assert engines(speculative(random_adapter, 4, layout)).greedy(prompts[:24], 128) == expected


def draft_from(engine: Engine, continuation: Callable[[list[int], int], list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the drafts' tokens, not their number, by `continuation(tokens so far, number)`."""
    propose = engine.proposer.propose

    def patched(sampled: list[list[int]], num_tokens: Any, token_ids: Any, **kwargs: Any) -> list[list[int]]:
        drafts = propose(sampled, num_tokens, token_ids, **kwargs)
        return [continuation(token_ids[i, : num_tokens[i]].tolist(), len(d)) if d else d for i, d in enumerate(drafts)]

    monkeypatch.setattr(engine.proposer, "propose", patched)


@pytest.mark.parametrize("k", [4, 8])
def test_an_oracle_has_every_draft_accepted(
    engines: Engines, prompts: list[str], plain: Plain, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, tokens = 8, 1 + 12 * (k + 1)  # the prompt's forward gives one token, every other one k + 1
    expected = [output[:tokens] for output in plain(100, 128)]
    chosen = [i for i, output in enumerate(expected) if len(output) == tokens][:count]
    engine = engines(speculative(demo.ADAPTER, k))
    truth = [engine.encode(prompts[i]) + expected[i] for i in chosen]

    def continuation(so_far: list[int], number: int) -> list[int]:
        text = next(text for text in truth if text[: len(so_far)] == so_far)
        return text[len(so_far) : len(so_far) + number]

    draft_from(engine, continuation, monkeypatch)
    outputs, per_forward = engine.forwards(lambda: engine.greedy([prompts[i] for i in chosen], tokens))
    assert outputs == [expected[i] for i in chosen]
    assert per_forward == k + 1


def test_drafts_that_are_always_wrong_cost_nothing_but_time(
    engines: Engines, prompts: list[str], plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(speculative(demo.ADAPTER, 4))
    draft_from(engine, lambda so_far, number: [1] * number, monkeypatch)  # end of text, over and over
    outputs, per_forward = engine.forwards(lambda: engine.greedy(prompts[:16], 64, ignore_eos=True))
    assert outputs == engines().greedy(prompts[:16], 64, ignore_eos=True)
    assert per_forward < 1.05


@pytest.mark.feature("chunked prefill", "works")
def test_chunked_prefill_with_a_small_budget(engines: Engines, prompts: list[str], plain: Plain) -> None:
    expected = plain(100, 128)[:24]
    for k, budget in ((4, 48), (4, 256), (1, 32)):  # 48: below one prompt, and the mask rows must share it
        engine = engines(speculative(demo.ADAPTER, k), max_num_batched_tokens=budget, max_num_seqs=8)
        assert engine.greedy(prompts[:24], 128) == expected


def test_a_prompt_chunk_with_as_many_rows_as_a_decode(engines: Engines, prompts: list[str], plain: Plain) -> None:
    expected = plain(100, 128)[:4]
    engine = engines(speculative(demo.ADAPTER, 4), long_prefill_token_threshold=5, max_num_batched_tokens=128)
    assert engine.greedy(prompts[:4], 128) == expected


@pytest.mark.feature("preemption", "works")
def test_forced_preemption(engines: Engines, prompts: list[str], plain: Plain) -> None:
    expected = plain(100, 128)[:24]
    for k in (1, 8):
        # 12 requests of up to three blocks each share 14.
        engine = engines(speculative(demo.ADAPTER, k), num_gpu_blocks_override=14, max_num_seqs=12)
        preempted = engine.metric("vllm:num_preemptions")
        assert engine.greedy(prompts[:24], 128) == expected
        assert engine.metric("vllm:num_preemptions") > preempted


def test_up_to_the_models_length(engines: Engines, prompts: list[str]) -> None:
    def outputs(engine: Engine) -> list[list[int]]:
        return engine.greedy(prompts[:16], 512, ignore_eos=True)

    expected = outputs(engines(max_model_len=192))
    assert {len(engines().encode(p)) + len(o) for p, o in zip(prompts[:16], expected, strict=True)} == {192}
    for k in (4, 8):
        assert outputs(engines(speculative(demo.ADAPTER, k), max_model_len=192)) == expected


def test_compiled(engines: Engines, prompts: list[str], plain: Plain) -> None:
    expected = plain(100, 128)[:32]
    engine = engines(speculative(demo.ADAPTER, 4), enforce_eager=False)
    outputs, per_forward = engine.forwards(lambda: engine.greedy(prompts[:32], 128))
    assert outputs == expected
    assert per_forward > 1.5
    assert engine.greedy(prompts[:4], 128, at_once=1) == expected[:4]


@pytest.mark.full
@pytest.mark.parametrize("at_once", [16, 1])
@pytest.mark.parametrize(
    ("k", "layout"),
    [(1, "quadratic"), (1, "linear"), (4, "quadratic"), (4, "linear"), (8, "quadratic"), (8, "linear"), (8, "auto")],
)
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_whole_grid(engines: Engines, prompts: list[str], plain: Plain, eager: bool, k: int, layout: str, at_once: int) -> None:
    expected = plain(100, 128)
    engine = engines(speculative(demo.ADAPTER, k, layout), enforce_eager=eager)
    outputs, per_forward = engine.forwards(lambda: engine.greedy(prompts[:100], 128, at_once=at_once))
    print(f"{sum(map(len, outputs))} tokens, {per_forward:.2f} a verification")
    assert outputs == expected
    assert per_forward > 1.2
