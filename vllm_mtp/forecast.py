"""What a step with a layout will give and cost, from what steps have given and cost: acceptance by position, and time by rows."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

HOPED, HOPED_WEIGHT = 0.6, 4.0
"""What is thought of the first draft before one was seen, and how many drafts that is worth; of others, as of the one before."""
FORGET = 0.98  # what older bursts of steps count when a new one comes in
DRAFTS_IN_MIND = 300.0
"""Drafts at a position after which older ones begin to count less."""
NOISE = 0.05  # relative, of a burst's mean step time


class Acceptance:
    """How often the i-th draft of a step is accepted when all before it were, newer steps counting more."""

    def __init__(self, k: int) -> None:
        self.offered, self.accepted = [0.0] * k, [0.0] * k

    def observe(self, drafts: Sequence[int], accepted: Sequence[int]) -> None:
        """Takes in one step: drafts that each request verified, and how many of them were accepted."""
        for count, good in zip(drafts, accepted, strict=True):
            for i in range(min(count, good + 1)):
                self.offered[i] += 1
                self.accepted[i] += i < good
        for i, offered in enumerate(self.offered):
            if offered > DRAFTS_IN_MIND:
                self.accepted[i] *= DRAFTS_IN_MIND / offered
                self.offered[i] = DRAFTS_IN_MIND

    def by_position(self) -> list[float]:
        """The probability for each of the k drafts."""
        found, hoped = [], HOPED
        for offered, accepted in zip(self.offered, self.accepted, strict=True):
            hoped = (accepted + HOPED_WEIGHT * hoped) / (offered + HOPED_WEIGHT)
            found.append(hoped)
        return found


def tokens_and_rows(lengths: tuple[int, ...], acceptance: Sequence[float]) -> tuple[float, float]:
    """Tokens that a request gets of a step, and rows that it takes, in the mean over many steps with a layout.

    How many drafts a request verifies depends on what it accepted the step before, as `layout.plan_groups` has it; the mean is over
    the stationary distribution of that number.

    Args:
        lengths: group lengths by drafts accepted.
        acceptance: of each draft when all before it were accepted.
    """
    k, width = len(lengths) - 1, max(lengths)
    if not width:
        return 1.0, 1.0
    states = {width: 1.0}
    for _ in range(24):
        tokens = rows = 0.0
        following: dict[int, float] = defaultdict(float)
        for drafts, share in states.items():
            reached = 1.0
            rows += share * (1 + drafts)
            for accepted in range(drafts + 1):
                group = width if accepted == drafts < k else lengths[accepted]
                further = acceptance[accepted] if accepted < drafts else 0.0
                ends = share * reached * (1 - further)
                tokens, rows = tokens + ends * (1 + accepted), rows + share * group
                following[group] += ends
                reached *= further
        # Half of the old, for a linear layout without luck goes to and fro between two states.
        states = {count: (states.get(count, 0.0) + following[count]) / 2 for count in states.keys() | following.keys()}
    return tokens, rows


class StepCost:
    """Seconds of a step by what is in it: a linear model, fitted to bursts of steps, newer ones counting more.

    seconds = a + b requests + c (rows - requests) + [has mask rows] (d + e requests). Of what bursts have not told apart yet, an
    even part is believed of each term. Machines have neighbours, and the same step takes longer for a while: a caller should bring
    bursts in pairs, of two layouts one right after the other.
    """

    SHARES = np.array([0.6, 0.05, 0.02, 0.15, 0.01])
    """Of the first burst's time, before anything is known: the terms for one request and one row more, and without prejudice: each
    may as well be twice that or nothing."""

    def __init__(self) -> None:
        self.is_fitted = False
        self.prior = np.eye(5), np.zeros(5)
        self.precision, self.weighted = np.zeros((5, 5)), np.zeros(5)
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
            believed = self.SHARES * seconds / np.array([1, requests, requests, 1, requests])
            self.prior, self.is_fitted = (np.diag(1 / believed**2), 1 / believed), True
        facts = self._facts(requests, rows) / (NOISE * seconds)
        self.precision = FORGET * self.precision + np.outer(facts, facts)
        self.weighted = FORGET * self.weighted + facts / NOISE
        self.terms = np.linalg.solve(self.prior[0] + self.precision, self.prior[1] + self.weighted)

    def predict(self, requests: float, rows: float) -> float:
        """Seconds of such a step, 1 for all before the first burst; of more rows never less than of none but the requests' own."""
        facts = self._facts(requests, rows)
        plain = max(float(facts[:2] @ self.terms[:2]), 1e-9)
        return plain + max(float(facts[2:] @ self.terms[2:]), 0.0)
