"""Candidate scoring against the paper's full computation, and drafts that are drawn against the distribution they come with."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.config import CompilationMode

from vllm_mtp.compiled import compiler
from vllm_mtp.drafter import Drafter, SampledDrafts, Unembedding
from vllm_mtp.sampler_head import SamplerHead

from .ranks import Rank, on_ranks

R, K, D, V = 5, 4, 12, 50


@pytest.fixture
def parts() -> tuple[torch.Tensor, SamplerHead, torch.Tensor, torch.Tensor]:
    """Unembedding, sampler head, mask states, sampled tokens."""
    torch.manual_seed(0)
    return torch.randn(V, D), SamplerHead(D).requires_grad_(False), torch.randn(R, K, D), torch.randint(0, V, (R,))


def draft(drafter: Drafter, states: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """Drafts from states [R, k, d], which stand in the rows of a step in another order."""
    order = torch.randperm(R * K)
    hidden = torch.empty(R * K, D)
    hidden[order] = states.flatten(0, 1)
    return drafter(hidden, order.view(R, K), sampled)


def full(w: torch.Tensor, head: SamplerHead, states: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """y_i = argmax W MLP([E(y_{i-1}); z_i]) with E = W, one request and one position at a time."""
    drafts = torch.empty(R, K, dtype=torch.long)
    for r in range(R):
        previous = sampled[r]
        for i in range(K):
            drafts[r, i] = previous = (w @ head(w[previous], states[r, i])).argmax()
    return drafts


@pytest.mark.parametrize("candidates", [V, V + 7])
@pytest.mark.parametrize("readable", [True, False])
def test_all_candidates_equal_the_full_computation(parts: tuple, candidates: int, readable: bool) -> None:
    w, head, states, sampled = parts
    drafter = Drafter(lambda x: x @ w.T, lambda ids: w[ids], Unembedding(w, 0, V) if readable else None, head, candidates, V)
    assert torch.equal(draft(drafter, states, sampled), full(w, head, states, sampled))


def test_almost_all_candidates_agree_where_the_best_is_among_them(parts: tuple) -> None:
    w, head, states, sampled = parts
    drafts = draft(Drafter(lambda x: x @ w.T, lambda ids: w[ids], Unembedding(w, 0, V), head, V - 1, V), states, sampled)
    expected = full(w, head, states, sampled)
    worst = (states @ w.T).argmin(-1)  # the one token that is no candidate
    agrees = (expected != worst).cumprod(1).bool()
    assert torch.equal(drafts[agrees], expected[agrees])
    assert agrees.any()


def test_drafts_are_candidates(parts: tuple) -> None:
    w, head, states, sampled = parts
    drafts = draft(Drafter(lambda x: x @ w.T, lambda ids: w[ids], Unembedding(w, 0, V), head, 3, V), states, sampled)
    top = (states @ w.T).topk(3).indices
    assert (top == drafts[..., None]).any(-1).all()


def test_without_a_sampler_drafts_are_the_plain_heads(parts: tuple) -> None:
    w, _, states, sampled = parts
    drafts = draft(Drafter(lambda x: x @ w.T, lambda ids: w[ids], Unembedding(w, 0, V), None, 3, V), states, sampled)
    assert torch.equal(drafts, (states @ w.T).argmax(-1))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_that_share_the_unembedding_draft_what_one_alone_does(parts: tuple, num_ranks: int) -> None:
    w, head, states, sampled = parts
    alone = Drafter(lambda x: x @ w.T, lambda ids: w[ids], Unembedding(w, 0, V), head, 7, V)
    rows = torch.arange(R * K).view(R, K)
    size = -(-V // num_ranks)

    def drafts(rank: Rank) -> torch.Tensor:
        first = rank.index * size
        shard = torch.full((size, D), torch.inf)  # padding must not be read
        shard[: V - first] = w[first : first + size]
        part = Unembedding(shard, first, min(first + size, V), rank.sum)
        return Drafter(lambda x: x @ w.T, lambda ids: w[ids], part, head, 7, V)(states.flatten(0, 1), rows, sampled)

    expected = alone(states.flatten(0, 1), rows, sampled)
    assert all(torch.equal(found, expected) for found in on_ranks(num_ranks, drafts))


@pytest.fixture(params=["sampler, 4 candidates", "sampler, all", "plain head, 4 candidates", "plain head, all"])
def drafter(request: pytest.FixtureRequest, parts: tuple) -> Drafter:
    """A drafter of each kind."""
    w, head, _, _ = parts
    return Drafter(
        lambda x: x @ w.T,
        lambda ids: w[ids],
        Unembedding(w, 0, V),
        head if "sampler" in request.param else None,
        4 if "4" in request.param else V,
        V,
    )


def sample(
    drafter: Drafter, states: torch.Tensor, sampled: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor
) -> SampledDrafts:
    """`Drafter.sample` from states [R, k, d], y_0 at position 17."""
    num_requests, k, d = states.shape
    rows = torch.arange(num_requests * k).view(num_requests, k)
    return drafter.sample(states.reshape(-1, d), rows, sampled, temperature, seeds, torch.full((num_requests,), 17))


def probabilities(found: SampledDrafts, temperature: float) -> torch.Tensor:
    """What the drafts were drawn from, [R, k, V]."""
    q = (found.scores / temperature).softmax(-1)
    return q.new_zeros(*found.drafts.shape, V).scatter_(2, found.candidates, q)


@pytest.mark.parametrize("vary", ["seeds", "positions"])
def test_sampled_drafts_have_the_distribution_that_they_come_with(drafter: Drafter, parts: tuple, vary: str) -> None:
    _, _, states, sampled = parts
    draws, temperature, k = 6000, 1.7, 2
    zeros, many = torch.zeros(draws, dtype=torch.long), torch.arange(draws) * k
    found = drafter.sample(
        states[0],
        torch.arange(k).expand(draws, k),
        sampled[:1].expand(draws),
        torch.full((draws,), temperature),
        *((many, zeros) if vary == "seeds" else (zeros, many)),
    )
    q, p_values = probabilities(found, temperature), []
    # What y_2 is drawn from follows from y_1: one chi-square test for y_1, and one of y_2 for each y_1 that is frequent.
    for i, given in [(0, torch.full((draws,), True)), *((1, found.drafts[:, 0] == first) for first in found.drafts[:, 0].unique())]:
        expected = q[given, i][0].double() * given.sum()
        counts = found.drafts[given, i].bincount(minlength=V)
        assert (counts[expected == 0] == 0).all()
        cells = expected >= 5
        if cells.sum() > 1:
            statistic = ((counts - expected)[cells] ** 2 / expected[cells]).sum()
            p_values.append(float(torch.special.gammaincc((cells.sum() - 1) / 2, statistic / 2)))
    assert len(p_values) > 1
    assert min(p_values) * len(p_values) > 1e-3


def test_the_distribution_is_the_softmax_of_the_scores_of_the_tokens_before(parts: tuple) -> None:
    w, head, states, sampled = parts
    found = sample(
        Drafter(lambda x: x @ w.T, lambda ids: w[ids], Unembedding(w, 0, V), head, V, V),
        states,
        sampled,
        torch.full((R,), 0.8),
        torch.arange(R),
    )
    before = torch.cat([sampled[:, None], found.drafts[:, :-1]], 1)
    expected = (head(w[before], states) @ w.T / 0.8).softmax(-1)
    torch.testing.assert_close(probabilities(found, 0.8), expected)
    few = sample(
        Drafter(lambda x: x @ w.T, lambda ids: w[ids], Unembedding(w, 0, V), head, 4, V),
        states,
        sampled,
        torch.full((R,), 0.8),
        torch.arange(R),
    )
    best = (states @ w.T).topk(4).indices
    assert torch.equal(few.candidates.sort(-1).values, best.sort(-1).values)


def test_temperature_0_drafts_the_best_beside_requests_that_sample(drafter: Drafter, parts: tuple) -> None:
    _, _, states, sampled = parts
    greedy = drafter(states.flatten(0, 1), torch.arange(R * K).view(R, K), sampled)
    temperature = torch.tensor([0.0, 5.0, 0.0, 5.0, 5.0])
    found = sample(drafter, states, sampled, temperature, torch.arange(R)).drafts
    assert torch.equal(found[temperature == 0], greedy[temperature == 0])
    assert not torch.equal(found, greedy)


def test_confidence_is_the_share_of_the_draft_among_its_candidates(drafter: Drafter, parts: tuple) -> None:
    w, head, states, sampled = parts
    rows = torch.arange(R * K).view(R, K)
    drafts, probabilities = drafter.with_confidence(states.flatten(0, 1), rows, sampled)
    assert torch.equal(drafts, drafter(states.flatten(0, 1), rows, sampled))
    before = torch.cat([sampled[:, None], drafts[:, :-1]], 1)
    scores = (states if drafter.sampler is None else head(w[before], states)) @ w.T
    if drafter.sampler is not None and drafter.candidates is not None:
        candidates = (states @ w.T).topk(drafter.candidates).indices
        scores = torch.full_like(scores, -torch.inf).scatter(-1, candidates, scores.gather(-1, candidates))
    torch.testing.assert_close(probabilities, scores.softmax(-1).gather(-1, drafts[..., None])[..., 0])
    if drafter.sampler is not None:  # drafts at temperature 0, drawn beside others
        found = sample(drafter, states, sampled, torch.zeros(R), torch.arange(R))
        torch.testing.assert_close(found.confidence(), probabilities)


def test_confidence_does_not_depend_on_temperature(drafter: Drafter, parts: tuple) -> None:
    _, _, states, sampled = parts
    found = sample(drafter, states, sampled, torch.full((R,), 0.3), torch.arange(R))
    expected = (found.scores.softmax(-1) * (found.candidates == found.drafts[..., None])).amax(-1)
    torch.testing.assert_close(found.confidence(), expected)
    assert (found.confidence() < (found.scores / 0.3).softmax(-1).amax(-1)).any()


def test_a_seed_draws_the_same_in_any_batch(drafter: Drafter, parts: tuple) -> None:
    _, _, states, sampled = parts
    temperature, seeds = torch.full((R,), 5.0), torch.tensor([7, -1, 0, 2**62, 7])
    found = sample(drafter, states, sampled, temperature, seeds).drafts
    alone = [sample(drafter, states[i : i + 1], sampled[i : i + 1], temperature[:1], seeds[i : i + 1]).drafts for i in range(R)]
    assert torch.equal(found, torch.cat(alone))
    assert not torch.equal(found, sample(drafter, states, sampled, temperature, seeds + 1).drafts)


def test_sampling_reads_nothing_back(parts: tuple) -> None:
    with FakeTensorMode():
        w = torch.empty(V, D)
        drafter = Drafter(lambda x: x @ w.T, lambda ids: w[ids], Unembedding(w, 0, V), SamplerHead(D).requires_grad_(False), 4, V)
        found = sample(drafter, torch.empty(R, K, D), torch.empty(R, dtype=torch.long), torch.ones(R), torch.arange(R))
    assert found.drafts.shape == (R, K)
    assert found.scores.shape == found.candidates.shape == (R, K, 4)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_compiled_without_guards_each_drafter_draws_as_it_does_uncompiled(device_type: str, parts: tuple) -> None:
    w, head, states, sampled = parts
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(mode=CompilationMode.VLLM_COMPILE, inductor_compile_config={}),
        device_config=SimpleNamespace(device_type=device_type),
    )
    compile = compiler(config)
    assert compile is not None
    step = (states.flatten(0, 1), torch.arange(R * K).view(R, K), sampled)
    drawing = (torch.tensor([0.0, 5.0, 0.0, 5.0, 5.0]), torch.randint(-(2**63), 2**63 - 1, (R,)), torch.arange(R) * 1000)
    for sampler in (None, head):  # two drafters in one process, as two engines have them
        drafter = Drafter(lambda x: x @ w.T, lambda ids: w[ids], Unembedding(w, 0, V), sampler, 4, V)
        with torch.inference_mode():
            for found, expected in zip(compile(drafter.sample)(*step, *drawing), drafter.sample(*step, *drawing), strict=True):
                torch.testing.assert_close(found, expected)
