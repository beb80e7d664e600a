"""Acceptance by confidence on the V2 runner, where the host does not know what is taken. fp32.

The server takes nothing without a match of itself (tau = 2), so that every request says what it wants.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from tests.engine.conftest import Engine, Engines
from tests.engine.test_confidence import SERVER, ask, tokens
from tests.engine.test_failures import failing
from vllm_mtp import breaker, demo
from vllm_mtp.confidence import DraftedRequests
from vllm_mtp.reference import ReferenceModel

from .test_lossless import SMALL, speculating

pytestmark = pytest.mark.engine
K = 4
MIXED: list[dict[str, Any] | None] = [{"mtp_tau": 0}, None, {"mtp_tau": 0.3}, {"mtp_tau": 1.5}, None, {"mtp_tau": 0}]
LOSSY = [0, 2, 5]
LOSSLESS = [1, 3, 4]


@pytest.fixture(scope="module")
def expected(engines: Engines, prompts: list[str]) -> list[list[int]]:
    """What plain vLLM gives."""
    return engines(**SMALL).greedy(prompts[: len(MIXED)], 16, ignore_eos=True)


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    return ReferenceModel.from_folder(demo.BASE, demo.ADAPTER)


@pytest.fixture
def lossy(expected: list[list[int]], engines: Engines) -> Iterator[Engine]:
    """The server; whatever ended speculation in a test is forgotten after it."""
    engine = speculating(engines, SERVER)
    opened, before = engine.runner.speculator.breaker, breaker.failures.copy()
    yield engine
    opened.cause, breaker.failures[:] = None, before


def asking(engine: Engine, prompts: list[str], asked: list[dict[str, Any] | None], **sampling: Any) -> list[list[int]]:
    return tokens(ask(engine, list(prompts[: len(asked)]), asked, **{"max_tokens": 16, "ignore_eos": True, **sampling}))


def alone(engine: Engine, prompts: list[str]) -> list[list[int]]:
    """Answers of the requests of `MIXED` that take drafts, one after the other."""
    return [asking(engine, [prompts[i]], [MIXED[i]])[0] for i in LOSSY]


def test_above_1_is_lossless(expected: list[list[int]], lossy: Engine, prompts: list[str]) -> None:
    found, per_forward = lossy.forwards(lambda: asking(lossy, prompts, [None, {"mtp_tau": 1.0000001}] * 2))
    assert found == expected[:4]
    assert per_forward > 1.4


@pytest.mark.parametrize("tau", [0, 0.6])
def test_answers_are_the_references(
    expected: list[list[int]], lossy: Engine, prompts: list[str], reference: ReferenceModel, tau: float
) -> None:
    answers = [reference.decode(lossy.encode(prompt), 16, K, "quadratic", tau=tau)[0] for prompt in prompts[:2]]
    found, per_forward = lossy.forwards(lambda: asking(lossy, prompts, [{"mtp_tau": tau}] * 2))
    assert found == answers != expected[:2]
    assert per_forward == 1 + K if tau == 0 else 1 < per_forward < 1 + K


def test_requests_ask_for_themselves(expected: list[list[int]], lossy: Engine, prompts: list[str]) -> None:
    """Six requests in four places: some have a place in which another one has asked for something else."""
    found = asking(lossy, prompts, MIXED)
    assert [i for i, (own, greedy) in enumerate(zip(found, expected, strict=True)) if own == greedy] == LOSSLESS
    assert [found[i] for i in LOSSY] == alone(lossy, prompts)


@pytest.mark.usefixtures("asynchronous")
def test_asynchronous_scheduling(expected: list[list[int]], engines: Engines, lossy: Engine, prompts: list[str]) -> None:
    """A preempted request goes on with a token of the target's own, where another may have been taken; alone none is preempted."""
    synchronous = alone(lossy, prompts)
    engines.close()
    engine = speculating(engines, SERVER, block_size=32, num_gpu_blocks_override=11, long_prefill_token_threshold=5)
    assert isinstance(engine.llm.llm_engine.engine_core.engine_core.scheduler, AsyncScheduler)
    preempted = engine.metric("vllm:num_preemptions")
    found = asking(engine, prompts, MIXED)
    assert engine.metric("vllm:num_preemptions") > preempted
    assert [found[i] for i in LOSSLESS] == [expected[i] for i in LOSSLESS]
    assert [found[i] for i in LOSSY] != [expected[i] for i in LOSSY]
    assert alone(engine, prompts) == synchronous
    engines.close()


ALLOWED = list(range(5, 1500, 3))


@pytest.mark.parametrize("sampling", [{"allowed_token_ids": ALLOWED}, {"bad_words": ["self", " self", "return", " return"]}])
def test_a_forbidden_token_is_never_taken(lossy: Engine, prompts: list[str], sampling: dict[str, Any]) -> None:
    found, per_forward = lossy.forwards(lambda: ask(lossy, list(prompts[:4]), [{"mtp_tau": 0}] * 4, max_tokens=21, **sampling))
    for completion in found:
        assert set(completion.token_ids) <= set(sampling.get("allowed_token_ids", completion.token_ids))
        assert not any(word in completion.text for word in sampling.get("bad_words", []))
    assert per_forward > 1  # beside drafts that were accepted


def test_logprobs_are_the_targets(lossy: Engine, prompts: list[str], reference: ReferenceModel) -> None:
    (completion,) = ask(lossy, [prompts[0]], [{"mtp_tau": 0}], max_tokens=11, ignore_eos=True, logprobs=2)
    prompt, found = lossy.encode(prompts[0]), list(completion.token_ids)
    states = reference.real_states(prompt + found[:-1])[len(prompt) - 1 :]
    expected = reference.unembed(states).detach().log_softmax(-1)
    chosen = torch.tensor([logprobs[token].logprob for logprobs, token in zip(completion.logprobs, found, strict=True)])
    torch.testing.assert_close(chosen, expected.gather(1, torch.tensor(found)[:, None])[:, 0], rtol=0, atol=1e-4)
    assert (expected.argmax(-1) != torch.tensor(found)).any()  # among them tokens that verification would have rejected


def test_counts_are_vllms(lossy: Engine, prompts: list[str]) -> None:
    vllms = [f"vllm:spec_decode_num_{name}" for name in ("drafts", "draft_tokens", "accepted_tokens")]

    def count() -> list[float]:
        """vLLM's and ours of drafts, and ours of confidence."""
        found = lossy.runner.speculator.planner.counters.snapshot()
        ours = [found.drafts, sum(found.drafted), sum(found.accepted), sum(found.confident), found.unmatched, sum(found.expected)]
        return [*map(lossy.metric, vllms), *ours]

    def counted(asked: list[dict[str, Any] | None]) -> list[float]:
        before = count()
        asking(lossy, prompts, asked, max_tokens=12)
        return [new - old for new, old in zip(count(), before, strict=True)]

    *moved, confident, unmatched, expected = counted([{"mtp_tau": 0}, None, {"mtp_tau": 0.3}])
    assert moved[:3] == moved[3:]
    assert 0 < unmatched < confident < moved[2]
    assert 0 < expected < moved[1]
    *moved, confident, unmatched, _ = counted([None, {"mtp_tau": 2}])
    assert moved[:3] == moved[3:]
    assert confident == unmatched == 0


def test_what_was_not_drafted_is_not_taken(lossy: Engine, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of requests without a group are tokens all the same, and stand where likely ones stood a step before."""
    (answer,) = asking(lossy, prompts, [{"mtp_tau": 0}])
    layouts = iter([(K,) * (1 + K)] * 2)  # of the prompt's step, and of one that verifies drafts
    monkeypatch.setattr(lossy.runner.speculator, "_lengths", lambda num_requests: next(layouts, (0,) * (1 + K)))
    (found,) = asking(lossy, prompts, [{"mtp_tau": 0}])
    known = 1 + 2 * (1 + K)
    assert found[:known] == answer[:known]
    text = {"prompt_token_ids": lossy.encode(prompts[0]) + found[:known]}
    assert found[known:] == lossy.greedy([text], 16 - known, ignore_eos=True)[0] != answer[known:]


def test_a_failure_ends_it_and_nothing_else(
    expected: list[list[int]], lossy: Engine, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fails, calls = failing(DraftedRequests.certain, 2)
    monkeypatch.setattr(DraftedRequests, "certain", fails)
    found = asking(lossy, prompts, [{"mtp_tau": 0}, None])
    assert len(calls) == 3
    assert lossy.runner.speculator.breaker.cause == "taking drafts by confidence: RuntimeError: injected"
    assert found[1] == expected[1]
    assert asking(lossy, prompts, [{"mtp_tau": 0}] * 2) == expected[:2]


def test_sampled_drafts_are_taken(engines: Engines, prompts: list[str]) -> None:
    engine = speculating(engines, {**SERVER, "draft_sample_method": "probabilistic"})
    asked: list[dict[str, Any] | None] = [{"mtp_tau": 0}, {"mtp_tau": 0}]

    def sampled(temperature: float) -> tuple[list[list[int]], float]:
        return engine.forwards(lambda: asking(engine, prompts, asked, temperature=temperature, seed=5))

    found, per_forward = sampled(1.0)
    assert per_forward == 1 + K
    assert found == sampled(1.0)[0] != sampled(0.0)[0]
