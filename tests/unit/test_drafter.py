"""Candidate scoring against the paper's full computation."""

import pytest
import torch

from vllm_mtp.drafter import Drafter, Unembedding
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
