"""The choice of layouts against a simulated server whose costs and acceptance are known."""

import random

import pytest

from vllm_mtp.forecast import tokens_and_rows
from vllm_mtp.layout import group_lengths
from vllm_mtp.load import LayoutChooser, candidate_layouts, fitting_layouts, rows_of

from .ranks import Rank, on_ranks

K = 4
PLAIN = (0,) * (K + 1)


class Server:
    """Steps cost a fixed time and a time for each row; a draft is accepted with one probability, as long as all before it were."""

    def __init__(self, row_cost: float, acceptance: float, seed: int = 0) -> None:
        self.row_cost, self.acceptance, self.random = row_cost, acceptance, random.Random(seed)

    def seconds(self, rows: float) -> float:
        return 1.0 + self.row_cost * rows

    def accepted(self, drafts: int) -> int:
        count = 0
        while count < drafts and self.random.random() < self.acceptance:
            count += 1
        return count

    def rate(self, lengths: tuple[int, ...], requests: int) -> float:
        """Expected tokens a second."""
        tokens, rows = tokens_and_rows(lengths, [self.acceptance] * K)
        return requests * tokens / self.seconds(requests * rows)

    def run(self, chooser: LayoutChooser, requests: int, steps: int) -> tuple[int, float]:
        """Tokens and seconds of `steps` steps."""
        tokens, seconds, drafts = 0, 0.0, [0] * requests
        for _ in range(steps):
            lengths = chooser.choose(requests)
            accepted = [self.accepted(count) for count in drafts]
            groups = [[max(lengths) if j == d < K else lengths[j] for j in range(d + 1)] for d in drafts]
            rows = sum(drafts) + requests + sum(map(sum, groups))
            cost = self.seconds(rows) * self.random.uniform(0.95, 1.1)
            chooser.observe(drafts, [1 + count for count in accepted], rows, cost)
            drafts = [group[count] for count, group in zip(accepted, groups, strict=True)]
            tokens, seconds = tokens + sum(accepted) + requests, seconds + cost
        return tokens, seconds


@pytest.mark.parametrize("requests", [1, 16])
@pytest.mark.parametrize("row_cost", [0.0, 0.002, 0.02, 0.2])
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.9])
def test_the_best_layout_is_found_and_exploration_costs_little(requests: int, row_cost: float, acceptance: float) -> None:
    server, chooser = Server(row_cost, acceptance), LayoutChooser(fitting_layouts(K, 1000, 1000))
    server.run(chooser, requests, 600)
    tokens, seconds = server.run(chooser, requests, 3000)
    assert tokens / seconds > 0.93 * max(server.rate(lengths, requests) for lengths in candidate_layouts(K))


class Restless(Server):
    """A machine whose neighbours come and go, and text that every request finds easy for a while and hard for a while."""

    pace, easy = 1.0, False

    def seconds(self, rows: float) -> float:
        if self.random.random() < 0.01:
            self.pace = self.random.choice([1.0, 1.3, 1.8])
        return self.pace * super().seconds(rows) * (3.0 if self.random.random() < 0.02 else 1.0)

    def accepted(self, drafts: int) -> int:
        for count in range(drafts + 1):
            if self.random.random() < 0.02:  # of a token
                self.easy = not self.easy
            if count == drafts or not (self.easy or self.random.random() < 0.5):
                return count
        raise AssertionError


@pytest.mark.parametrize("row_cost", [0.01, 0.03, 0.1])
def test_neighbours_and_changing_text_do_not_mislead_it(row_cost: float) -> None:
    layouts = fitting_layouts(K, 1000, 1000)

    def rate(choices: list[tuple[int, ...]], steps: int) -> float:
        server, chooser = Restless(row_cost, 0.5, seed=1), LayoutChooser(choices)
        server.run(chooser, 1, 1000)
        tokens, seconds = server.run(chooser, 1, steps)
        return tokens / seconds

    best = max(rate([layout], 20_000) for layout in layouts)
    assert rate(layouts, 10_000) > 0.93 * best


def test_a_machine_that_gets_slower_and_slower_does_not_mislead_it() -> None:
    """What takes longer all the time is not the layout that happens to run."""
    server, chooser = Server(0.03, 0.7), LayoutChooser(fitting_layouts(K, 1000, 1000))
    rates = [server.rate(lengths, 1) for lengths in chooser.layouts]
    seconds, steps = server.seconds, iter(range(100_000))
    server.seconds = lambda rows: (1 + next(steps) / 1000) * seconds(rows)  # type: ignore[method-assign]
    chosen = []
    for _ in range(60):
        server.run(chooser, 1, 100)
        chosen.append(rates[chooser.layouts.index(chooser.best(1))])
    assert sum(chosen[10:]) / 50 > 0.93 * max(rates)


def test_where_drafts_are_worthless_it_becomes_plain_decoding_and_stays_close_to_it() -> None:
    server, chooser = Server(0.05, 0.0), LayoutChooser(fitting_layouts(K, 1000, 1000))
    server.run(chooser, 4, 1000)
    assert chooser.best(4) == PLAIN
    _, seconds = server.run(chooser, 4, 4000)
    assert seconds < 1.01 * 4000 * server.seconds(4) * 1.025


def test_where_rows_are_dear_looking_out_for_better_layouts_costs_little() -> None:
    """A full comb is ten times as slow there: a trial of it must end as soon as that shows."""
    server, chooser = Server(0.2, 0.6), LayoutChooser(fitting_layouts(K, 1000, 1000))
    server.run(chooser, 16, 600)
    for _ in range(6):
        tokens, seconds = server.run(chooser, 16, 500)
        assert tokens / seconds > 0.95 * server.rate(PLAIN, 16)


def test_a_tie_goes_to_plain_decoding() -> None:
    """Mask rows that cost nothing and bring nothing: the noise of the clock alone would choose any layout."""
    choosers = [LayoutChooser(fitting_layouts(K, 1000, 1000)) for _ in range(10)]
    for seed, chooser in enumerate(choosers):
        Server(0.0, 0.0, seed).run(chooser, 1, 3000)
    assert [chooser.best(1) for chooser in choosers] == [PLAIN] * 10


def test_it_comes_back_when_drafts_become_worth_their_rows_again() -> None:
    server, chooser = Server(0.01, 0.0), LayoutChooser(fitting_layouts(K, 1000, 1000))
    server.run(chooser, 1, 2000)
    assert chooser.best(1) == PLAIN
    server.acceptance = 0.9
    server.run(chooser, 1, 20_000)
    assert max(chooser.best(1)) > 1


def test_batch_sizes_are_told_apart() -> None:
    server, chooser = Server(0.02, 0.7), LayoutChooser(fitting_layouts(K, 1000, 1000))
    for _ in range(20):
        server.run(chooser, 1, 200)
        server.run(chooser, 32, 200)
    assert rows_of(chooser.best(32)) < rows_of(chooser.best(1))


def test_a_new_batch_size_does_not_begin_with_layouts_that_are_hopeless_at_the_next_one() -> None:
    server, chooser = Server(0.2, 0.3), LayoutChooser(fitting_layouts(K, 1000, 1000))
    server.run(chooser, 8, 2000)
    assert chooser.best(8) == PLAIN
    masked = 0
    for _ in range(300):
        masked += chooser.choose(3) != PLAIN
        server.run(chooser, 3, 1)
    assert masked < 20


def test_layouts_beyond_the_room_are_never_chosen() -> None:
    server, chooser = Server(0.0, 1.0), LayoutChooser(fitting_layouts(K, 10, 10))
    seen = set()
    for _ in range(500):
        seen.add(chooser.choose(1))
        server.run(chooser, 1, 1)
    assert max(map(rows_of, seen)) <= 10
    assert len(seen) > 1


def test_the_candidates_hold_plain_decoding_and_the_full_comb() -> None:
    layouts = candidate_layouts(8)
    assert layouts[0] == (0,) * 9
    assert layouts[-1] == group_lengths("quadratic", 8)
    assert [rows_of(lengths) for lengths in layouts] == sorted(map(rows_of, layouts))
    assert all(len(lengths) == 9 for lengths in layouts)


@pytest.mark.parametrize("agreed", [True, False])
def test_ranks_with_different_clocks_choose_the_same_layouts_if_they_agree_on_the_time(agreed: bool) -> None:
    def layouts(rank: Rank) -> list[tuple[int, ...]]:
        chooser, clock = LayoutChooser(fitting_layouts(K, 1000, 1000), rank.max if agreed else float), random.Random(rank.index)
        chosen = []
        for step in range(1000):
            chosen.append(chooser.choose(1 + step // 400))
            width = max(chosen[-1])
            chooser.observe([width], [1 + width // 2], rows_of(chosen[-1]) if width else 1, clock.uniform(0.5, 2.0))
        return chosen

    first, *others = on_ranks(3, layouts)
    assert all(other == first for other in others) is agreed
    assert len(set(first)) > 2
