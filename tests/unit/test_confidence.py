"""Acceptance by confidence against the rule, read off a draft at a time; options of requests."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler

from vllm_mtp import confidence, selection
from vllm_mtp.compat import _rejection_sample
from vllm_mtp.confidence import NONE, ConfidentDrafts, Drafted, DraftedRequests
from vllm_mtp.config import RequestOptions, ServingOptions
from vllm_mtp.verifier import REJECTED, greedy_tokens

V = 7


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    """A step: logits of the target with some tokens forbidden, drafts, and which of them the drafter is sure of."""
    num_drafts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    total = sum(num_drafts) + len(num_drafts)
    logits = torch.randn(total, V, generator=generator) * 2
    forbidden = torch.rand(total, V, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    forbidden[:, 0] = False
    count = sum(num_drafts)
    last = np.cumsum(np.array(num_drafts) + 1) - 1
    rows = np.setdiff1d(np.arange(total), last)
    drafts = torch.randint(0, V, (count,), generator=generator)
    if count and draw(st.booleans()):  # drafts that verification has something to accept of
        drafts = torch.where(torch.rand(count, generator=generator) < 0.6, logits[torch.from_numpy(rows)].argmax(-1), drafts)
    return {
        "num_drafts": num_drafts,
        "logits": logits.masked_fill(forbidden, -torch.inf),
        "rows": rows,
        "last": last,
        "drafts": drafts,
        "confident": torch.rand(count, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0])),
        "seed": draw(st.integers(0, 1000)),
        "temperature": [draw(st.sampled_from([0.0, 1.0, 0.7])) for _ in num_drafts],
    }


def by_the_rule(step: dict[str, Any], accepts: Any, own: Any, bonus: Any) -> tuple[list[list[int]], list[bool]]:
    """Tokens of each request, and which drafts were taken by confidence: a draft at a time.

    Args:
        accepts, own: (request, draft) -> whether verification accepts it, and the target's own token in its place.
        bonus: request -> its token behind all drafts.
    """
    outputs, taken, first = [], [], 0
    for request, count in enumerate(step["num_drafts"]):
        tokens, ended = [], False
        for draft in range(first, first + count):
            token = int(step["drafts"][draft])
            allowed = step["logits"][step["rows"][draft], token] > -torch.inf
            sure = bool(step["confident"][draft]) and bool(allowed)
            taken.append(sure)
            if not ended:
                ended = not sure and not accepts(request, draft)
                tokens.append(own(request, draft) if ended else token)
        outputs.append(tokens if ended else [*tokens, bonus(request)])
        first += count
    return outputs, taken


def trimmed(tokens: Any) -> list[list[int]]:
    return [[token for token in row if token != REJECTED] for row in tokens.tolist()]


@given(steps())
def test_greedy_steps_on_a_host_follow_the_rule(step: dict[str, Any]) -> None:
    best = step["logits"].argmax(-1)
    expected, taken = by_the_rule(
        step,
        lambda request, draft: best[step["rows"][draft]] == step["drafts"][draft],
        lambda request, draft: int(best[step["rows"][draft]]),
        lambda request: int(best[step["last"][request]]),
    )
    confident = ConfidentDrafts(step["confident"])
    drafts = step["drafts"].numpy()
    certain = confident.certain_best(best.numpy().copy(), step["logits"].numpy(), step["rows"], drafts)
    assert trimmed(greedy_tokens(certain, drafts, np.array(step["num_drafts"]))) == expected
    assert confident.taken is not None
    assert confident.unmatched is not None
    assert confident.taken.tolist() == taken
    assert confident.unmatched.tolist() == [t and bool(best[r] != d) for t, r, d in zip(taken, step["rows"], drafts, strict=True)]


@pytest.fixture(scope="module")
def kernels() -> None:
    """What a worker does before it loads a model."""
    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()


@pytest.mark.usefixtures("kernels")
@settings(max_examples=60, deadline=None)
@given(steps())
def test_vllms_rejection_sampler_follows_the_rule(step: dict[str, Any]) -> None:
    """Greedy and sampled requests beside each other, the draws being those that vLLM makes without confidence."""
    counts, drafts, rows = step["num_drafts"], step["drafts"], step["rows"]
    if not len(rows):
        return
    temperature = torch.tensor(step["temperature"])
    of_draft = np.repeat(np.arange(len(counts)), counts)
    logits = step["logits"][torch.from_numpy(rows)] / torch.where(temperature > 0, temperature, 1.0)[of_draft][:, None]
    bonus = step["logits"][torch.from_numpy(step["last"])].argmax(-1)
    generator = torch.manual_seed(step["seed"])
    greedy = bool((temperature == 0).all())
    uniform = None if greedy else torch.rand(len(rows), dtype=torch.float64, generator=generator)
    inverse = torch.empty(len(counts), V).exponential_(generator=generator).reciprocal()
    probabilities = logits.softmax(-1)

    def accepts(request: int, draft: int) -> bool:
        if temperature[request] == 0:
            return bool(logits[draft].argmax() == drafts[draft])
        assert uniform is not None
        return bool(probabilities[draft, drafts[draft]] >= uniform[draft])

    def own(request: int, draft: int) -> int:
        if temperature[request] == 0:
            return int(logits[draft].argmax())
        others = probabilities[draft].clone()
        others[drafts[draft]] = 0
        return int((others * inverse[request]).argmax())

    expected, taken = by_the_rule(step, accepts, own, lambda request: int(bonus[request]))
    sampling = SimpleNamespace(
        all_greedy=greedy,
        all_random=bool((temperature > 0).all()),
        temperature=temperature,
        generators={},
    )
    confident, original = ConfidentDrafts(step["confident"]), logits.clone()
    torch.manual_seed(step["seed"])
    with confidence.taking(confident, pytest.fail):
        tokens = _rejection_sample(
            getattr(rejection_sampler.rejection_sample, "vllm_mtp_original", rejection_sampler.rejection_sample)
        )(
            drafts.int(),
            counts,
            max(counts),
            torch.tensor(counts).cumsum(0).int(),
            None,
            logits,
            bonus[:, None].int(),
            sampling,
        )
    assert trimmed(tokens) == expected
    assert confident.taken is not None
    assert confident.taken.tolist() == taken
    assert torch.equal(logits, original)  # from which vLLM may still take log-probabilities
    assert confidence.running() is None


def of_states(step: dict[str, Any], drafted: DraftedRequests) -> tuple[list[int], list[torch.Tensor]]:
    """A step as the V2 runner has it: the state of each request, and of the rows the token in each, the state and the position.

    Draft i of the step is at tau or above in `drafted` if it is confident; the last draft of a request is invalid if it is the
    request's third.
    """
    counts = step["num_drafts"]
    states = torch.randperm(len(drafted.tau), generator=torch.Generator().manual_seed(step["seed"]))[: len(counts)].tolist()
    tokens, positions, first = [], [], 0
    for state, count in zip(states, counts, strict=True):
        drafted.add(state, 0.6)
        chances = torch.where(step["confident"][first : first + count], 0.7, 0.5)
        drafted.keep(torch.tensor([state]), torch.cat([chances, torch.full((4 - count,), 0.9)])[None])
        tokens += [V - 1, *step["drafts"][first : first + count].tolist()]
        positions += range(1 + count)
        first += count
    tokens = [-1 if position == 3 else token for token, position in zip(tokens, positions, strict=True)]
    rows = torch.tensor(states).repeat_interleave(torch.tensor(counts) + 1)
    return states, [torch.tensor(tokens), rows.int(), torch.tensor(positions, dtype=torch.int32)]


@given(steps())
def test_on_a_device_the_same_rows_become_certain(step: dict[str, Any]) -> None:
    drafted = DraftedRequests.of(9, 4, torch.device("cpu"))
    states, columns = of_states(step, drafted)
    logits, rows = step["logits"], torch.from_numpy(step["rows"])
    drafts = columns[0][rows + 1]
    confident = ConfidentDrafts(step["confident"])
    expected = logits.clone()
    expected[rows] = confident.certain(logits[rows], drafts)
    assert torch.equal(drafted.certain(logits, *columns), expected)
    for name in ("taken", "unmatched"):
        of_step = getattr(confident, name).tolist()
        for state, count in zip(states, step["num_drafts"], strict=True):
            assert getattr(drafted, name)[state].tolist() == [*of_step[:count], *[False] * (5 - count)]
            of_step = of_step[count:]
    # vLLM verifies large steps in parts, each of some whole requests.
    ends = [0, *(np.cumsum(np.array(step["num_drafts"]) + 1)).tolist()]
    parts = [slice(first, end) for first, end in pairwise(ends)]
    certain = [drafted.certain(logits[part], *(column[part] for column in columns)) for part in parts]
    assert torch.equal(torch.cat(certain), expected)


@pytest.mark.parametrize("tau", [0.0, 0.9, 1.0, 1 + 1e-9, 2.0])
def test_a_place_that_is_used_again_has_nothing_of_the_request_before(tau: float) -> None:
    drafted = DraftedRequests.of(2, 3, torch.device("cpu"))
    logits, tokens = torch.zeros(4, V), torch.tensor([1, 2, 3, 4])
    rows = torch.ones(4, dtype=torch.int32), torch.arange(4, dtype=torch.int32)

    def taken() -> list[bool]:
        drafted.certain(logits, tokens, *rows)
        return drafted.taken[1].tolist()

    assert not any(taken())
    for own in (0.0, tau):
        drafted.add(1, own)
        assert not any(taken())
        drafted.keep(torch.tensor([1]), torch.tensor([[1.0, 0.95, 0.0]]))
        assert taken() == [own <= 1, own <= 0.95, own == 0, False]
    drafted.keep(torch.tensor([1]), torch.tensor([[1.0, NONE, 1.0]]))
    assert taken() == [tau <= 1, False, tau <= 1, False]
    drafted.keep(torch.tensor([1, 0]), NONE)
    assert not any(taken())


def test_a_failure_is_told_and_changes_nothing() -> None:
    told: list[Exception] = []
    logits = torch.zeros(2, V)
    with confidence.taking(ConfidentDrafts(torch.ones(5, dtype=torch.bool)), told.append):  # of another number
        assert confidence.certain(logits, torch.zeros(2, dtype=torch.int32)) is logits
    assert isinstance(told[0], RuntimeError)
    assert confidence.certain(logits, torch.zeros(2, dtype=torch.int32)) is logits


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1))), st.floats(0, 1.5), st.integers(0, 6))
def test_drafts_at_tau_or_above_are_confident_unless_others_came_in_their_place(
    drafted: list[tuple[int, float]], tau: float, count: int
) -> None:
    tokens, chances = [token for token, _ in drafted], [chance for _, chance in drafted]
    known, scheduled = Drafted(tokens, chances, tau), tokens[:count]  # a grammar or a budget cuts drafts
    assert known.confident(scheduled) == [chance >= tau for chance in chances[:count]]
    assert known.confident([*scheduled, 9]) == [False] * (len(scheduled) + 1)
    if tau > 1:
        assert not any(known.confident(scheduled))


LOSSLESS = ServingOptions(adapter="a", num_speculative_tokens=4)
LOSSY = ServingOptions(adapter="a", num_speculative_tokens=4, acceptance="confidence")


@pytest.mark.parametrize("extra", [None, {}, {"kv_transfer_params": {"mtp_tau": "x"}}, {"other_tau": "high"}])
def test_what_is_not_ours_is_left_alone(extra: dict[str, Any] | None) -> None:
    assert RequestOptions.of(extra) == RequestOptions()
    assert RequestOptions.checked(extra) == RequestOptions()
    selection.check_request(extra, LOSSLESS, on_v2=True)


@given(st.none() | st.floats(0, 10) | st.integers(0, 3), st.none() | st.integers(0, 100))
def test_a_requests_options_are_read(tau: float | None, drafts: int | None) -> None:
    extra = {"mtp_tau": tau, "mtp_drafts": drafts, "other": 1}
    selection.check_request(extra, LOSSY, on_v2=False)
    assert (RequestOptions.of(extra).mtp_tau, RequestOptions.of(extra).mtp_drafts) == (tau, drafts)
    assert RequestOptions.checked(extra) == RequestOptions.of(extra)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"mtp_tau": -0.1}, "mtp_tau is -0.1"),
        ({"mtp_tau": "0.9"}, "mtp_tau is '0.9'"),
        ({"mtp_tau": True}, "mtp_tau is True"),
        ({"mtp_tau": float("nan")}, "mtp_tau is nan"),
        ({"mtp_tau": float("inf")}, "mtp_tau is inf"),
        ({"mtp_tau": ["x" * 10_000]}, "mtp_tau is"),
        ({"mtp_drafts": -1}, "mtp_drafts is -1"),
        ({"mtp_drafts": 2.0}, "mtp_drafts is 2.0"),
        ({"mtp_drafts": False}, "mtp_drafts is False"),
        ({"mtp_tua": 0.9}, "mtp_tua is no option"),
    ],
)
def test_a_requests_wrong_options_are_refused_by_name(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        selection.check_request(extra, LOSSY, on_v2=False)
    assert len(str(error.value)) < 200


def test_what_a_server_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r'this one is lossless.*"acceptance": "confidence"'):
        selection.check_request({"mtp_tau": 2}, LOSSLESS, on_v2=False)
    with pytest.raises(ValueError, match="mtp_drafts is not supported on vLLM's V2"):
        selection.check_request({"mtp_drafts": 1}, LOSSLESS, on_v2=True)


def test_tau_defaults() -> None:
    assert LOSSLESS.default_tau > 1
    assert LOSSY.default_tau == 0.9
    assert ServingOptions(adapter="a", num_speculative_tokens=4, acceptance="confidence", tau=2).default_tau == 2
    with pytest.raises(ValueError, match="acceptance is lossless"):
        ServingOptions(adapter="a", num_speculative_tokens=4, tau=0.9)
