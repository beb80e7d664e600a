"""Which drafts of a request are verified, and which of its rows get how many mask tokens, under `auto`: a row where it is likely to
bring a token.

Drafts come with the drafter's own probability, so before a step runs it is known how likely each row is to be the one that is
accepted last. A mask token behind row j brings a token if exactly j drafts are accepted, and then it and all before it in its group
are right. It is worth its row, and the row that verifies it a step later, if that chance is above what a row costs in tokens. So a
request that is sure of its drafts gets one long group behind the last of them, one that is not gets short ones behind every row,
and as rows become dear, in large batches, only those that are nearly certain are left. Nothing of this changes what is accepted.

The probabilities are held against what became of the request's drafts before: how much better or worse the drafter is than it
thinks, and how far its groups reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from vllm_mtp.forecast import Acceptance

SHAPED: tuple[int, ...] = ()
"""Stands for the layout of a step whose requests have groups of their own."""
FIRST_PRICE = 0.03
"""Of a row, in tokens, before anything was measured; within twice or half of the true one little is lost."""
LOWEST_PRICE = 0.002
DEARER = 1.5  # how much the price rises at a time until a step's mask rows have room
STEPS_IN_MIND = 20.0
"""Drafts at a position after which a request's older ones begin to count less."""
SERVERS_WEIGHT = 4.0
"""Drafts of its own after which a request counts as much as all requests before it."""
FADES = 0.97
"""What is left of what is known of a request after a step without drafts: hard text does not stay hard, and nobody would see it."""
HOPES_AGAIN = 0.9
"""What is left of what is known of all requests together after a step in which none has drafts."""
BELIEVED_IN_MIND = 50.0
"""Accepted drafts, as the drafter expects them, after which older ones begin to count less."""


class Trust:
    """How many of the drafts that were reached are accepted, of those that the drafter expects: above 1 where it is too modest."""

    def __init__(self, factor: float = 1.0) -> None:
        self.expected, self.accepted = SERVERS_WEIGHT, SERVERS_WEIGHT * factor

    @property
    def factor(self) -> float:
        """What to multiply a probability by."""
        return self.accepted / self.expected

    def observe(self, probability: float, accepted: bool) -> None:
        """Takes in a draft that was reached."""
        self.expected += probability
        self.accepted += accepted
        if self.expected > BELIEVED_IN_MIND:
            self.accepted *= BELIEVED_IN_MIND / self.expected
            self.expected = BELIEVED_IN_MIND

    def fade(self, share: float) -> None:
        """Comes nearer to taking the drafter at its word."""
        self.accepted = share * self.accepted + (1 - share) * self.expected


class Verified(NamedTuple):
    """A request and the drafts that it verifies in a step.

    Attributes:
        request: its name.
        probabilities: of its drafts, as the drafter sees them.
        goes_on: whether more is at hand if all of them are accepted (`lookup`), so that no mask token is wanted behind the last.
    """

    request: str
    probabilities: Sequence[float]
    goes_on: bool = False


@dataclass
class Record:
    """What became of one request's drafts.

    Attributes:
        acceptance: by position in a group.
        trust: in the drafter's probabilities.
    """

    acceptance: Acceptance
    trust: Trust


@dataclass
class Shaper:
    """Shapes the groups of requests.

    Attributes:
        k: most mask tokens of a group.
        price: what a row costs, in tokens: its time over the time that a token takes on this server now.
    """

    k: int
    price: float = FIRST_PRICE
    records: dict[str, Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.acceptance, self.trust = Acceptance(self.k), Trust()

    def observe(self, request: str, probabilities: Sequence[float], accepted: int) -> None:
        """Takes in drafts that were verified.

        Args:
            request: whose they were.
            probabilities: of those that were verified.
            accepted: how many of them were.
        """
        record = self._record(request)
        for acceptance in (self.acceptance, record.acceptance):
            acceptance.observe(len(probabilities), accepted)
        for draft, probability in enumerate(probabilities[: accepted + 1]):
            self.trust.observe(probability, draft < accepted)
            record.trust.observe(probability, draft < accepted)

    def keep(self, running: Sequence[str]) -> None:
        """Forgets all requests but these."""
        if len(self.records) > 2 * len(running) + 8:
            self.records = {request: self.records[request] for request in running if request in self.records}

    def worth_verifying(self, request: str, chances: Sequence[float]) -> int:
        """How many leading drafts are worth a row each: those that are accepted with a chance above the price.

        Args:
            request: whose they are.
            chances: of its drafts, as they are `believed`.
        """
        count = self.worth_a_row(chances)
        if chances and not count:
            self._record(request).trust.fade(FADES)
        return count

    def believed(self, request: str, probabilities: Sequence[float]) -> list[float]:
        """Chances of a request's drafts, by what the drafter thinks and what became of others that it thought so of."""
        trust = self._record(request).trust.factor
        return [min(1.0, trust * probability) for probability in probabilities]

    def worth_a_row(self, chances: Sequence[float]) -> int:
        """How many leading drafts are worth a row each.

        Args:
            chances: that each is accepted if those before it are.
        """
        reached = accumulate(chances, mul)
        return next((count for count, chance in enumerate(reached) if chance <= self.price), len(chances))

    def shapes(self, requests: Sequence[Verified | None], room: int) -> tuple[tuple[int, ...], ...]:
        """Lengths of the groups behind each request's rows: by drafts accepted, one more than it has drafts.

        Where there is not enough room, rows are dearer for all of them until there is.

        Args:
            requests: of the step; None for one that has no group.
            room: most mask rows.
        """
        price = self.price
        while True:
            lengths = tuple([() if one is None else self._lengths(one, price) for one in requests])
            if sum(map(sum, lengths)) <= room or price >= 1.0:
                break
            price *= DEARER
        for one, groups in zip(requests, lengths, strict=True):
            if one is not None and not any(groups):
                self._record(one.request).acceptance.fade(FADES)
        known = [one for one in requests if one is not None]
        if known and not any(map(any, lengths)) and not any(one.probabilities for one in known):
            self.acceptance.fade(HOPES_AGAIN)
            self.trust.fade(HOPES_AGAIN)
        return lengths

    def _lengths(self, verified: Verified, price: float) -> tuple[int, ...]:
        record, count = self._record(verified.request), len(verified.probabilities)
        further = record.acceptance.by_position()
        sure = verified.probabilities if verified.goes_on else self.believed(verified.request, verified.probabilities)
        lengths, reached = [], 1.0
        for accepted in range(count + 1):
            last = reached * (1.0 - sure[accepted]) if accepted < count else reached
            length, gain, asked = 0, last, price * (1.0 + last)
            while length < (0 if verified.goes_on and accepted == count else self.k):
                # What stands there was drafted before, from less: how sure that was tells how hard the text is.
                before = accepted + 1 + length
                gain *= (further[length] + sure[before]) / 2 if before < count else further[length]
                if gain <= asked:
                    break
                length += 1
            lengths.append(length)
            if accepted < count:
                reached *= sure[accepted]
        return tuple(lengths)

    def _record(self, request: str) -> Record:
        record = self.records.get(request)
        if record is None:
            acceptance = Acceptance(self.k, self.acceptance.by_position(), SERVERS_WEIGHT, STEPS_IN_MIND)
            record = self.records[request] = Record(acceptance, Trust(self.trust.factor))
        return record
