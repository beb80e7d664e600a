"""The drafts that requests were given: chosen among what mask tokens and the request's own text offer, kept until they are
verified, which may be some steps later, and counted then. For a runner whose host knows drafts and texts. No vLLM import."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

import numpy as np

from vllm_mtp.confidence import Drafted
from vllm_mtp.lookup import Lookup, beside
from vllm_mtp.plan import Counters
from vllm_mtp.shaping import Shaper, Verified


@dataclass
class GivenDrafts:
    """The last drafts of every request.

    Attributes:
        counters: told of what becomes of them.
        shaper: says what a draft is worth; None: all are handed out.
        lookup: finds drafts in texts, if there is a shaper; None: there are those of mask tokens alone.
        drafted: by request.
    """

    counters: Counters
    shaper: Shaper | None = None
    lookup: Lookup | None = None
    drafted: dict[str, Drafted] = field(default_factory=dict)

    def look_up(self, request: str, text: np.ndarray, generated: Sequence[int], wanted: int) -> list[int]:
        """Drafts from a request's own text, which `give` or `give_found` takes; none where there are none.

        Args:
            request: whose they are.
            text: its tokens, [n], int32.
            generated: the last ones, of this step.
            wanted: drafts that it can use.
        """
        if self.lookup is None or self.shaper is None:
            return []
        self.lookup.observe(request, generated, len(text) - len(generated))
        return self.lookup.find(request, text, wanted)

    def give(self, request: str, drafted: Drafted, usable: int, found: Sequence[int] = ()) -> list[int]:
        """The drafts to hand out to a request: those of its mask tokens that are worth a row, or the text's if more of those are
        hoped to be accepted.

        Args:
            request: whose they are.
            drafted: of its mask tokens.
            usable: how many of them it can use.
            found: what `look_up` found.
        """
        self.drafted[request], tokens = drafted, drafted.tokens[:usable]
        if self.shaper is None:
            return tokens
        believed = self.shaper.believed(request, drafted.chances[:usable])
        if found:
            assert self.lookup is not None
            chances = self.lookup.chances(request, self.shaper.price, tokens, believed)
            known = beside(tokens, believed, found, chances)
            taken = drafted.confident(tokens)  # whatever the text says
            believed = [own if sure else other for own, sure, other in zip(believed, taken, known, strict=False)]
            rival = self._worth_a_row(found, chances)
            if _promise(rival.chances) > _promise(believed[: self.shaper.worth_a_row(believed)]):
                return self._give_found(request, rival)
        return tokens[: self.shaper.worth_verifying(request, believed)]

    def give_found(self, request: str, found: Sequence[int]) -> list[int]:
        """The drafts of a request's text to hand out, where it has no others."""
        assert self.lookup is not None
        assert self.shaper is not None
        return self._give_found(request, self._worth_a_row(found, self.lookup.chances(request, self.shaper.price)))

    def _worth_a_row(self, found: Sequence[int], chances: list[float]) -> Drafted:
        assert self.shaper is not None
        count = self.shaper.worth_a_row(chances)
        return Drafted(list(found[:count]), chances[:count], math.inf, looked_up=True)

    def _give_found(self, request: str, rival: Drafted) -> list[int]:
        self.drafted[request] = rival
        return rival.tokens

    def verifies(self, request: str, count: int) -> Verified:
        """A request that verifies its first `count` drafts in the step that is about to run."""
        drafted = self.drafted.get(request)
        return Verified(request, self._chances(request, count), drafted is not None and drafted.looked_up and count > 0)

    def verified(self, request: str, count: int, accepted: int) -> None:
        """Takes in what became of a request's first `count` drafts."""
        self.counters.verified(count, accepted)
        drafted = self.drafted.get(request)
        if drafted is not None:
            self.counters.expect(drafted.probabilities[:count])
            if drafted.looked_up:
                self.counters.looked_up(count, accepted)
                return
        if self.shaper is not None:
            self.shaper.observe(request, self._chances(request, count), accepted)

    def keep(self, running: Sequence[str], known: Collection[str]) -> None:
        """Forgets requests.

        Args:
            running: those of the batch.
            known: those that are not at their end.
        """
        if len(self.drafted) > len(known):
            self.drafted = {request: drafted for request, drafted in self.drafted.items() if request in known}
        for memory in (self.shaper, self.lookup):
            if memory is not None:
                memory.keep(running)

    def _chances(self, request: str, count: int) -> list[float]:
        """Of the first drafts of `request`, as whoever drafted them sees them; 1 for one that is taken without a match."""
        drafted = self.drafted.get(request)
        known = [] if drafted is None else drafted.chances[:count]
        return known + [0.0] * (count - len(known))


def _promise(chances: Sequence[float]) -> float:
    """Drafts that are hoped to be accepted."""
    return sum(accumulate(chances, mul))
