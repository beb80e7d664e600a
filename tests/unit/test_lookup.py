"""Drafts from a request's own text."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mtp.confidence import Drafted
from vllm_mtp.given import GivenDrafts
from vllm_mtp.lookup import CERTAIN, LONGER, MATCHES, REACH, SHORTEST, Found, Lookup, beside, look_up
from vllm_mtp.plan import Counters
from vllm_mtp.shaping import Shaper


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


def find(
    lookup: Lookup, request: str, tokens: list[int], wanted: int, others: Sequence[int] = (), sure: Sequence[float] = ()
) -> tuple[list[int], list[float]]:
    """Drafts and their chances."""
    drafts = lookup.find(request, text(tokens), wanted)
    return drafts, lookup.chances(request, 0.0, others, sure) if drafts else []


def after(share: float, steps: int = 300, others: Sequence[int] = (), sure: Sequence[float] = ()) -> Lookup:
    """One that has seen this share of what it found come true, in several requests, whatever mask tokens said."""
    lookup, draws = Lookup(), random.Random(0)
    for i in range(steps):
        tokens = [1, 2, 3, 4, 5, 1, 2]
        drafts, _ = find(lookup, str(i % 5), tokens, 3, others, sure)
        generated = [draft if draws.random() < share else 99 for draft in drafts]
        lookup.observe(str(i % 5), generated, len(tokens))
    return lookup


@pytest.mark.parametrize("others", [[], [3, 4, 5], [9, 9, 9]])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_chances_become_what_was_seen(share: float, others: list[int]) -> None:
    sure = [0.85] * len(others)
    drafts, chances = find(after(share, 3000, others, sure), "0", [1, 2, 3, 4, 5, 1, 2], 3, others, sure)
    assert drafts == [3, 4, 5]
    assert chances == pytest.approx([share] * 3, abs=0.12)


def test_longer_matches_are_hoped_to_be_better_and_a_chain_becomes_one() -> None:
    lookup, cycle = Lookup(), list(range(10))
    _, short = find(lookup, "a", [7, 8, 1, 2, 9, 9, 1, 2], 1)
    _, long = find(lookup, "b", cycle * 5, 1)
    assert long[0] > short[0]
    _, chain = find(lookup, "c", [1, 2, *range(20, 50), 1, 2], 20)
    assert chain == sorted(chain)
    assert chain[-1] > chain[0]


def test_a_request_whose_text_misleads_is_believed_less_than_others() -> None:
    lookup, tokens = after(0.8), [1, 2, 3, 4, 5, 1, 2]
    for _ in range(40):
        find(lookup, "misleading", tokens, 3)
        lookup.observe("misleading", [99], len(tokens))
    (misled, *_), (other, *_) = (find(lookup, request, tokens, 3)[1] for request in ("misleading", "another"))
    assert misled < 0.5 * other


def test_a_request_whose_text_goes_on_says_little_of_others() -> None:
    """One that loops has many more drafts than one that does not."""
    lookup, tokens = after(0.4), [1, 2, 3, 4, 5, 1, 2]
    (before, *_) = find(lookup, "new", tokens, 3)[1]
    for _ in range(100):
        find(lookup, "loop", tokens, 3)
        lookup.observe("loop", [3, 4, 5], len(tokens))
    (loops, *_), (new, *_) = (find(lookup, request, tokens, 3)[1] for request in ("loop", "newer"))
    assert loops > 0.9
    assert new < before + 0.3


def test_mask_tokens_that_say_the_same_make_a_draft_likelier_and_others_less_likely() -> None:
    lookup, tokens = Lookup(), [1, 2, 3, 4, 5, 1, 2]
    _, alone = find(lookup, "a", tokens, 3)
    _, agreed = find(lookup, "a", tokens, 3, [3, 4], [0.95, 0.95])
    _, denied = find(lookup, "a", tokens, 3, [3, 9], [0.95, 0.95])
    assert agreed[0] > alone[0] + 0.1
    assert agreed[1] > alone[1] + 0.1
    assert denied[0] == agreed[0]
    assert denied[1] < 0.5 * alone[1]
    assert denied[2] == agreed[2] == alone[2]  # nothing is said of it


def test_a_text_that_loops_for_long_leaves_terms_that_can_be_unlearned() -> None:
    lookup, tokens = after(1.0, 60_000), [1, 2, 3, 4, 5, 1, 2]
    assert max(term.log_odds for term in lookup.kinds.values()) < 6
    for _ in range(20):
        find(lookup, "another", tokens, 3)
        lookup.observe("another", [99], len(tokens))
    assert find(lookup, "another", tokens, 3)[1][0] < 0.3


def test_no_draft_is_certain_and_none_is_asked_of_behind_one_that_is_not_reached() -> None:
    lookup, tokens = after(1.0, 3000), [1, 2, 3, 4, 5, 1, 2]
    assert max(find(lookup, "0", tokens, 3)[1]) <= CERTAIN
    doubted = after(0.1)
    doubted.find("0", text(tokens), 3)
    assert len(doubted.chances("0", 0.3)) == 1


def test_mask_tokens_beside_a_text() -> None:
    assert beside([3, 4, 5], [0.9, 0.5, 0.5], [3, 4, 5], [0.8, 0.8]) == [0.8, 0.8, 0.5]
    assert beside([3, 4, 5], [0.9, 0.5, 0.5], [3, 9, 5], [0.8, 0.9, 0.9]) == [0.8, pytest.approx(0.1), 0.5]
    assert beside([3], [0.9], [9, 9], [0.3, 0.9]) == [pytest.approx(0.7)]
    assert beside([], [], [9], [0.3]) == []


def given_drafts() -> GivenDrafts:
    return GivenDrafts(Counters(), Shaper(4), Lookup())


@pytest.mark.parametrize(
    ("drafts", "probabilities", "tau", "given_out"),
    [
        ([8, 9, 9, 9], [0.99] * 4, math.inf, [8, 9, 9, 9]),  # surer than the text
        ([8, 9, 9, 9], [0.3, 0.1, 0.1, 0.1], math.inf, [3, 4, 5, 6]),  # less sure
        ([3, 4, 5], [0.99] * 3, math.inf, [3, 4, 5, 6]),  # the same, and the text goes on
        ([8, 8, 8, 8], [0.5] * 4, 0.4, [8, 8, 8, 8]),  # taken without a match
    ],
)
def test_what_promises_more_is_given_out(drafts: list[int], probabilities: list[float], tau: float, given_out: list[int]) -> None:
    drafted = given_drafts()
    found = drafted.look_up("a", text([0, 1, 2, 3, 4, 5, 6, 0, 1, 2]), [2], 4)
    assert found == [3, 4, 5, 6]
    assert drafted.give("a", Drafted(drafts, probabilities, tau), 4, found) == given_out
    assert drafted.verifies("a", 2).goes_on is (given_out == found)
    assert drafted.give("a", Drafted(drafts, probabilities, tau), 0, found) == found  # a group that is of no use


def test_a_text_alone_is_given_out_as_far_as_it_is_worth_rows() -> None:
    drafted = given_drafts()
    assert drafted.shaper is not None
    counts = []
    for price in (0.01, 0.3, 0.9):
        drafted.shaper.price = price
        counts.append(len(drafted.give_found("a", drafted.look_up("a", text([1, 2, 3, 4, 5, 6, 1, 2]), [2], 4))))
    assert counts[0] == 4
    assert counts[0] > counts[1] > counts[2] == 0


def test_what_was_generated_elsewhere_teaches_nothing() -> None:
    """A request may be left without a search for a while."""
    lookup, tokens = Lookup(), [1, 2, 3, 4, 5, 1, 2]
    before = find(lookup, "a", tokens, 3)
    for _ in range(50):
        lookup.observe("a", [99], len(tokens) + 4)
        lookup.observe("b", [99], len(tokens))
    assert find(lookup, "a", tokens, 3) == before


def test_requests_that_are_gone_are_forgotten() -> None:
    lookup = Lookup()
    for i in range(100):
        lookup.find(str(i), text([1, 2, 3, 1, 2]), 3)
        lookup.keep([str(i)])
    assert len(lookup.requests) <= 12
    assert "99" in lookup.requests
