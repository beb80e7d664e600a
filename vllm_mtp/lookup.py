"""Drafts from the request's own text: where its last tokens stood before, what followed them then.

Text that repeats itself (code that is edited, a quoted document, a table) is known without a model, and costs no mask rows, only
those that verify. So a request takes what followed if that promises more than its mask tokens do (`given`), and its step has no
group behind the last draft, for the text will go on as it did. How likely such a draft is depends on how many tokens match
in front of it; that is learned from what is generated, whether it was drafted or not. No vLLM import.

The idea is prompt lookup's (vLLM: v1/spec_decode/ngram_proposer.py); what is new is that it is weighed against the mask tokens.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_mtp.shaping import Trust

SHORTEST, LONGER = 2, 6
"""Tokens that must match; and those that are looked for first, for the last place where two match is not the best one."""
REACH = 8192
"""The last tokens of a request that are looked through: a few microseconds for each thousand."""
MATCHES, DRAFTS = (2, 3, 4, 6, 8, 12, 16, 24, 32), (0, 1, 2, 4, 8)
"""Lengths of a match, and drafts right before a draft, from which on it is another kind of draft: text that has just begun to match
is another than text that has matched for long, also once some drafts were right."""
HOPED = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
"""How often a first draft behind such a match is right, before one was seen."""


@dataclass(frozen=True)
class Found:
    """What followed before.

    Attributes:
        tokens: that followed.
        matching: tokens in front of them that stood there as they stand now, up to the longest of `MATCHES`.
    """

    tokens: list[int]
    matching: int


def look_up(tokens: np.ndarray, wanted: int) -> Found | None:
    """What followed the last tokens where they stood before, None if they did not.

    What ends with the text itself goes on as it began: behind `a b a b` stands `a b a b ..`.

    Args:
        tokens: of the request, [n], int32.
        wanted: how many that followed, 1 or more.
    """
    tokens = tokens[-REACH:]
    text = tokens.tobytes()
    at = _last(text, SHORTEST, tokens.itemsize)
    if at < 0:
        return None
    if (better := _last(text, LONGER, tokens.itemsize)) >= 0:
        at = better
    end, count = len(tokens), min(at, MATCHES[-1])
    differ = np.flatnonzero(tokens[at - count : at][::-1] != tokens[end - count :][::-1])
    period = end - at
    followed = tokens[at : at + min(wanted, period)].tolist()
    if -1 in followed:  # a place whose token is not known yet
        return None
    return Found((followed * (wanted // period + 1))[:wanted], int(differ[0]) if differ.size else count)


def _last(text: bytes, count: int, size: int) -> int:
    """Where the last `count` tokens, of `size` bytes each, stood for the last time before: the place behind them, or -1."""
    if len(text) <= count * size:
        return -1
    wanted, end = text[-count * size :], len(text) - size
    while (at := text.rfind(wanted, 0, end)) >= 0:
        if at % size == 0:
            return at // size + count
        end = at + len(wanted) - 1
    return -1


@dataclass
class _Request:
    """One request.

    Attributes:
        trust: in what is hoped of its matches.
        expected: the place that it was looked up for, what may stand from there on, and how likely each token is thought to.
    """

    trust: Trust
    expected: tuple[int, Found, list[float]] | None = None


@dataclass
class Lookup:
    """Finds drafts in the text of requests, and learns how good they are."""

    kinds: dict[tuple[int, int], Trust] = field(default_factory=dict)
    """By length of the match and drafts before: the share of drafts that are right, which is trust in one that is certain of
    itself."""
    trust: Trust = field(default_factory=Trust)
    """Of all requests."""
    requests: dict[str, _Request] = field(default_factory=dict)

    def find(self, request: str, tokens: np.ndarray, wanted: int) -> tuple[list[int], list[float]]:
        """Drafts, and the chance of each if those before it are accepted; none where nothing is found.

        Args:
            request: whose they are.
            tokens: its text, [n], int32.
            wanted: drafts that it can use.
        """
        found = look_up(tokens, wanted) if wanted > 0 else None
        if found is None:
            return [], []
        known = self.requests.get(request)
        if known is None:
            known = self.requests[request] = _Request(Trust(self.trust.factor))
        hoped = [self._kind(found, draft).factor for draft in range(len(found.tokens))]
        known.expected = len(tokens), found, hoped
        return found.tokens, [min(1.0, known.trust.factor * chance) for chance in hoped]

    def observe(self, request: str, generated: Sequence[int], begin: int) -> None:
        """Takes in what came after `find`, whether its drafts were verified or not.

        Args:
            request: whose text it is.
            generated: its new tokens.
            begin: how many it had before.
        """
        known = self.requests.get(request)
        if known is None or known.expected is None or known.expected[0] != begin:
            return
        _, found, hoped = known.expected
        for draft, (token, expected) in enumerate(zip(generated, found.tokens, strict=False)):
            right = token == expected
            self._kind(found, draft).observe(1.0, right)
            for trust in (known.trust, self.trust):
                trust.observe(hoped[draft], right)
            if not right:
                break

    def keep(self, running: Sequence[str]) -> None:
        """Forgets all requests but these."""
        if len(self.requests) > 2 * len(running) + 8:
            self.requests = {request: self.requests[request] for request in running if request in self.requests}

    def _kind(self, found: Found, draft: int) -> Trust:
        kind = bisect_right(MATCHES, found.matching) - 1, bisect_right(DRAFTS, draft) - 1
        if kind not in self.kinds:
            self.kinds[kind] = Trust(HOPED[bisect_right(MATCHES, found.matching + draft) - 1])
        return self.kinds[kind]
