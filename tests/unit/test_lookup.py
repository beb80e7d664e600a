"""Drafts from a request's own text."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mtp.lookup import LONGER, MATCHES, REACH, SHORTEST, Found, Lookup, look_up


def text(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def naive(tokens: list[int], wanted: int) -> Found | None:
    """The definition: the last place where the longer run of tokens matches, or else the shorter one."""
    for count in (LONGER, SHORTEST):
        places = [at for at in range(count, len(tokens)) if tokens[at - count : at] == tokens[len(tokens) - count :]]
        if places:
            at, matching = places[-1], 0
            while matching < min(at, MATCHES[-1]) and tokens[at - 1 - matching] == tokens[-1 - matching]:
                matching += 1
            goes_on = list(tokens)
            for i in range(wanted):
                goes_on.append(goes_on[at + i])
            return Found(goes_on[len(tokens) :], matching)
    return None


# Few tokens, so that they match often; large ones among them, whose bytes match where no token does.
some_tokens = st.lists(st.sampled_from([0, 1, 2, 256, 257, 65536, 16777216]), max_size=40)


@given(some_tokens, st.integers(1, 12))
def test_what_is_found_is_what_followed_before(tokens: list[int], wanted: int) -> None:
    assert look_up(text(tokens), wanted) == naive(tokens, wanted)


@pytest.mark.parametrize(
    ("tokens", "followed", "matching"),
    [
        ([7, 1, 2, 3, 4, 9, 1, 2], [3, 4, 9, 1], 2),
        ([1, 2, 3, 8, 1, 2, 9, 3, 1, 2], [9, 3, 1, 2], 2),  # the last of two places
        ([1, 2, 3, 4, 5, 6, 8, 0, 5, 6, 9, 1, 2, 3, 4, 5, 6], [8, 0, 5, 6], 6),  # the longer match, though it is further away
        ([5, 5, 5], [5, 5, 5, 5], 2),
        ([3, 1, 2, 1, 2, 1], [2, 1, 2, 1], 3),  # goes on as it began
    ],
)
def test_examples(tokens: list[int], followed: list[int], matching: int) -> None:
    assert look_up(text(tokens), 4) == Found(followed, matching)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 1], [1, 2, -1, 1, 2]])
def test_nothing_is_found_where_nothing_matches_or_is_known(tokens: list[int]) -> None:
    assert look_up(text(tokens), 4) is None


def test_a_match_out_of_reach_is_not_found() -> None:
    rest = list(range(10, REACH))
    assert look_up(text([1, 2, 3, *rest, 1, 2]), 1) is not None
    assert look_up(text([1, 2, 3, *rest, *range(REACH, REACH + 10), 1, 2]), 1) is None


def after(share: float, steps: int = 300) -> Lookup:
    """One that has seen this share of what it found come true, in several requests."""
    lookup, draws = Lookup(), random.Random(0)
    for i in range(steps):
        tokens = [1, 2, 3, 4, 5, 1, 2]
        drafts, _ = lookup.find(str(i % 5), text(tokens), 3)
        generated = [draft if draws.random() < share else 99 for draft in drafts]
        lookup.observe(str(i % 5), generated, len(tokens))
    return lookup


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_chances_become_what_was_seen(share: float) -> None:
    drafts, chances = after(share).find("0", text([1, 2, 3, 4, 5, 1, 2]), 3)
    assert drafts == [3, 4, 5]
    assert chances == pytest.approx([share] * 3, abs=0.12)


def test_longer_matches_are_hoped_to_be_better_and_a_chain_becomes_one() -> None:
    lookup, cycle = Lookup(), list(range(10))
    _, short = lookup.find("a", text([7, 8, 1, 2, 9, 9, 1, 2]), 1)
    _, long = lookup.find("b", text(cycle * 5), 1)
    assert long[0] > short[0]
    _, chain = lookup.find("c", text([1, 2, *range(20, 50), 1, 2]), 20)
    assert chain == sorted(chain)
    assert chain[-1] > chain[0]


def test_a_request_whose_text_misleads_is_believed_less_than_others() -> None:
    lookup, tokens = after(0.8), [1, 2, 3, 4, 5, 1, 2]
    for _ in range(40):
        lookup.find("misleading", text(tokens), 3)
        lookup.observe("misleading", [99], len(tokens))
    (misled, *_), (other, *_) = (lookup.find(request, text(tokens), 3)[1] for request in ("misleading", "another"))
    assert misled < 0.5 * other


def test_what_was_generated_elsewhere_teaches_nothing() -> None:
    """A request may be left without a search for a while."""
    lookup, tokens = Lookup(), [1, 2, 3, 4, 5, 1, 2]
    before = lookup.find("a", text(tokens), 3)
    for _ in range(50):
        lookup.observe("a", [99], len(tokens) + 4)
        lookup.observe("b", [99], len(tokens))
    assert lookup.find("a", text(tokens), 3) == before


def test_requests_that_are_gone_are_forgotten() -> None:
    lookup = Lookup()
    for i in range(100):
        lookup.find(str(i), text([1, 2, 3, 1, 2]), 3)
        lookup.keep([str(i)])
    assert len(lookup.requests) <= 12
    assert "99" in lookup.requests
