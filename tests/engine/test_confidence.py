"""Acceptance by confidence, and what requests ask for, in real engines. fp32.

The server takes nothing without a match of itself (tau = 2), so that every request says what it wants.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import generate_latest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.metrics.prometheus import get_prometheus_registry

from vllm_mtp import demo
from vllm_mtp.reference import ReferenceModel

from .conftest import Engine, Engines, speculative

pytestmark = pytest.mark.engine
K = 4
SERVER: dict[str, Any] = speculative(demo.ADAPTER, K, acceptance="confidence", tau=2, candidates=2048)  # the whole vocabulary
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"enum": ["a", "b"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}


@pytest.fixture
def lossy(engines: Engines) -> Engine:
    """The server, which says of each request what was accepted."""
    return engines(
        SERVER,
        per_request_spec_decode_metrics="summary",
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},  # the demo would write nothing else
    )


def ask(engine: Engine, prompts: list[Any], asked: list[dict[str, Any] | None], **sampling: Any) -> list[Any]:
    """Completions of the prompts at once, each with its own options of ours."""
    params = [SamplingParams(**{"temperature": 0.0, "max_tokens": 41, **sampling}, extra_args=extra) for extra in asked]
    return [output.outputs[0] for output in engine.llm.generate(prompts, params, use_tqdm=False)]


def tokens(completions: list[Any]) -> list[list[int]]:
    return [list(completion.token_ids) for completion in completions]


def test_above_1_is_lossless(engines: Engines, lossy: Engine, prompts: list[str], plain: Callable[..., list[list[int]]]) -> None:
    found, per_forward = lossy.forwards(lambda: lossy.greedy(prompts[:12], 128))
    assert per_forward > 1.5
    assert found == plain(100, 128)[:12]


@pytest.mark.full
def test_above_1_is_lossless_on_100_prompts(engines: Engines, prompts: list[str], plain: Callable[..., list[list[int]]]) -> None:
    """Greedy answers are plain vLLM's; sampled ones those of a server that knows no confidence, from the same draws."""

    def sampled(engine: Engine) -> list[list[int]]:
        params = [SamplingParams(temperature=0.8, top_p=0.9, max_tokens=64, seed=i) for i in range(100)]
        return [list(o.outputs[0].token_ids) for o in engine.llm.generate(prompts[:100], params, use_tqdm=False)]

    expected = plain(100, 128)  # one engine lives at a time
    engine = engines(speculative(demo.ADAPTER, K, acceptance="confidence", tau=1.01))
    assert engine.greedy(prompts[:100], 128) == expected
    found = sampled(engine)
    assert found == sampled(engines(speculative(demo.ADAPTER, K)))


@pytest.mark.parametrize("tau", [0, 0.6])
def test_answers_are_the_references(lossy: Engine, prompts: list[str], tau: float) -> None:
    reference = ReferenceModel.from_folder(demo.BASE, demo.ADAPTER)
    expected = [reference.decode(lossy.encode(prompt), 26, K, "quadratic", tau=tau)[0] for prompt in prompts[:2]]
    found, per_forward = lossy.forwards(
        lambda: tokens(ask(lossy, list(prompts[:2]), [{"mtp_tau": tau}] * 2, max_tokens=26, ignore_eos=True))
    )
    assert found == expected
    assert per_forward == 1 + K if tau == 0 else 1 < per_forward < 1 + K


def test_requests_ask_for_themselves(lossy: Engine, prompts: list[str], plain: Callable[..., list[list[int]]]) -> None:
    asked: list[dict[str, Any] | None] = [
        {"mtp_tau": 0},
        {"mtp_drafts": 0},
        {"mtp_drafts": 1},
        None,
        {"mtp_tau": 0, "mtp_drafts": 2},
        {"mtp_tau": 0.6, "mtp_drafts": 99},
        {"mtp_tau": 0, "mtp_drafts": 0},
    ]
    chosen = list(prompts[len(asked) : 2 * len(asked)])
    mixed = ask(lossy, chosen, asked, ignore_eos=True)
    assert tokens(mixed) == [tokens(ask(lossy, [p], [a], ignore_eos=True))[0] for p, a in zip(chosen, asked, strict=True)]
    greedy = tokens(ask(lossy, chosen, [{"mtp_drafts": 0}] * len(asked), ignore_eos=True))
    assert [found == text for found, text in zip(tokens(mixed), greedy, strict=True)] == [
        False,
        True,
        True,
        True,
        False,
        False,
        True,
    ]
    told = [completion.spec_decode_metrics.to_dict() for completion in mixed]
    steps, drafted, accepted = (
        [t[name] for t in told] for name in ("num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens")
    )
    assert (steps[0], drafted[0], accepted[0]) == (8, 8 * K, 8 * K)
    assert (steps[1], drafted[1], accepted[1]) == (0, 0, 0) == (steps[6], drafted[6], accepted[6])
    assert drafted[2] == steps[2] > 0
    assert accepted[4] == drafted[4] == 27  # 13 steps of two drafts and a token more; a draft and the last token
    assert steps[3] < drafted[3] <= K * steps[3]


def test_requests_without_drafts_have_no_mask_rows(lossy: Engine, prompts: list[str]) -> None:
    counters = lossy.proposer.planner.counters

    def rows(asked: dict[str, Any]) -> tuple[int, int]:
        before = counters.steps, counters.mask_rows
        ask(lossy, list(prompts[:3]), [asked] * 3, max_tokens=12, ignore_eos=True)
        return counters.steps - before[0], counters.mask_rows - before[1]

    assert rows({"mtp_drafts": 0}) == (0, 0)
    steps, mask_rows = rows({"mtp_drafts": 1})
    assert 0 < mask_rows <= 3 * 2 * steps  # a comb of 1


FORBIDDEN: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "json": (
        {"structured_outputs": StructuredOutputsParams(json=SCHEMA), "max_tokens": 80},
        lambda c: set(json.loads(c.text)) == {"name", "kind"},
    ),
    "regex": (
        {"structured_outputs": StructuredOutputsParams(regex=r"[a-z]{3,8} = \d{2,6}(, \d{1,3})*;")},
        lambda c: re.fullmatch(r"[a-z]{3,8} = \d{2,6}(, \d{1,3})*;", c.text) is not None or c.finish_reason == "length",
    ),
    "bad words": ({"bad_words": ["self", " self", "return", " return"]}, lambda c: "self" not in c.text and "return" not in c.text),
    "allowed": ({"allowed_token_ids": list(range(5, 1500, 3))}, lambda c: set(c.token_ids) <= set(range(5, 1500, 3))),
    "min tokens": (
        {"stop_token_ids": list(range(5, 1500, 3)), "min_tokens": 12},
        lambda c: len(c.token_ids) >= 12 and not set(c.token_ids[:-1]) & set(range(5, 1500, 3)),
    ),
    "stop ids": ({"stop_token_ids": list(range(5, 1500, 3))}, lambda c: not set(c.token_ids[:-1]) & set(range(5, 1500, 3))),
    "stop": ({"stop": ["self."]}, lambda c: "self." not in c.text),
    "sampled, top-k": ({"temperature": 1.0, "top_k": 1, "seed": 3}, lambda c: True),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_a_forbidden_token_is_never_taken(lossy: Engine, prompts: list[str], case: str) -> None:
    sampling, holds = FORBIDDEN[case]
    found, per_forward = lossy.forwards(lambda: ask(lossy, list(prompts[:6]), [{"mtp_tau": 0}] * 6, **sampling))
    assert all(map(holds, found))
    assert per_forward > 1  # beside drafts that were accepted
    if case == "sampled, top-k":  # one token alone is allowed, so this is greedy decoding, and lossless
        assert tokens(found) == tokens(ask(lossy, list(prompts[:6]), [{"mtp_drafts": 0}] * 6))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 1}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}])
def test_logprobs_are_the_targets(lossy: Engine, prompts: list[str], sampling: dict[str, Any]) -> None:
    found = ask(lossy, list(prompts[:4]), [{"mtp_tau": 0}] * 4, logprobs=2, ignore_eos=True, **sampling)
    ids = [lossy.encode(prompt) for prompt in prompts[:4]]
    whole = [{"prompt_token_ids": prompt + list(completion.token_ids)} for prompt, completion in zip(ids, found, strict=True)]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2, extra_args={"mtp_drafts": 0})
    for output, completion in zip(lossy.llm.generate(whole, params, use_tqdm=False), found, strict=True):
        behind = output.prompt_logprobs[-len(completion.token_ids) :]
        surprises = 0
        for token, expected, logprobs in zip(completion.token_ids, behind, completion.logprobs, strict=True):
            assert logprobs[token].logprob == pytest.approx(expected[token].logprob, abs=1e-4)
            assert logprobs[token].rank == expected[token].rank
            surprises += expected[token].rank > 1
        assert surprises  # among them tokens that verification would have rejected


def test_penalties_count_tokens_that_were_taken(lossy: Engine, prompts: list[str]) -> None:
    """The target's own tokens, the last of each step, are those of requests that have the same text as their prompt."""
    penalty = {"repetition_penalty": 1.8, "ignore_eos": True}
    found = tokens(ask(lossy, list(prompts[:4]), [{"mtp_tau": 0}] * 4, **penalty))
    own = [(i, at) for i in range(4) for at in range(0, 41, K + 1)]
    texts = [{"prompt_token_ids": lossy.encode(prompts[i]) + found[i][:at]} for i, at in own]

    def after(**sampling: Any) -> list[int]:
        return [text[0] for text in tokens(ask(lossy, texts, [None] * len(texts), max_tokens=1, **sampling))]

    assert after(**penalty) == [found[i][at] for i, at in own] != after()


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"mtp_tau": -1}, "mtp_tau is -1"), ({"mtp_drafts": "2"}, "mtp_drafts is '2'"), ({"mtp_taus": 1}, "mtp_taus is no option")],
)
def test_wrong_options_are_refused(lossy: Engine, prompts: list[str], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(VLLMValidationError, match=message):
        ask(lossy, list(prompts[:1]), [asked])
    assert tokens(ask(lossy, list(prompts[:1]), [{"mtp_tau": 0}], max_tokens=3)) != [[]]  # and goes on serving


def test_drafts_that_came_from_elsewhere_are_not_taken(lossy: Engine, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens(ask(lossy, list(prompts[:4]), [{"mtp_drafts": 0}] * 4))
    propose = lossy.proposer.propose
    monkeypatch.setattr(lossy.proposer, "propose", lambda *a, **k: [[7] * len(d) for d in propose(*a, **k)])
    assert tokens(ask(lossy, list(prompts[:4]), [{"mtp_tau": 0}] * 4)) == expected


def test_counts_are_vllms_and_at_metrics(lossy: Engine, prompts: list[str]) -> None:
    counters, vllms = lossy.proposer.planner.counters, ("drafts", "draft_tokens", "accepted_tokens")
    asked: list[dict[str, Any] | None] = [{"mtp_tau": 0}, {"mtp_drafts": 0}, {"mtp_drafts": 2}, {"mtp_tau": 0.6}, None, None]

    def count() -> tuple[list[float], list[float], list[float]]:
        """vLLM's, and ours, of drafts and of confidence."""
        of_vllm = [lossy.metric(f"vllm:spec_decode_num_{name}") for name in vllms]
        ours = [counters.drafts, sum(counters.drafted), sum(counters.accepted)]
        return of_vllm, ours, [sum(counters.confident), counters.unmatched, sum(counters.expected)]

    before = count()
    for sampling in ({}, {"temperature": 1.0}, {"max_tokens": 7}, {"structured_outputs": StructuredOutputsParams(json=SCHEMA)}):
        ask(lossy, list(prompts[:6]), asked, **sampling)
    after = count()
    moved = [[new - old for new, old in zip(*pair, strict=True)] for pair in zip(after, before, strict=True)]
    assert moved[0] == moved[1]
    accepted, (confident, unmatched, expected) = moved[1][2], moved[2]
    assert 0 < unmatched < confident < accepted
    assert 0 < expected < moved[1][1]
    lossy.proposer.exporter.write()
    text = generate_latest(get_prometheus_registry()).decode()
    at_metrics = [float(value) for value in re.findall(r"^vllm_mtp:accepted_tokens_total{.*} (.*)$", text, re.MULTILINE)]
    assert sum(at_metrics) == sum(counters.accepted)
    # Nothing is taken by confidence where all have asked for tau > 1 or said nothing.
    before = count()
    ask(lossy, list(prompts[:6]), [None, {"mtp_tau": 1.5}] * 3)
    assert count()[2][:2] == before[2][:2]


@pytest.mark.full
def test_probabilistic_drafts(engines: Engines, prompts: list[str], plain: Callable[..., list[list[int]]]) -> None:
    expected = plain(100, 128)[:12]
    engine = engines({**SERVER, "draft_sample_method": "probabilistic"})
    assert engine.greedy(prompts[:12], 128) == expected
    asked: list[dict[str, Any] | None] = [{"mtp_tau": tau} for tau in (0, 0, 2, 2)]

    def sampled() -> tuple[list[list[int]], float]:
        return engine.forwards(lambda: tokens(ask(engine, list(prompts[:4]), asked, temperature=1.0, seed=5, ignore_eos=True)))

    first, _ = sampled()
    assert first == sampled()[0]
    asked = [{"mtp_tau": 0}] * 4
    assert sampled()[1] == 1 + K


@pytest.mark.full
def test_compiled(engines: Engines, prompts: list[str], plain: Callable[..., list[list[int]]]) -> None:
    expected = plain(100, 128)[:12]
    engine = engines(SERVER, enforce_eager=False)
    assert engine.greedy(prompts[:12], 128) == expected
    for tau in (0.5, 0):
        expected, per_forward = engine.forwards(
            lambda tau=tau: tokens(ask(engine, list(prompts[:4]), [{"mtp_tau": tau}] * 4, ignore_eos=True))
        )
        assert per_forward > 2.5
    assert per_forward == 1 + K
    assert expected == tokens(ask(engines(SERVER), list(prompts[:4]), [{"mtp_tau": 0}] * 4, ignore_eos=True))
