"""Drafts from the request's own text: where its last tokens stood before, what followed them then.

Text that repeats itself (code that is edited, a quoted document, a table) is known without a model, and costs no mask rows, only
those that verify. So a request takes what followed if that promises more than its mask tokens do (`given`), and its step has no
group behind the last draft, for the text will go on as it did.

How likely such a draft is, is learned from what is generated, whether it was drafted or not: by how many tokens match in front of
it, by the request, whose text may repeat itself or only seem to, and by what the request's mask tokens say of the same place. What
these three are worth adds up, in log odds (logistic regression, learned draft by draft). No vLLM import.

The idea is prompt lookup's (vLLM: v1/spec_decode/ngram_proposer.py); what is new is that it is weighed against the mask tokens.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

SHORTEST, LONGER = 2, 6
"""Tokens that must match; and those that are looked for first, for the last place where two match is not the best one."""
REACH = 8192
"""The last tokens of a request that are looked through: a few microseconds for each thousand."""
MATCHES, DRAFTS = (2, 3, 4, 6, 8, 12, 16, 24, 32), (0, 1, 2, 4, 8)
"""Lengths of a match, and drafts right before a draft, from which on it is another kind of draft: text that has just begun to match
is another than text that has matched for long, also once some drafts were right."""
HOPED = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
"""How often a first draft behind such a match is right, before one was seen."""
SURE = (0.3, 0.6, 0.8, 0.9, 0.97)
"""How likely a mask token's draft is thought to be, from which on what it says is another kind of opinion."""
AGAINST, FOR = (-0.2, -0.6, -1.2, -1.9, -2.7, -4.0), (0.2, 0.6, 1.2, 1.9, 2.7, 4.0)
"""What such opinions are worth before one was seen: if one of two tokens is right and the other is so with chance m, log(1 - m)."""
OF_A_KIND, OF_A_REQUEST, MOST = 2.0, 1.0, 25.0
"""How sure what is thought of a kind, and of a request, is before one was seen, and becomes at most: 1 / variance, in log odds."""
CERTAIN = 0.995
"""No draft is said to be likelier; what is learned from is what is thought, for else terms would grow without end."""


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
class _Term:
    """One of the terms that make the log odds of a draft.

    Attributes:
        log_odds: what it is worth.
        precision: how sure that is, 1 / variance.
    """

    log_odds: float
    precision: float

    def observe(self, surprise: float, information: float) -> None:
        """Takes in a draft: 1 or 0 for right or wrong less its chance, and the variance of that."""
        self.precision = min(self.precision + information, MOST)
        self.log_odds += surprise / self.precision


@dataclass
class _Request:
    """One request.

    Attributes:
        term: of its text.
        found: the place that it was looked up for, and what may stand from there on.
        thought: of each token that a chance was asked of, that chance and its terms.
    """

    term: _Term
    found: tuple[int, Found] | None = None
    thought: list[tuple[float, list[_Term]]] = field(default_factory=list)


@dataclass
class Lookup:
    """Finds drafts in the text of requests, and learns how good they are.

    Attributes:
        kinds: by length of the match and drafts before.
        opinions: by whether mask tokens draft the same token, and how likely that is thought to be.
        requests: by name.
    """

    kinds: dict[tuple[int, int], _Term] = field(default_factory=dict)
    opinions: dict[tuple[bool, int], _Term] = field(default_factory=dict)
    requests: dict[str, _Request] = field(default_factory=dict)

    def find(self, request: str, tokens: np.ndarray, wanted: int) -> list[int]:
        """Drafts, none where nothing is found.

        Args:
            request: whose they are.
            tokens: its text, [n], int32.
            wanted: drafts that it can use.
        """
        found = look_up(tokens, wanted) if wanted > 0 else None
        known = self.requests.get(request)
        if found is None:
            if known is not None:
                known.found, known.thought = None, []
            return []
        if known is None:
            known = self.requests[request] = _Request(_Term(0.0, OF_A_REQUEST))
        known.found, known.thought = (len(tokens), found), []
        return found.tokens

    def chances(self, request: str, floor: float, others: Sequence[int] = (), sure: Sequence[float] = ()) -> list[float]:
        """The chance of each draft that was found, if those before it are accepted; up to one that is not reached by `floor`.

        Args:
            request: whose they are, of which `find` found some.
            floor: a chance of all up to a draft that is too low to go on.
            others: what the request's mask tokens draft in the same places.
            sure: the chance of each of those, if those before it are accepted.
        """
        known = self.requests[request]
        assert known.found is not None
        known.thought, reached = [], 1.0
        for terms in self._terms(known.term, known.found[1], others, sure):
            chance = 1.0 / (1.0 + math.exp(-sum([term.log_odds for term in terms])))
            known.thought.append((chance, terms))
            reached *= chance
            if reached <= floor:
                break
        return [min(chance, CERTAIN) for chance, _ in known.thought]

    def observe(self, request: str, generated: Sequence[int], begin: int) -> None:
        """Takes in what came after `find` and `chances`, whether its drafts were verified or not.

        Args:
            request: whose text it is.
            generated: its new tokens.
            begin: how many it had before.
        """
        known = self.requests.get(request)
        if known is None or known.found is None or known.found[0] != begin:
            return
        for token, expected, (chance, terms) in zip(generated, known.found[1].tokens, known.thought, strict=False):
            right = token == expected
            for term in terms:
                term.observe(right - chance, chance * (1.0 - chance))
            if not right:
                break

    def keep(self, running: Sequence[str]) -> None:
        """Forgets all requests but these."""
        if len(self.requests) > 2 * len(running) + 8:
            self.requests = {request: self.requests[request] for request in running if request in self.requests}

    def _terms(self, of_request: _Term, found: Found, others: Sequence[int], sure: Sequence[float]) -> Iterator[list[_Term]]:
        """Of each draft; mask tokens have an opinion up to the first that they draft otherwise."""
        same, matches = True, bisect_right(MATCHES, found.matching) - 1
        for draft, token in enumerate(found.tokens):
            kind = matches, bisect_right(DRAFTS, draft) - 1
            of_kind = self.kinds.get(kind)
            if of_kind is None:
                hoped = HOPED[bisect_right(MATCHES, found.matching + draft) - 1]
                of_kind = self.kinds[kind] = _Term(math.log(hoped / (1.0 - hoped)), OF_A_KIND)
            terms = [of_kind, of_request]
            if same and draft < len(others):
                same = others[draft] == token
                opinion = same, bisect_right(SURE, sure[draft])
                if opinion not in self.opinions:
                    self.opinions[opinion] = _Term((FOR if same else AGAINST)[opinion[1]], OF_A_KIND)
                terms.append(self.opinions[opinion])
            yield terms


def beside(others: Sequence[int], sure: Sequence[float], found: Sequence[int], chances: Sequence[float]) -> list[float]:
    """How likely the drafts of mask tokens are, given those of the text: as likely where they are the same, and at the first that
    is another, not likelier than what the text's leaves.

    Args:
        others, sure: drafts of mask tokens and their chances, as in `Lookup.chances`.
        found, chances: drafts of the text and their chances.
    """
    known = list(sure)
    for draft, (token, other, chance) in enumerate(zip(found, others, chances, strict=False)):
        known[draft] = chance if token == other else min(known[draft], 1.0 - chance)
        if token != other:
            break
    return known
