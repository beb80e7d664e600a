"""What a step will give and cost, from what steps have given and cost: acceptance by position, and time by rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

HOPED, HOPED_WEIGHT = 0.6, 4.0
"""What is thought of the first draft before one was seen, and how many drafts that is worth; of others, as of the one before."""
FORGET = 0.98  # what is left of what older bursts of steps have shown when a new one shows the same
DRAFTS_IN_MIND = 300.0
"""Drafts at a position after which older ones begin to count less."""
NOISE = 0.05  # relative, of a burst's mean step time
WITHOUT_DRAFTS, OF_DRAFTS, OF_PROMPTS = [0, 1, 5], [2, 3, 4, 6], [7]  # terms of a step's cost


class Acceptance:
    """How often the i-th draft of a step is accepted when all before it were, newer steps counting more.

    Args:
        k: positions.
        hoped: what is thought of each before one was seen; None: of the first `HOPED`, of others as of the one before.
        weight: how many drafts that is worth.
        in_mind: drafts at a position after which older ones begin to count less.
    """

    def __init__(
        self, k: int, hoped: Sequence[float] | None = None, weight: float = HOPED_WEIGHT, in_mind: float = DRAFTS_IN_MIND
    ) -> None:
        self.offered, self.accepted = [0.0] * k, [0.0] * k
        self.hoped, self.weight, self.in_mind = hoped, weight, in_mind

    def observe(self, drafts: int, accepted: int) -> None:
        """Takes in a verification: how many drafts there were, and how many of them were accepted."""
        for i in range(min(drafts, accepted + 1)):
            self.offered[i] += 1
            self.accepted[i] += i < accepted
            if self.offered[i] > self.in_mind:
                self.accepted[i] *= self.in_mind / self.offered[i]
                self.offered[i] = self.in_mind

    def fade(self, share: float) -> None:
        """Makes what was seen count less, so that what was hoped counts more."""
        self.offered = [share * offered for offered in self.offered]
        self.accepted = [share * accepted for accepted in self.accepted]

    def by_position(self) -> list[float]:
        """The probability for each of the k drafts."""
        found, before = [], HOPED
        for i, (offered, accepted) in enumerate(zip(self.offered, self.accepted, strict=True)):
            hoped = before if self.hoped is None else self.hoped[i]
            before = (accepted + self.weight * hoped) / (offered + self.weight)
            found.append(before)
        return found


class Batch(NamedTuple):
    """What is in a step, or in those of a burst in the mean.

    Attributes:
        requests: that decode.
        rows: of these: verified ones and mask rows.
        context: tokens of a request.
        prompt_rows: of prompts, beside those.
    """

    requests: float
    rows: float
    context: float = 0.0
    prompt_rows: float = 0.0

    @property
    def facts(self) -> np.ndarray:
        """What each term of a step's cost is multiplied with, shape [8]."""
        extra, context = self.rows - self.requests, self.context / 1000
        of_drafts = [extra, extra > 0, self.requests * (extra > 0)]
        return np.array([1.0, self.requests, *of_drafts, self.requests * context, extra * context, self.prompt_rows])


class StepCost:
    """Seconds of a step by what is in it: a linear model, fitted to bursts of steps, newer ones counting more.

    seconds = a + b requests + c extra + [has extra] (d + e requests) + context (f requests + g extra) + h prompt rows, where extra
    are the rows but for one a request, and context is in thousands of tokens. What bursts have not told apart yet is believed to be
    shared out as on a machine that was known before. Machines have neighbours, and the same step takes longer for a while: a caller
    should bring bursts in pairs, of two layouts one right after the other, or what two such took more or less.

    Args:
        terms: a .. h as an earlier server found them (`self.terms`), in seconds; None: nothing is known.
    """

    BELIEVED = np.array([1.0, 0.08, 0.03, 0.25, 0.02, 0.1, 0.05, 0.03])
    """The terms beside a, before anything is known and without prejudice: each may as well be twice that or nothing."""

    def __init__(self, terms: Sequence[float] | None = None) -> None:
        self.is_fitted = False
        self.terms = np.eye(len(self.BELIEVED))[0]
        self.precision = np.eye(len(self.BELIEVED))
        """Of the terms, [8, 8]: the inverse of their covariance."""
        if terms is not None:
            self._believe(np.array(terms, dtype=float))

    def _believe(self, terms: np.ndarray) -> None:
        spread = np.maximum(np.abs(terms), 1e-3 * np.abs(terms).max() * self.BELIEVED)
        self.terms, self.precision, self.is_fitted = terms, np.diag(1 / spread**2), True

    def observe(self, batch: Batch, seconds: float) -> None:
        """Takes in a burst and the seconds of a step, both in the mean."""
        if not self.is_fitted:
            self._believe(self.BELIEVED * seconds / float(batch.facts @ self.BELIEVED))
        self._learn(batch.facts, seconds, NOISE * seconds)

    def observe_change(self, before: Batch, after: Batch, seconds: float, step: float) -> None:
        """Takes in what steps took longer than others right before or among them, which also tells something where nobody knows
        how fast the machine is at the moment.

        Args:
            before, after: the others and the steps, in the mean; not the same.
            seconds: that these took longer.
            step: seconds of a step.
        """
        self._learn(after.facts - before.facts, seconds, 2 * NOISE * step)

    def _learn(self, facts: np.ndarray, seconds: float, noise: float) -> None:
        """Recursive least squares with directional forgetting: what is known of the terms counts less only as far as it is what
        `facts` tell anew (Kulhavy, Automatica 23, 1987). What long contexts cost is not forgotten while requests are short."""
        told = self.precision @ facts
        kept = self.precision - (1 - FORGET) * np.outer(told, told) / float(facts @ told)
        self.precision = kept + np.outer(facts, facts) / noise**2
        self.terms = np.linalg.solve(self.precision, kept @ self.terms + facts * seconds / noise**2)

    def of_a_row(self, context: float = 0.0) -> float:
        """Seconds of one row more at so many tokens of context; 0 before the first burst."""
        return max(float((Batch(1, 3, context).facts - Batch(1, 2, context).facts) @ self.terms), 0.0)

    def predict(self, batch: Batch) -> float:
        """Seconds of such a step, 1 for all before the first burst; of more rows never less than of none but the requests' own."""
        cost = batch.facts * self.terms
        more = (max(float(cost[terms].sum()), 0.0) for terms in (OF_DRAFTS, OF_PROMPTS))
        return max(float(cost[WITHOUT_DRAFTS].sum()), 1e-9) + sum(more)

    def is_mostly_prompts(self, batch: Batch) -> bool:
        """Whether prompts take more of such a step than all else in it, if their rows take what those of drafts do.

        What is thought of prompts themselves may be wrong, and would stay so if it kept such steps from being looked at.
        """
        terms = self.terms if self.is_fitted else self.BELIEVED
        of_a_row = float(terms[OF_DRAFTS[0]])
        return batch.prompt_rows * of_a_row > float((batch.facts * terms)[WITHOUT_DRAFTS + OF_DRAFTS].sum())
