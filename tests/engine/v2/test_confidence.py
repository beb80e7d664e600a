"""Acceptance by confidence on the V2 runner. fp32."""

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.conftest import Engine, Engines, speculative
from tests.engine.test_confidence import ask, tokens
from vllm_mtp import demo
from vllm_mtp.reference import ReferenceModel

pytestmark = pytest.mark.engine
K = 4
SMALL: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 320}


@pytest.fixture
def lossy(engines: Engines) -> Engine:
    return engines(speculative(demo.ADAPTER, K, acceptance="confidence", tau=2, candidates=2048), **SMALL)


def test_each_request_has_its_own_threshold(lossy: Engine, prompts: list[str]) -> None:
    reference = ReferenceModel.from_folder(demo.BASE, demo.ADAPTER)
    taus = (None, 0.0, 0.6, 1.5)
    expected = [
        reference.decode(lossy.encode(prompt), 21, K, "quadratic", tau=2 if tau is None else tau)[0]
        for prompt, tau in zip(prompts, taus, strict=False)
    ]
    asked: list[dict[str, Any] | None] = [None if tau is None else {"mtp_tau": tau} for tau in taus]
    assert tokens(ask(lossy, list(prompts[:4]), asked, max_tokens=21, ignore_eos=True)) == expected
    again, per_forward = lossy.forwards(
        lambda: tokens(ask(lossy, list(prompts[1:2]), [{"mtp_tau": 0}], max_tokens=21, ignore_eos=True))
    )
    assert again == expected[1:2]
    assert per_forward == 1 + K


def test_a_state_forgets_the_request_before(lossy: Engine, prompts: list[str]) -> None:
    """The next request in its place has the server's threshold, and is lossless."""
    ask(lossy, list(prompts[:4]), [{"mtp_tau": 0}] * 4, max_tokens=11, ignore_eos=True)
    lossless = tokens(ask(lossy, list(prompts[:2]), [None] * 2, max_tokens=16))
    assert lossless == tokens(ask(lossy, list(prompts[:2]), [{"mtp_tau": 2}] * 2, max_tokens=16))
    assert lossless == [
        ReferenceModel.from_folder(demo.BASE, demo.ADAPTER).decode(lossy.encode(prompt), 16, K, "plain", end=1)[0]
        for prompt in prompts[:2]
    ]


def test_forbidden_tokens_are_not_taken_and_logprobs_are_the_targets(lossy: Engine, prompts: list[str]) -> None:
    allowed = set(range(5, 1500, 3))
    grammar = {"structured_outputs": StructuredOutputsParams(regex=r"[a-z]{3,8} = \d{2,6}(, \d{1,3})*;")}
    found, per_forward = lossy.forwards(
        lambda: ask(lossy, list(prompts[:2]), [{"mtp_tau": 0}] * 2, max_tokens=16, allowed_token_ids=sorted(allowed))
    )
    assert per_forward > 1
    assert {token for text in tokens(found) for token in text} <= allowed
    found = ask(lossy, list(prompts[:2]), [{"mtp_tau": 0}] * 2, max_tokens=16, **grammar)
    assert all(set(completion.text) <= set("abcdefghijklmnopqrstuvwxyz =0123456789,;") for completion in found)
    found = ask(lossy, list(prompts[:2]), [{"mtp_tau": 0}] * 2, max_tokens=16, logprobs=1, ignore_eos=True)
    whole = [{"prompt_token_ids": lossy.encode(p) + list(c.token_ids)} for p, c in zip(prompts, found, strict=False)]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    for output, completion in zip(lossy.llm.generate(whole, params, use_tqdm=False), found, strict=True):
        behind = output.prompt_logprobs[-len(completion.token_ids) :]
        for token, expected, logprobs in zip(completion.token_ids, behind, completion.logprobs, strict=True):
            assert logprobs[token].logprob == pytest.approx(expected[token].logprob, abs=1e-4)


def test_fewer_drafts_are_refused(lossy: Engine, prompts: list[str]) -> None:
    with pytest.raises(VLLMValidationError, match="mtp_drafts is not supported on vLLM's V2 model runner"):
        ask(lossy, list(prompts[:1]), [{"mtp_drafts": 1}])
    assert tokens(ask(lossy, list(prompts[:1]), [None], max_tokens=2)) != [[]]


@pytest.mark.full
def test_probabilistic_drafts(engines: Engines, prompts: list[str]) -> None:
    drawn = {"acceptance": "confidence", "tau": 2, "draft_sample_method": "probabilistic"}
    engine = engines(speculative(demo.ADAPTER, K, **drawn), **SMALL)
    asked: list[dict[str, Any] | None] = [{"mtp_tau": 0}] * 2
    drafted, per_forward = engine.forwards(
        lambda: tokens(ask(engine, list(prompts[:2]), asked, max_tokens=21, temperature=1.0, seed=3, ignore_eos=True))
    )
    assert per_forward == 1 + K
    assert drafted == tokens(ask(engine, list(prompts[:2]), asked, max_tokens=21, temperature=1.0, seed=3, ignore_eos=True))
