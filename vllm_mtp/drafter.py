"""From mask states to drafts: the plain head proposes candidates for all states at once, the sampler head chooses among them
in turn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from vllm_mtp.noise import gumbel


class Sampler(Protocol):
    """A sampler head in two parts (`sampler_head.SamplerHead`): what needs mask states only, and the rest."""

    def project(self, z: torch.Tensor) -> torch.Tensor: ...

    def step(self, previous: torch.Tensor, projected: torch.Tensor, z: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Unembedding:
    """Rows of the unembedding W [V, d] that can be read one by one: all of them, or those of one tensor-parallel rank.

    Attributes:
        weight: [n, d]; row i belongs to token `first` + i. Rows from token `end` on are padding.
        first, end: tokens whose rows are here.
        sum_over_ranks: adds a tensor up over the ranks, where they share W; None: all rows are here.
    """

    weight: torch.Tensor
    first: int
    end: int
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """W[tokens] as float32, [..., d]; zeros where another rank has the row."""
        if self.sum_over_ranks is None:
            return self.weight[tokens].float()
        here = (tokens >= self.first) & (tokens < self.end)
        return self.weight[torch.where(here, tokens - self.first, 0)].float() * here[..., None]

    def scores(self, rows: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """W[tokens] s of each request's candidates, the same on every rank, [R, C].

        The ranks exchange scores, never rows of W: those are d times as much.

        Args:
            rows: `rows(tokens)`, [R, C, d].
            state: s, [R, d].
        """
        # Not a batched product: in bf16 on a CPU one of a single column takes ten times as long.
        scores = (rows * state[:, None]).sum(-1)
        return scores if self.sum_over_ranks is None else self.sum_over_ranks(scores)


class SampledDrafts(NamedTuple):
    """Drafts, and the distribution that each was drawn from: softmax(scores / temperature) over its candidates, 0 elsewhere.

    Attributes:
        drafts: [R, k].
        candidates: tokens, [R, k, C].
        scores: of the candidates, [R, k, C], float32.
    """

    drafts: torch.Tensor
    candidates: torch.Tensor
    scores: torch.Tensor

    def confidence(self) -> torch.Tensor:
        """Probabilities of the drafts as `Drafter.with_confidence` gives them, at temperature 1 whatever they were drawn at."""
        return (self.scores.softmax(-1) * (self.candidates == self.drafts[..., None])).sum(-1)


class Drafter:
    """Turns the states of one group a request into drafts.

    y_0 is the token sampled last; for i = 1 .. k: y_i = argmax over the candidates of W MLP([E(y_{i-1}); z_i])
    (*Your LLM Knows the Future*, section 3.2). The paper scores the whole vocabulary k times, one after the other; here one
    batched pass
    of the plain head over all k states gives C candidates a state and the sampler head scores those rows of W only. With C at
    least the vocabulary the two are the same computation and the plain head is not run at all.

    Args:
        compute_logits: the target's unembedding, [n, d] -> [n, V].
        embed: the target's embedding, [n] -> [n, d].
        unembedding: W, or None if it cannot be read row by row; then every token is a candidate.
        sampler: the sampler head, or None: drafts are the plain head's argmax.
        candidates: C.
        vocab_size: V.
    """

    def __init__(
        self,
        compute_logits: Callable[[torch.Tensor], torch.Tensor],
        embed: Callable[[torch.Tensor], torch.Tensor],
        unembedding: Unembedding | None,
        sampler: Sampler | None,
        candidates: int,
        vocab_size: int,
    ) -> None:
        self.compute_logits, self.embed, self.unembedding, self.sampler = compute_logits, embed, unembedding, sampler
        self.candidates = candidates if unembedding is not None and candidates < vocab_size else None

    def __call__(self, hidden: torch.Tensor, rows: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        """Drafts [R, k].

        Args:
            hidden: mask states after the final norm, [M, d].
            rows: where in it z_1 .. z_k of each request stand, [R, k].
            sampled: y_0, [R].
        """
        states = hidden[rows]
        if self.sampler is None:
            return self.compute_logits(states.flatten(0, 1)).argmax(-1).view(rows.shape)
        return self._in_turn(self.sampler, states, sampled, _best)

    def with_confidence(self, hidden: torch.Tensor, rows: torch.Tensor, sampled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The drafts that `__call__` gives, and the probability of each, [R, k], float32: at temperature 1, normalised over the
        candidates that it was chosen from, given the drafts before it.

        Args:
            hidden, rows, sampled: as `__call__` takes them.
        """
        states = hidden[rows]
        if self.sampler is None:
            best, tokens = self.compute_logits(states.flatten(0, 1)).float().softmax(-1).max(-1)
            return tokens.view(rows.shape), best.view(rows.shape)
        probabilities = []

        def choose(scores: torch.Tensor, candidates: torch.Tensor | None, i: int) -> torch.Tensor:
            probabilities.append(scores.float().softmax(-1).amax(-1))
            return _best(scores, candidates, i)

        return self._in_turn(self.sampler, states, sampled, choose), torch.stack(probabilities, 1)

    def sample(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        sampled: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
    ) -> SampledDrafts:
        """Drafts that are drawn instead of being the best: y_i from softmax(score / temperature) over the candidates, where the
        scores depend on y_{i-1} as drawn. A request at temperature 0 gets what `__call__` gives it.

        Args:
            hidden, rows, sampled: as `__call__` takes them.
            temperature: of each request, [R], float32.
            seeds: of each request, [R], int64. The same seed at the same position draws the same.
            positions: of y_0, [R], int64. y_i is drawn with the position of the token before it, as vLLM counts its own draws.
        """
        states, k = hidden[rows], rows.shape[1]
        warm = (temperature > 0)[:, None]
        scale = torch.where(warm, temperature[:, None], 1.0)
        all_candidates, all_scores = [], []

        def draw(scores: torch.Tensor, candidates: torch.Tensor | None, i: int) -> torch.Tensor:
            scores = scores.float()
            if candidates is None:
                candidates = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
            all_candidates.append(candidates)
            all_scores.append(scores)
            noise = torch.where(warm, gumbel(seeds, positions + i, candidates), 0.0)
            return _best(scores / scale + noise, candidates, i)

        if self.sampler is not None:
            drafts = self._in_turn(self.sampler, states, sampled, draw)
        else:
            logits, tokens = self.compute_logits(states.flatten(0, 1)).view(*rows.shape, -1), None
            if self.candidates is not None:
                logits, tokens = logits.topk(self.candidates, sorted=False)
            drafts = torch.stack([draw(logits[:, i], None if tokens is None else tokens[:, i], i) for i in range(k)], 1)
        return SampledDrafts(drafts, torch.stack(all_candidates, 1), torch.stack(all_scores, 1))

    def _in_turn(
        self,
        sampler: Sampler,
        states: torch.Tensor,
        sampled: torch.Tensor,
        choose: Callable[[torch.Tensor, torch.Tensor | None, int], torch.Tensor],
    ) -> torch.Tensor:
        """Drafts [R, k] of the sampler head, one after the other.

        Args:
            sampler: the sampler head.
            states: [R, k, d].
            sampled: y_0, [R].
            choose: (scores [R, C], candidates [R, C] or None where every token is one, i) -> y_i [R].
        """
        num_requests, k, _ = states.shape
        tokens, weights = None, None
        if self.candidates is not None:
            assert self.unembedding is not None
            tokens = self.compute_logits(states.flatten(0, 1)).topk(self.candidates, sorted=False).indices.view(num_requests, k, -1)
            weights = self.unembedding.rows(tokens)
        projected = sampler.project(states)
        previous, drafts = sampled, []
        for i in range(k):
            state = sampler.step(self.embed(previous), projected[:, i], states[:, i])
            if tokens is None or weights is None or self.unembedding is None:
                previous = choose(self.compute_logits(state), None, i)
            else:
                previous = choose(self.unembedding.scores(weights[:, i], state), tokens[:, i], i)
            drafts.append(previous)
        return torch.stack(drafts, 1)


def _best(scores: torch.Tensor, candidates: torch.Tensor | None, i: int) -> torch.Tensor:
    """The candidate with the highest score, [R]."""
    if candidates is None:
        return scores.argmax(-1)
    return candidates.gather(1, scores.argmax(1, keepdim=True))[:, 0]
