"""Drafts from a request's own text: what comes out is plain vLLM's, and a request that wants none has none. fp32."""

from dataclasses import dataclass

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_mtp import demo
from vllm_mtp.plan import Counters
from vllm_mtp.selection import LOOKED_UP

from .conftest import Engine, Engines, speculative

pytestmark = pytest.mark.engine
K = 8
SERVER = {"max_model_len": 256}
OURS = speculative(demo.ADAPTER, K, "auto")
REPEATED = "def first(self):\n    return self._first\n\n\n" * 6
# The text repeats itself, and what the grammar allows next is something else.
OTHERWISE = "x = 1\ny = 2\n" * 12 + "z = "
GRAMMAR = {"structured_outputs": StructuredOutputsParams(regex=r"(x = [0-9]\n|y = [a-f]\n){4,9}")}


@dataclass
class Plain:
    """What plain vLLM gives."""

    prompts: list[list[int]]
    repeated: list[list[int]]
    otherwise: list[list[int]]
    to_the_end: list[list[int]]


def to_the_end(engine: Engine, prompts: list[str]) -> list[list[int]]:
    return engine.greedy(prompts[:16], 512, ignore_eos=True)


def otherwise(engine: Engine) -> list[list[int]]:
    return engine.greedy([OTHERWISE], 48, **GRAMMAR)


@pytest.fixture(scope="module")
def plain(engines: Engines, prompts: list[str]) -> Plain:
    engine = engines(**SERVER)
    repeated = engine.greedy([REPEATED], 96, ignore_eos=True)
    return Plain(engine.greedy(prompts[:16], 96), repeated, otherwise(engine), to_the_end(engine, prompts))


def counters(engine: Engine) -> Counters:
    return engine.proposer.planner.counters.snapshot()


def test_output_is_plain_vllms_and_drafts_are_counted(engines: Engines, prompts: list[str], plain: Plain) -> None:
    engine = engines(OURS, **SERVER)
    before, accepted = counters(engine), engine.metric("vllm:spec_decode_num_accepted_tokens")
    for at_once in (1, 16):
        assert engine.greedy(prompts[:16], 96, at_once=at_once) == plain.prompts
    after = counters(engine)
    assert 0 < after.lookup_accepted - before.lookup_accepted <= after.lookup_drafted - before.lookup_drafted
    assert sum(after.accepted) - sum(before.accepted) == engine.metric("vllm:spec_decode_num_accepted_tokens") - accepted
    assert 0 < after.lookups - before.lookups < after.drafts - before.drafts  # mask states are drafted from, too


def test_repeating_text_is_drafted_from_itself(engines: Engines, plain: Plain) -> None:
    engine = engines(OURS, **SERVER)
    before = counters(engine)
    outputs, per_forward = engine.forwards(lambda: engine.greedy([REPEATED], 96, ignore_eos=True))
    assert outputs == plain.repeated
    assert per_forward > 3
    assert counters(engine).lookup_accepted - before.lookup_accepted > 48


def test_there_may_be_more_of_them_than_mask_tokens(engines: Engines, prompts: list[str], plain: Plain) -> None:
    engine = engines({"method": "mtp", "model": str(demo.ADAPTER)}, **SERVER)
    before = counters(engine)
    outputs, per_forward = engine.forwards(lambda: engine.greedy([REPEATED], 96, ignore_eos=True))
    assert outputs == plain.repeated
    assert per_forward > 1 + K
    for at_once in (1, 16):
        assert engine.greedy(prompts[:16], 96, at_once=at_once) == plain.prompts
    assert to_the_end(engine, prompts) == plain.to_the_end
    moved = [new - old for new, old in zip(counters(engine).accepted, before.accepted, strict=True)]
    assert moved[LOOKED_UP - 1] > 0 == moved[LOOKED_UP]
    assert otherwise(engine) == plain.otherwise


def test_a_grammar_holds_for_drafts_of_the_text(engines: Engines, plain: Plain) -> None:
    engine = engines(OURS, **SERVER)
    before = counters(engine)
    assert otherwise(engine) == plain.otherwise
    assert counters(engine).lookups > before.lookups


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_request_has_no_more_than_it_asked_for(engines: Engines, prompts: list[str], plain: Plain, drafts: int) -> None:
    engine = engines(OURS, **SERVER)
    before = counters(engine)
    assert engine.greedy(prompts[:6], 96, at_once=1, extra_args={"mtp_drafts": drafts}) == plain.prompts[:6]
    moved = [new - old for new, old in zip(counters(engine).drafted, before.drafted, strict=True)]
    assert moved[drafts:] == [0] * (len(moved) - drafts)
    assert bool(sum(moved)) == bool(drafts)


def test_sampled_requests_have_them_too(engines: Engines) -> None:
    engine, params = engines(OURS, **SERVER), SamplingParams(temperature=0.7, seed=3, max_tokens=64, ignore_eos=True)
    before = counters(engine)
    (output,) = engine.llm.generate([REPEATED], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 64
    assert counters(engine).lookups > before.lookups


def test_up_to_the_models_length(engines: Engines, prompts: list[str], plain: Plain) -> None:
    engine = engines(OURS, **SERVER)
    before = counters(engine)
    assert to_the_end(engine, prompts) == plain.to_the_end
    assert {len(engine.encode(p)) + len(o) for p, o in zip(prompts[:16], plain.to_the_end, strict=True)} == {
        SERVER["max_model_len"]
    }
    assert counters(engine).lookups > before.lookups


def test_switched_off_there_are_none(engines: Engines, prompts: list[str], plain: Plain) -> None:
    engine = engines({**OURS, "lookup": False}, **SERVER)
    assert engine.greedy(prompts[:8], 96, at_once=1) == plain.prompts[:8]
    assert counters(engine).drafts > counters(engine).lookups == 0
