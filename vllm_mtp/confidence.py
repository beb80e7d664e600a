"""Acceptance by confidence: a draft that the drafter is sure of is taken without a match; any other is verified.

ConfAdapt (*Multi-Token Prediction via Self-Distillation*, arXiv 2602.06019) takes the leading drafts whose own probability is at
least tau, and ends there. Here the first draft below tau is verified instead, so nothing is lost that verification would have
accepted: the accepted run ends at the first draft that is neither taken nor verified, and what stands there is the target's own
token behind the accepted ones.

Nothing of the verification is done anew. Where a draft is taken, the target's distribution is replaced by one that has this token
alone, so verification accepts it, with the random numbers that it would have drawn in any case. No vLLM import.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True)
class Drafted:
    """Drafts of a request and what the drafter thought of each.

    Attributes:
        tokens: the drafts.
        probabilities: of each, as `Drafter.with_confidence` gives them.
        tau: the request's threshold.
        looked_up: whether they are from the request's own text (`lookup`) and the probabilities from what such drafts became.
    """

    tokens: list[int]
    probabilities: list[float]
    tau: float
    looked_up: bool = False

    @cached_property
    def chances(self) -> list[float]:
        """That each draft is accepted, as the drafter sees it; 1 for one that is taken without a match."""
        return [1.0 if probability >= self.tau else probability for probability in self.probabilities]

    def confident(self, scheduled: list[int]) -> list[bool]:
        """Which of the drafts that came to be verified are at tau or above; none, where others stand in their place."""
        count = len(scheduled)
        if self.tokens[:count] != scheduled:
            return [False] * count
        return [probability >= self.tau for probability in self.probabilities[:count]]


@dataclass
class ConfidentDrafts:
    """Drafts of a step that the drafter is sure of, and what became of them.

    Attributes:
        confident: drafts at tau or above, request by request, [D], bool.
        taken: those of them that the request allows: the target gives them some probability. Known once verification has run.
        unmatched: those taken where the target's best token is another.
    """

    confident: torch.Tensor
    taken: torch.Tensor | None = None
    unmatched: torch.Tensor | None = None

    def certain(self, logits: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
        """The target's logits with rows of taken drafts made certain, [D, V]; a copy.

        Args:
            logits: of the target in the drafts' places, after everything that the request asks for: a token that is not allowed
                (by grammar, `bad_words`, top-k and the rest) has -inf and is not taken.
            drafts: [D]; below 0 for one that must be rejected.
        """
        at = drafts.long().clamp(min=0)[:, None]
        chosen = logits.gather(1, at)
        self.taken = self.confident & (drafts >= 0) & (chosen[:, 0] > -torch.inf)
        self.unmatched = self.taken & (logits.argmax(-1) != drafts)
        taken = self.taken[:, None]
        return logits.masked_fill(taken, -torch.inf).scatter_(1, at, torch.where(taken, 0.0, chosen))

    def certain_best(self, best: np.ndarray, logits: np.ndarray, rows: np.ndarray, drafts: np.ndarray) -> np.ndarray:
        """`certain` for greedy verification on a host: the target's best tokens, with taken drafts in their places.

        Args:
            best: the target's token behind every verified row, [D + R].
            logits: that these are the best of, [D + R, V].
            rows: where in them the drafts' places are, [D].
            drafts: [D].
        """
        taken = self.confident.numpy() & (logits[rows, drafts] > -np.inf)
        self.taken, self.unmatched = torch.from_numpy(taken), torch.from_numpy(taken & (best[rows] != drafts))
        best[rows[taken]] = drafts[taken]
        return best


NONE = -1.0
"""The probability of a draft that must not be taken: below every threshold."""


@dataclass(frozen=True)
class DraftedRequests:
    """The last drafts of all requests, for a runner whose host does not wait for the device: what is known of them stays there.

    Attributes:
        probabilities: of the drafts of each request's state, as `Drafter.with_confidence` gives them, or `NONE`, [N, k + 1]:
            one more than there are drafts, so that the row behind the last one has a place too.
        tau: thresholds, [N], float64: in float32 one that is just above 1 would be 1.
        taken, unmatched: of the drafts verified last, as `ConfidentDrafts` has them, [N, k + 1].
    """

    probabilities: torch.Tensor
    tau: torch.Tensor
    taken: torch.Tensor
    unmatched: torch.Tensor

    @classmethod
    def of(cls, num_states: int, k: int, device: torch.device) -> "DraftedRequests":
        """Of so many states, without a draft."""
        probabilities = torch.full((num_states, k + 1), NONE, dtype=torch.float32, device=device)
        tau = torch.full((num_states,), torch.inf, dtype=torch.float64, device=device)
        return cls(probabilities, tau, *(torch.zeros_like(probabilities, dtype=torch.bool) for _ in range(2)))

    def add(self, state: int, tau: float) -> None:
        """A request begins, in a state that another one may have had."""
        self.tau[state].fill_(tau)
        self.probabilities[state].fill_(NONE)

    def keep(self, states: torch.Tensor, probabilities: torch.Tensor | float) -> None:
        """Takes in the drafts that are verified next.

        Args:
            states: of their requests, [R].
            probabilities: [R, k], or one for all.
        """
        self.probabilities[states, : self.probabilities.shape[1] - 1] = probabilities

    def verified(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Probabilities of the drafts of `states`, 0 where there was none, and which of them were taken and unmatched, [R, k] each.

        The next time they are as if none was taken, unless other drafts have been verified.
        """
        k = self.probabilities.shape[1] - 1
        taken = self.taken[states, :k]
        unmatched = taken & self.unmatched[states, :k]
        self.taken[states] = False
        return self.probabilities[states, :k].clamp(min=0), taken, unmatched

    def certain(self, logits: torch.Tensor, tokens: torch.Tensor, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The target's logits with rows of taken drafts made certain, [D + R, V]; a copy. For all requests of a step or for some.

        Args:
            logits: of the target behind every verified row, request by request, as `ConfidentDrafts.certain` takes them.
            tokens: in those rows, [D + R]: a request's last one, and behind it its drafts; below 0 for one that must be rejected.
            states: of the rows' requests, [D + R].
            positions: how many drafts of its request stand up to each row, [D + R].
        """
        drafts = torch.where(positions.roll(-1) > 0, tokens.roll(-1), -1)
        step = ConfidentDrafts(self.probabilities[states, positions] >= self.tau[states])
        certain = step.certain(logits, drafts)
        assert step.taken is not None
        assert step.unmatched is not None
        self.taken[states, positions], self.unmatched[states, positions] = step.taken, step.unmatched
        return certain


Drafts = ConfidentDrafts | DraftedRequests
Failed = Callable[[Exception], None]
_RUNNING: ContextVar[tuple[Drafts, Failed] | None] = ContextVar("confident drafts of the running step", default=None)


@contextmanager
def taking(drafts: Drafts, failed: Failed) -> Iterator[None]:
    """While verification runs, `running` gives `drafts`, and `certain` makes their rows certain.

    Args:
        drafts: those of the step.
        failed: is told of an exception in `certain`, which then changes nothing.
    """
    token = _RUNNING.set((drafts, failed))
    try:
        yield
    finally:
        _RUNNING.reset(token)


def running() -> ConfidentDrafts | None:
    """The confident drafts of the step that is being verified, None where there are none, or none that the host knows."""
    found = _RUNNING.get()
    return found[0] if found is not None and isinstance(found[0], ConfidentDrafts) else None


def certain(logits: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
    """The target's logits as the drafts of the running step make them (`ConfidentDrafts`, `DraftedRequests`); as they are where it
    has none."""
    found = _RUNNING.get()
    if found is None:
        return logits
    drafts, failed = found
    try:
        return drafts.certain(logits, *rows)
    except Exception as error:
        failed(error)
        return logits
