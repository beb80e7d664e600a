"""What a step will give and cost, from what steps have given and cost: acceptance by position, and time by rows."""

from collections.abc import Sequence

import numpy as np

HOPED, HOPED_WEIGHT = 0.6, 4.0
"""What is thought of the first draft before one was seen, and how many drafts that is worth; of others, as of the one before."""
FORGET = 0.98  # what older bursts of steps count when a new one comes in
DRAFTS_IN_MIND = 300.0
"""Drafts at a position after which older ones begin to count less."""
NOISE = 0.05  # relative, of a burst's mean step time


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


class StepCost:
    """Seconds of a step by what is in it: a linear model, fitted to bursts of steps, newer ones counting more.

    seconds = a + b requests + c (rows - requests) + [has mask rows] (d + e requests). What bursts have not told apart yet is
    believed to be shared out as on a machine that was known before. Machines have neighbours, and the same step takes longer for a
    while: a caller should bring bursts in pairs, of two layouts one right after the other.
    """

    BELIEVED = np.array([1.0, 0.08, 0.03, 0.25, 0.02])
    """The terms beside a, before anything is known and without prejudice: each may as well be twice that or nothing."""

    def __init__(self) -> None:
        self.is_fitted = False
        self.prior = np.eye(5), np.zeros(5)
        self.precision, self.weighted = np.zeros((5, 5)), np.zeros(5)
        self.row_precision = self.row_weighted = 0.0
        self.terms = np.array([1.0, 0, 0, 0, 0])

    @staticmethod
    def _facts(requests: float, rows: float) -> np.ndarray:
        extra = rows - requests
        return np.array([1.0, requests, extra, extra > 0, requests * (extra > 0)])

    def observe(self, requests: float, rows: float, seconds: float) -> None:
        """Takes in a burst.

        Args:
            requests, rows: of a step, in the mean; rows are verified ones and mask rows.
            seconds: of a step, in the mean.
        """
        if not self.is_fitted:
            believed = self.BELIEVED * seconds / float(self._facts(requests, rows) @ self.BELIEVED)
            self.prior, self.is_fitted = (np.diag(1 / believed**2), 1 / believed), True
        facts = self._facts(requests, rows) / (NOISE * seconds)
        self.precision = FORGET * self.precision + np.outer(facts, facts)
        self.weighted = FORGET * self.weighted + facts / NOISE
        self._solve()

    def observe_rows(self, rows: float, seconds: float, step: float) -> None:
        """Takes in what more rows took, within a burst whose steps had more of them and fewer.

        Args:
            rows: that some steps had more than others, in the mean.
            seconds: that they took longer.
            step: seconds of a step.
        """
        noise = 2 * NOISE * step
        self.row_precision = FORGET * self.row_precision + (rows / noise) ** 2
        self.row_weighted = FORGET * self.row_weighted + rows * seconds / noise**2
        self._solve()

    @property
    def of_a_row(self) -> float:
        """Seconds of one row more; 0 before the first burst."""
        return max(float(self.terms[2]), 0.0)

    def _solve(self) -> None:
        precision, weighted = self.prior[0] + self.precision, self.prior[1] + self.weighted
        precision[2, 2] += self.row_precision
        weighted[2] += self.row_weighted
        self.terms = np.linalg.solve(precision, weighted)

    def predict(self, requests: float, rows: float) -> float:
        """Seconds of such a step, 1 for all before the first burst; of more rows never less than of none but the requests' own."""
        facts = self._facts(requests, rows)
        plain = max(float(facts[:2] @ self.terms[:2]), 1e-9)
        return plain + max(float(facts[2:] @ self.terms[2:]), 0.0)
