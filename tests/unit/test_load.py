"""Load control and the shapes of groups against a simulated server whose costs and acceptance are known."""

import math
import random
from collections.abc import Callable

import pytest

from vllm_mtp.forecast import Batch
from vllm_mtp.layout import group_lengths
from vllm_mtp.load import BURST, LoadControl, candidate_layouts, fitting_layouts, rows_of
from vllm_mtp.shaping import SHAPED, Shaper, Verified

from .ranks import Rank, on_ranks

K = 4
PLAIN = (0,) * (K + 1)
Choose = Callable[[int], tuple[int, ...]]


class Server:
    """Steps cost a fixed time and a time for each row. A draft is accepted with a chance of its own, as long as all before it were,
    and the drafter knows that chance.

    Args:
        row_cost: of a row, in fixed times of a step.
        acceptance: of a draft, in the mean.
        seed: of all that is random.
    """

    def __init__(self, row_cost: float, acceptance: float, seed: int = 0) -> None:
        self.row_cost, self.acceptance, self.random = row_cost, acceptance, random.Random(seed)
        self.shaper = Shaper(K)

    context = 0.0
    """Tokens of a request."""
    length, prompt, prompt_row_cost = math.inf, 0, 0.0
    """Tokens after which a request ends and another one comes; rows of its prompt; cost of each."""

    def seconds(self, rows: float) -> float:
        return 1.0 + self.row_cost * rows

    def chance(self) -> float:
        """Of a draft."""
        spread = min(self.acceptance, 1 - self.acceptance)
        return self.acceptance + spread * self.random.uniform(-1, 1)

    def accepted(self, drafts: list[float]) -> int:
        count = 0
        while count < len(drafts) and self.random.random() < drafts[count]:
            count += 1
        return count

    def run(self, control: LoadControl | tuple[int, ...], requests: int, steps: int, without: int = 0) -> tuple[int, float]:
        """Tokens and seconds of `steps` steps, under load control or with one layout; the first requests want no drafts."""
        tokens, seconds = 0, 0.0
        names, drafts = [str(i) for i in range(requests)], [list[float]() for _ in range(requests)]
        left = [self.random.random() * self.length if self.prompt else math.inf for _ in range(requests)]
        for _ in range(steps):
            ended = [i for i in range(requests) if left[i] <= 0]
            for i in ended:
                left[i], drafts[i] = self.length, []
            prompt_rows = len(ended) * self.prompt
            lengths = control if isinstance(control, tuple) else control.choose(requests, self.context)
            if lengths == SHAPED and isinstance(control, LoadControl):
                self.shaper.price = control.price
                shapes = self.shaper.shapes([Verified(*each) for each in zip(names, drafts, strict=True)], 1000)
            else:
                shapes = tuple(tuple(max(lengths) if j == len(of) < K else lengths[j] for j in range(len(of) + 1)) for of in drafts)
            shapes = ((0,),) * without + shapes[without:]
            accepted = [self.accepted(of) for of in drafts]
            for name, of, count in zip(names, drafts, accepted, strict=True):
                self.shaper.observe(name, of, count)
            rows = requests + sum(map(len, drafts)) + sum(map(sum, shapes))
            left = [of - 1 - count for of, count in zip(left, accepted, strict=True)]
            cost = (self.seconds(rows) + self.prompt_row_cost * prompt_rows) * self.random.uniform(0.95, 1.1)
            if isinstance(control, LoadControl):
                control.observe([1 + count for count in accepted], rows, cost, without if lengths == SHAPED else 0, prompt_rows)
            drafts = [[self.chance() for _ in range(shape[count])] for shape, count in zip(shapes, accepted, strict=True)]
            if lengths == SHAPED:
                believed = [self.shaper.believed(name, of) for name, of in zip(names, drafts, strict=True)]
                counts = [self.shaper.worth_verifying(name, of) for name, of in zip(names, believed, strict=True)]
                drafts = [of[:count] for of, count in zip(drafts, counts, strict=True)]
            tokens, seconds = tokens + sum(accepted) + requests, seconds + cost
        return tokens, seconds


def rate(server: Server, control: LoadControl | tuple[int, ...], requests: int, steps: int) -> float:
    """Tokens a second."""
    tokens, seconds = server.run(control, requests, steps)
    return tokens / seconds


@pytest.mark.parametrize("requests", [1, 16])
@pytest.mark.parametrize("row_cost", [0.0, 0.002, 0.02, 0.2])
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.9])
def test_it_is_as_fast_as_the_best_layout(requests: int, row_cost: float, acceptance: float) -> None:
    server, control = Server(row_cost, acceptance), LoadControl(K)
    server.run(control, requests, 600)
    best = max(rate(Server(row_cost, acceptance), layout, requests, 400) for layout in candidate_layouts(K))
    assert rate(server, control, requests, 3000) > 0.93 * best


@pytest.mark.parametrize(("requests", "row_cost", "acceptance"), [(4, 0.02, 0.4), (4, 0.04, 0.7), (16, 0.01, 0.7), (16, 0.02, 0.8)])
def test_where_only_few_rows_are_worth_it_it_finds_them(requests: int, row_cost: float, acceptance: float) -> None:
    """With all that a first price allows drafts lose there: the price was at fault, not the drafts."""
    server, control = Server(row_cost, acceptance), LoadControl(K)
    server.run(control, requests, 300)
    found = rate(server, control, requests, 2000)
    best = max(rate(Server(row_cost, acceptance), layout, requests, 1000) for layout in candidate_layouts(K))
    assert best > 1.1 * rate(Server(row_cost, acceptance), PLAIN, requests, 1000)
    assert found > 0.95 * best


@pytest.mark.parametrize("row_cost", [0.02, 0.05])
def test_where_the_drafter_is_sometimes_sure_it_is_faster_than_every_layout(row_cost: float) -> None:
    def server() -> Server:
        one = Server(row_cost, 0.6)
        one.chance = lambda: one.random.choice([0.2, 0.99])  # type: ignore[method-assign]
        return one

    control, serving = LoadControl(K), server()
    serving.run(control, 1, 600)
    best = max(rate(server(), layout, 1, 3000) for layout in candidate_layouts(K))
    assert rate(serving, control, 1, 3000) > 1.04 * best


class Restless(Server):
    """A machine whose neighbours come and go, and text that is easy for a while and hard for a while."""

    pace, easy = 1.0, False

    def seconds(self, rows: float) -> float:
        if self.random.random() < 0.01:
            self.pace = self.random.choice([1.0, 1.3, 1.8])
        return self.pace * super().seconds(rows) * (3.0 if self.random.random() < 0.02 else 1.0)

    def chance(self) -> float:
        if self.random.random() < 0.02:  # of a token
            self.easy = not self.easy
        return 1.0 if self.easy else 0.5


@pytest.mark.parametrize("row_cost", [0.01, 0.03, 0.1])
def test_neighbours_and_changing_text_do_not_mislead_it(row_cost: float) -> None:
    server, control = Restless(row_cost, 0.5, seed=1), LoadControl(K)
    server.run(control, 1, 1000)
    best = max(rate(Restless(row_cost, 0.5, seed=1), layout, 1, 20_000) for layout in candidate_layouts(K))
    assert rate(server, control, 1, 10_000) > 0.95 * best


def test_a_machine_that_gets_slower_and_slower_does_not_mislead_it() -> None:
    """What takes longer all the time is not what happens to run."""
    server, control = Server(0.03, 0.7), LoadControl(K)
    seconds, steps = server.seconds, iter(range(100_000))
    server.seconds = lambda rows: (1 + next(steps) / 1000) * seconds(rows)  # type: ignore[method-assign]
    chosen = []
    for _ in range(60):
        server.run(control, 1, 100)
        chosen.append(control.best(1))
    assert chosen[10:].count(SHAPED) > 45


def test_where_drafts_are_worthless_it_becomes_plain_decoding_and_stays_close_to_it() -> None:
    server, control = Server(0.05, 0.0), LoadControl(K)
    server.run(control, 4, 1000)
    assert control.best(4) == PLAIN
    _, seconds = server.run(control, 4, 4000)
    assert seconds < 1.01 * 4000 * server.seconds(4) * 1.025


def test_where_rows_are_dear_looking_out_for_drafts_costs_little() -> None:
    server, control = Server(0.2, 0.3), LoadControl(K)
    server.run(control, 16, 600)
    plain = rate(Server(0.2, 0.3), PLAIN, 16, 1000)
    for _ in range(6):
        assert rate(server, control, 16, 500) > 0.96 * plain


def test_a_tie_goes_to_plain_decoding() -> None:
    """Mask rows that cost nothing and bring nothing: the noise of the clock alone would choose either."""
    controls = [LoadControl(K) for _ in range(10)]
    for seed, control in enumerate(controls):
        Server(0.0, 0.0, seed).run(control, 1, 3000)
    assert [control.best(1) for control in controls] == [PLAIN] * 10


def test_it_comes_back_when_drafts_become_worth_their_rows_again() -> None:
    server, control = Server(0.01, 0.0), LoadControl(K)
    server.run(control, 1, 2000)
    assert control.best(1) == PLAIN
    server.acceptance = 0.9
    server.run(control, 1, 20_000)
    assert control.best(1) == SHAPED


class Reading(Server):
    """Rows read what their requests have: it takes longer, the more there is."""

    def seconds(self, rows: float) -> float:
        return super().seconds(rows) + 0.05 * self.context / 1000 * rows


def test_the_forecast_follows_the_context_and_so_do_the_drafts() -> None:
    control, price = LoadControl(K), {}
    # Each server has seen nothing else: requests grow, and new ones come.
    server = Reading(0.01, 0.6)
    for _ in range(30):
        for server.context in (200.0, 1500.0, 6000.0, 12_000.0):
            server.run(control, 4, 60)
            price[server.context] = control.price
    assert sorted(price, key=price.__getitem__) == sorted(price)
    for context in (500.0, 3000.0, 9000.0):
        server.context = context
        for rows in (4, 8, 20):
            assert control.cost.predict(Batch(4, rows, context)) == pytest.approx(1.02 * server.seconds(rows), rel=0.15)
        best = max(rate(_reading_at(context), layout, 4, 2000) for layout in candidate_layouts(K))
        server.run(control, 4, 200)
        assert rate(server, control, 4, 3000) > 0.93 * best


def _reading_at(context: float) -> Server:
    server = Reading(0.01, 0.6)
    server.context = context
    return server


@pytest.mark.parametrize("requests", [1, 4])
def test_requests_that_want_no_drafts_say_nothing_of_what_drafts_bring(requests: int) -> None:
    server, control = Server(0.01, 0.8), LoadControl(K)
    server.run(control, requests, 1000)
    assert control.best(requests) == SHAPED
    for without in range(requests, 0, -1):
        server.run(control, requests, 1000, without)
    assert control.best(requests) == SHAPED
    drafting = rate(server, control, requests, 100)
    assert drafting > 1.5 * rate(Server(0.01, 0.8), PLAIN, requests, 1000)


def test_a_row_is_dearer_in_a_larger_batch() -> None:
    server, control = Server(0.02, 0.7), LoadControl(K)
    prices: dict[int, float] = {}
    for _ in range(20):
        for requests in (1, 32):
            server.run(control, requests, 200)
            prices[requests] = control.price
    assert prices[1] == pytest.approx(0.02 * 2.5, rel=0.5)
    assert prices[32] > 5 * prices[1]


def test_a_new_batch_size_does_not_begin_with_what_is_hopeless_at_the_next_one() -> None:
    server, control = Server(0.2, 0.3), LoadControl(K)
    server.run(control, 8, 2000)
    assert control.best(8) == PLAIN
    masked = 0
    for _ in range(300):
        masked += control.choose(3) != PLAIN
        server.run(control, 3, 1)
    assert masked < 30  # two trials


def test_the_candidates_hold_plain_decoding_and_the_full_comb() -> None:
    layouts = candidate_layouts(8)
    assert layouts[0] == (0,) * 9
    assert layouts[-1] == group_lengths("quadratic", 8)
    assert [rows_of(lengths) for lengths in layouts] == sorted(map(rows_of, layouts))
    assert all(len(lengths) == 9 for lengths in layouts)
    assert max(map(rows_of, fitting_layouts(K, 10, 10))) <= 10


@pytest.mark.parametrize("agreed", [True, False])
def test_ranks_with_different_clocks_choose_alike_if_they_agree_on_the_times(agreed: bool) -> None:
    def chosen(rank: Rank) -> list[tuple[tuple[int, ...], float]]:
        def agree(times: list[float]) -> list[float]:
            return [rank.max(time) for time in times]

        control, clock = LoadControl(K, agree if agreed else list), random.Random(rank.index)
        found = []
        for step in range(1000):
            found.append((control.choose(1 + step // 400), control.price))
            control.observe([2], 4 + step % 8 if found[-1][0] == SHAPED else 1, clock.uniform(0.5, 2.0))
        return found

    first, *others = on_ranks(3, chosen)
    assert all(other == first for other in others) is agreed
    assert len(set(first)) > 2


@pytest.mark.parametrize("row_cost", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("prompt_row_cost", [0.005, 0.03])
def test_where_prompts_are_in_nearly_every_step_it_is_as_fast_as_the_best_layout(row_cost: float, prompt_row_cost: float) -> None:
    def server() -> Server:
        busy = Server(row_cost, 0.8)
        busy.length, busy.prompt, busy.prompt_row_cost = 40, 20, prompt_row_cost
        return busy

    serving, control = server(), LoadControl(K)
    serving.run(control, 16, 300)
    best = max(rate(server(), layout, 16, 2000) for layout in candidate_layouts(K))
    assert rate(serving, control, 16, 3000) > 0.93 * best


def test_a_trial_that_is_never_comparable_is_given_up() -> None:
    """Short requests, many at once: a prompt is in nearly every step, and drafts would run on while their verdict is waited for."""
    control = LoadControl(K)
    for _ in range(20 * BURST):
        drafts = control.choose(16) == SHAPED
        control.observe([4 if drafts else 1] * 16, 160 if drafts else 16, 0.05 if drafts else 0.01)
    for _ in range(400 * BURST):
        if control.choose(16) == SHAPED:
            break
        control.observe([1] * 16, 16, 0.01)
    assert control.choose(16) == SHAPED
    skipped = 0
    while control.choose(16) == SHAPED:
        control.skip(16)
        skipped += 1
        assert skipped < 2 * BURST
    bursts = 0
    while control.choose(16) != SHAPED and bursts < 5 * BURST:
        control.observe([1] * 16, 16, 0.01)
        bursts += 1
    assert bursts >= 5 * BURST  # and not tried again at once
