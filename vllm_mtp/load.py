"""Which layout a step uses under `auto`: the one that promises the most tokens a second, at this batch size, on this machine.

Mask rows are nearly free while a step is bound by reading weights and cost full price after that; where that is depends on model,
machine and batch, and what the rows are worth depends on the text. So both are measured while serving, and `forecast` says of every
layout what it would give, also of those that have not run: a layout that cannot win is not tried. Those that could are, in short
bursts of steps, ever more rarely the more often they lose. What they take beside the best one's bursts before and after corrects
the forecast for them: a machine has neighbours, and a time alone says little. The layout without mask rows, plain decoding, is one
of them. Where steps overlap and cannot be timed one by one, `widest_comb` takes what the batch has rows for.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_mtp.forecast import Acceptance, StepCost, tokens_and_rows
from vllm_mtp.layout import group_lengths

SETTLE = 2  # steps after a change that still verify, or pay for, what the layout before asked for
BURST = 24
TRIAL = 8  # steps of a burst that tries a rival
FIRST_RETRY, LAST_RETRY = 8, 64  # bursts until a rival is tried again; doubled each time it loses
COST_OF_LOOKING = 0.003  # share of the time that trials of a layout may cost; one that is far off waits longer
WORTH_A_TRIAL, WORTH_THE_FIRST = 0.9, 0.75  # share of the best one's tokens a second that a rival must promise
CLEARLY = 1.02  # a rival must promise this much more to take over; plain decoding takes over even with so much less
LEARN = 0.5  # how fast trials correct what a layout costs beside the forecast
UNSETTLED = 1.15  # a trial means nothing where the best layout's own steps changed so much meanwhile
REMEMBER = 0.99  # what is left of such a correction a burst later


def candidate_layouts(k: int) -> list[tuple[int, ...]]:
    """The layouts that `auto` chooses from, in order of their rows: none, then linear ones and combs of growing width.

    All have 1 + k entries, so that a request may still verify the drafts of the step before.
    """
    widths = [width for width in (1, 2, 4, 8, 16) if width < k] + [k]
    combs = [tuple(width if drafts <= width else 0 for drafts in range(k + 1)) for width in widths]
    linear = [tuple(width if drafts == width else 0 for drafts in range(k + 1)) for width in widths]
    assert combs[-1] == group_lengths("quadratic", k)
    layouts = {(0,) * (k + 1), *combs, *linear}
    return sorted(layouts, key=lambda lengths: (rows_of(lengths), lengths))


def rows_of(lengths: tuple[int, ...]) -> int:
    """Rows of a request that verifies as many drafts as the layout's longest group gives: verified rows and mask rows."""
    width = max(lengths)
    return 1 + width + sum(lengths[: width + 1])


def fitting_layouts(k: int, max_rows: int, max_mask_rows: int) -> list[tuple[int, ...]]:
    """The candidate layouts that a single request has room for; none at all always fits.

    Args:
        k: most drafts a request.
        max_rows, max_mask_rows: most rows of a step, and most mask rows.
    """
    return [
        lengths
        for lengths in candidate_layouts(k)
        if not any(lengths) or (rows_of(lengths) <= max_rows and sum(lengths) <= max_mask_rows)
    ]


MASK_ROWS_OF_AN_ACCELERATOR = 1024
"""Most mask rows of a step on an accelerator, unless `max_mask_rows` says otherwise. Rows are free while a step is bound by reading
weights, which in bf16 ends near 300 rows on an H100 or H200 (800 TFLOP/s over 3-5 TB/s); past three times that they cost more than
they can bring. From the data sheets, not measured."""


def mask_row_budget(asked: int | None, max_rows: int, *, on_cpu: bool) -> int:
    """Most mask rows of a step: the operator's `max_mask_rows` or the platform's, and never more than a step may have rows."""
    return min(max_rows, asked or (max_rows if on_cpu else MASK_ROWS_OF_AN_ACCELERATOR))


def widest_comb(layouts: list[tuple[int, ...]], num_requests: int, max_rows: int, max_mask_rows: int) -> tuple[int, ...]:
    """The layout with the longest groups behind every row that `num_requests` requests have room for, else the one without masks.

    What stands for `auto` where steps are not timed one by one, because under asynchronous scheduling they overlap.

    Args:
        layouts: from which to choose, in order of their rows.
        num_requests: decoding requests of the step.
        max_rows, max_mask_rows: most rows of a step, and most mask rows.
    """
    fitting = [
        lengths
        for lengths in layouts
        if lengths[0] and num_requests * rows_of(lengths) <= max_rows and num_requests * sum(lengths) <= max_mask_rows
    ]
    return fitting[-1] if fitting else (0,) * len(layouts[0])


def drafts_by_batch_size(
    layouts: list[tuple[int, ...]], max_requests: int, max_rows: int, max_mask_rows: int
) -> list[tuple[int, int, int]]:
    """What `widest_comb` drafts, as vLLM's scheduler wants it: (first, last number of requests, drafts)."""
    ranges: list[tuple[int, int, int]] = []
    for count in range(1, max_requests + 1):
        drafts = max(widest_comb(layouts, count, max_rows, max_mask_rows))
        if ranges and ranges[-1][2] == drafts:
            ranges[-1] = (ranges[-1][0], count, drafts)
        else:
            ranges.append((count, count, drafts))
    return ranges


@dataclass
class _Arm:
    """What is known of one layout at one batch size beside the forecast."""

    slowness: float = 1.0
    """What its steps take, of what was forecast, relative to the others' at this batch size."""
    tried: bool = False
    wait: int = FIRST_RETRY
    due: int = 0
    """Burst, counted at this batch size, at which it is tried again."""


@dataclass
class _Bucket:
    """The layouts at one batch size.

    Attributes:
        best: which of them runs but for trials.
        pace: what its steps take of late, of what was forecast; it changes with the machine's neighbours, for all layouts alike.
    """

    arms: list[_Arm]
    best: int
    bursts: int = 0
    pace: float = 1.0


@dataclass
class _Trial:
    """A burst of a rival between two of the best layout.

    Attributes:
        arm: the rival.
        requests, rows: of a step, in the mean.
        ratio: of its time to the forecast.
        pace: of the best layout before it.
    """

    arm: int
    requests: float
    rows: float
    ratio: float
    pace: float


class LayoutChooser:
    """Chooses each step's layout from what the steps before it gave.

    Args:
        layouts: what to choose from (`fitting_layouts`), in order of their rows.
        agree: makes one time of those that the ranks of an engine measured; called once a burst. The time is all that could make
            them choose different layouts.
    """

    def __init__(self, layouts: list[tuple[int, ...]], agree: Callable[[float], float] = float) -> None:
        self.layouts, self.agree = layouts, agree
        self.acceptance, self.cost = Acceptance(len(layouts[0]) - 1), StepCost()
        self._gains = self._gains_now()
        """Tokens and rows of a request with each layout, as of the last burst."""
        self._plain = [i for i, lengths in enumerate(layouts) if not any(lengths)]
        self._buckets: dict[int, _Bucket] = {}
        self._bucket = -1
        self._arm = 0
        self._length, self._settling = BURST, 0
        self._rested = False
        """Whether the last burst was one of the best layout at this batch size, which a trial can be held against."""
        self._trial: _Trial | None = None
        self._steps: list[tuple[int, int, float]] = []
        """Requests, rows and seconds of the steps of the running burst."""

    def choose(self, num_requests: int) -> tuple[int, ...]:
        """The layout of a step with `num_requests` requests."""
        bucket = (num_requests - 1).bit_length()
        if bucket != self._bucket:
            self._bucket, self._rested, self._trial = bucket, False, None
            self._start(num_requests)
        return self.layouts[self._arm]

    def observe(self, drafts: Sequence[int], tokens: Sequence[int], rows: int, seconds: float) -> None:
        """Takes in a step that only decoded.

        Steps with prompts in them, and those after an idle server, are not comparable and must not be given.

        Args:
            drafts: that each request verified.
            tokens: that each request got.
            rows: of the step, mask rows among them.
            seconds: from the end of the step before to its own.
        """
        self.acceptance.observe(drafts, [count - 1 for count in tokens])
        if self._settling:
            self._settling -= 1
            return
        self._steps.append((len(tokens), rows, seconds))
        if len(self._steps) == self._length:
            self._finish()
            self._start(len(tokens))

    @property
    def running(self) -> tuple[int, ...]:
        """The layout of the running burst."""
        return self.layouts[self._arm]

    def expected(self, num_requests: int, rows: int) -> float:
        """Seconds that a step of the running burst should take."""
        bucket = self._known(self._bucket)
        slowness = bucket.arms[self._arm].slowness * bucket.pace
        return self.cost.predict(num_requests, rows) * slowness if self.cost.is_fitted else 0.0

    def best(self, num_requests: int) -> tuple[int, ...]:
        """The layout that is best so far for `num_requests` requests."""
        bucket = self._known((num_requests - 1).bit_length())
        return self.layouts[self._winner(bucket, self._promises(bucket, num_requests))]

    def _known(self, bucket: int) -> _Bucket:
        if bucket not in self._buckets:  # an unknown server starts in the middle
            self._buckets[bucket] = _Bucket([_Arm() for _ in self.layouts], len(self.layouts) // 2)
        return self._buckets[bucket]

    def _promises(self, bucket: _Bucket, num_requests: int) -> list[float]:
        """Tokens a second that each layout promises."""
        return [
            num_requests * tokens / (self.cost.predict(num_requests, num_requests * rows) * arm.slowness)
            for (tokens, rows), arm in zip(self._gains, bucket.arms, strict=True)
        ]

    def _gains_now(self) -> list[tuple[float, float]]:
        acceptance = self.acceptance.by_position()
        return [tokens_and_rows(lengths, acceptance) for lengths in self.layouts]

    def _winner(self, bucket: _Bucket, promises: list[float]) -> int:
        """The best layout of those that have run at this batch size, if one has, and plain decoding. In a tie the one that is, and
        above all plain decoding: what brings nothing is not worth its rows."""
        known = {i for i, arm in enumerate(bucket.arms) if arm.tried} or set(range(len(promises)))
        best = max(sorted(known.union(self._plain)), key=promises.__getitem__)
        margin = 1 / CLEARLY if best in self._plain else CLEARLY**2 if bucket.best in self._plain else CLEARLY
        if promises[best] <= margin * promises[bucket.best]:
            best = bucket.best
        for plain in self._plain:
            if promises[best] < CLEARLY * promises[plain]:
                best = plain
        return best

    def _start(self, num_requests: int) -> None:
        """Begins a burst of the best layout, or of a rival that is due."""
        bucket, before = self._known(self._bucket), self._arm
        self._arm, self._length = bucket.best, TRIAL
        if self.cost.is_fitted and self._trial is None:
            promises = self._promises(bucket, num_requests)
            winner = self._winner(bucket, promises)
            self._rested &= winner == bucket.best
            bucket.best = self._arm = winner
            self._length = BURST
            rivals = self._rivals(bucket, promises) if self._rested else []
            if rivals:
                self._arm, self._length = max(rivals, key=promises.__getitem__), TRIAL
        self._settling = SETTLE if self._arm != before else 0
        self._steps = []

    def _rivals(self, bucket: _Bucket, promises: list[float]) -> list[int]:
        """The layouts that are due for a trial.

        Plain decoding is one at every batch size, for it is what nobody may fall behind. Where it is the best one, so is the layout
        with the fewest rows, however little it promises: else nobody would see that drafts have become worth their rows again.
        """
        others = [i for i in range(len(self.layouts)) if i != bucket.best]
        worth = {True: WORTH_A_TRIAL, False: WORTH_THE_FIRST}
        likely = {i for i in others if promises[i] > worth[bucket.arms[i].tried] * promises[bucket.best]}
        likely |= set(self._plain)
        if bucket.best in self._plain and bucket.bursts >= FIRST_RETRY:
            likely |= set(others[:1])
        return [i for i in sorted(likely - {bucket.best}) if bucket.arms[i].due <= bucket.bursts]

    def _finish(self) -> None:
        """Learns from a burst.

        Its time is the median of its steps', each held against what was forecast of its rows: a neighbour on the machine makes some
        of them many times as long.
        """
        bucket, steps = self._buckets[self._bucket], len(self._steps)
        arm = bucket.arms[self._arm]
        requests, rows = (sum(column) / steps for column in list(zip(*self._steps, strict=True))[:2])
        median = statistics.median(seconds / self.cost.predict(here, of_them) for here, of_them, seconds in self._steps)
        ratio = self.agree(median)
        bucket.bursts += 1
        self._gains = self._gains_now()
        if self._arm != bucket.best:
            self._trial, self._rested = _Trial(self._arm, requests, rows, ratio, bucket.pace), False
            return
        if not arm.tried:  # nothing has run at this batch size yet
            self.cost.observe(requests, rows, ratio * self.cost.predict(requests, rows))
            arm.tried, ratio = True, 1.0
        bucket.pace, self._rested = ratio / arm.slowness, True
        if self._trial is not None:
            self._settle(bucket, self._trial, requests, rows)
            self._trial = None
        for each in bucket.arms:  # an old verdict is worth less, and another trial
            each.slowness **= REMEMBER

    def _settle(self, bucket: _Bucket, trial: _Trial, requests: float, rows: float) -> None:
        """Learns from a trial, by what the best layout took before and after it.

        Args:
            bucket: the batch size.
            trial: the rival's burst.
            requests, rows: of the best layout's burst after it.
        """
        if not 1 / UNSETTLED < bucket.pace / trial.pace < UNSETTLED:
            return
        arm, best = bucket.arms[trial.arm], bucket.arms[bucket.best]
        pace = (trial.pace * bucket.pace) ** 0.5
        rival = trial.ratio * self.cost.predict(trial.requests, trial.rows)
        before = self.cost.predict(requests, rows)
        beside = pace * best.slowness * before
        self.cost.observe(trial.requests, trial.rows, rival)
        self.cost.observe(requests, rows, beside)
        forecast = self.cost.predict(requests, rows)
        bucket.pace *= before / forecast
        measured = best.slowness * (rival / beside) / (self.cost.predict(trial.requests, trial.rows) / forecast)
        arm.slowness *= (measured / arm.slowness) ** LEARN
        arm.tried = True
        promises = self._promises(bucket, round(requests))
        lost = (TRIAL + SETTLE) * max(promises[bucket.best] / promises[trial.arm] - 1, 0.0)
        arm.due = bucket.bursts + max(arm.wait, round(lost / (COST_OF_LOOKING * BURST)))
        arm.wait = min(LAST_RETRY, 2 * arm.wait)
