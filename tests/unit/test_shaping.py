"""Which groups a request gets, by how sure its drafts are and what a row costs."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mtp.shaping import Shaper, Trust, Verified

K = 4
chances = st.lists(st.floats(0, 1), max_size=K)


def shaper_after(acceptance: float, drafts: int = 400) -> Shaper:
    """One that has seen drafts accepted so often, and that the drafter had expected to be."""
    shaper, draws = Shaper(K), random.Random(0)
    for i in range(drafts):
        accepted = 0
        while accepted < K and draws.random() < acceptance:
            accepted += 1
        shaper.observe(str(i % 7), [acceptance] * K, accepted)
    return shaper


def worth_verifying(shaper: Shaper, request: str, probabilities: list[float]) -> int:
    """Of drafts as the drafter sees them."""
    return shaper.worth_verifying(request, shaper.believed(request, probabilities))


def test_a_sure_request_has_one_long_group_and_a_doubtful_one_a_comb() -> None:
    shaper = shaper_after(0.8)
    shaper.price = 0.05
    (sure,) = shaper.shapes([Verified("new", [1.0] * K)], 100)
    assert sure == (0, 0, 0, 0, K)
    shaper.price = 0.1
    (doubtful,) = shaper.shapes([Verified("new", [0.5] * 2)], 100)
    assert min(doubtful) > 0
    assert doubtful[0] > doubtful[1]


def test_a_request_without_drafts_gets_a_group_and_one_that_can_use_none_does_not() -> None:
    shaper = shaper_after(0.8)
    first, none = shaper.shapes([Verified("new", []), None], 100)
    assert first[0] > 1
    assert none == ()


@given(chances, st.floats(0.001, 0.5), st.floats(1.1, 10))
def test_dearer_rows_are_never_more(probabilities: list[float], price: float, times: float) -> None:
    shaper = shaper_after(0.7, 50)
    counts = []
    for asked in (price, price * times):
        shaper.price = asked
        (lengths,) = shaper.shapes([Verified("new", probabilities)], 1000)
        assert len(lengths) == len(probabilities) + 1
        assert max(lengths) <= K
        counts.append((worth_verifying(shaper, "new", probabilities), sum(lengths)))
    assert counts[1][0] <= counts[0][0]
    assert counts[1][1] <= counts[0][1]


@given(st.lists(chances, min_size=1, max_size=6), st.integers(0, 30))
def test_the_rows_of_a_step_have_room(requests: list[list[float]], room: int) -> None:
    shaper = shaper_after(0.9, 50)
    shapes = shaper.shapes([Verified(str(i), probabilities) for i, probabilities in enumerate(requests)], room)
    assert sum(map(sum, shapes)) <= max(room, 0)


def test_a_request_whose_text_goes_on_by_itself_has_no_group_behind_its_last_draft() -> None:
    shaper = shaper_after(0.8)
    shaper.price = 0.05
    masked, looked_up = shaper.shapes([Verified("new", [0.7] * 3), Verified("new", [0.7] * 3, goes_on=True)], 100)
    assert looked_up == (*masked[:3], 0)
    assert masked[3] > 0
    assert shaper.shapes([Verified("new", [0.999] * K, goes_on=True)], 100) == ((0,) * (K + 1),)


def test_drafts_that_are_not_worth_a_row_are_not_verified() -> None:
    shaper = Shaper(K)
    shaper.price = 0.2
    assert worth_verifying(shaper, "new", [0.9, 0.9, 0.1, 0.9]) == 2
    assert worth_verifying(shaper, "new", [0.1]) == 0
    assert worth_verifying(shaper, "new", []) == 0


def test_a_drafter_that_is_surer_than_right_is_believed_less() -> None:
    shaper = Shaper(K)
    shaper.price = 0.2
    assert worth_verifying(shaper, "one", [0.6]) == 1
    for _ in range(60):
        shaper.observe("one", [0.6], 0)
    assert worth_verifying(shaper, "one", [0.6]) == 0
    assert worth_verifying(shaper, "another", [0.6]) == 0  # the server knows it too
    for _ in range(20):
        shaper.observe("another", [0.6], 1)
    assert worth_verifying(shaper, "another", [0.6]) == 1  # but this text is another
    assert worth_verifying(shaper, "one", [0.6]) == 0


def test_a_request_whose_drafts_were_bad_is_tried_again() -> None:
    """Nothing would be seen of drafts that are never verified."""
    shaper = shaper_after(0.8)
    shaper.price = 0.2
    for _ in range(60):
        shaper.observe("one", [0.6], 0)
    waited = 0
    while not worth_verifying(shaper, "one", [0.6]) and waited < 100:
        waited += 1
    assert 5 < waited < 50
    for _ in range(60):
        shaper.observe("two", [0.9] * K, 0)
    waited, shaper.price = 0, 0.25
    while not any(shaper.shapes([Verified("two", [])], 100)[0]) and waited < 100:
        waited += 1
    assert 5 < waited < 100


def test_trust_is_the_share_of_accepted_drafts_over_that_of_expected_ones() -> None:
    trust, draws = Trust(), random.Random(0)
    for _ in range(1000):
        trust.observe(0.4, draws.random() < 0.6)
    assert trust.factor == pytest.approx(1.5, rel=0.15)


def test_requests_that_are_gone_are_forgotten() -> None:
    shaper = Shaper(K)
    for i in range(100):
        shaper.observe(str(i), [0.5], 1)
        shaper.keep([str(i)])
    assert len(shaper.records) <= 12
    assert "99" in shaper.records
