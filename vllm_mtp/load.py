"""Load control under `auto`: whether a step has mask rows, and what a row may cost, so that nobody falls behind plain decoding.

Mask rows are nearly free while a step is bound by reading weights and cost full price after that; where that is depends on model,
machine and batch, and what the rows are worth depends on the text. So both are measured while serving. What a row takes, over what
a token takes, is its price, by which `shaping` gives each request its groups. Plain decoding is held against that in short bursts
of steps, ever more rarely the more often it loses, and so are drafts where plain decoding is what runs. What such a burst takes
beside those before and after it corrects the forecast: a machine has neighbours, and a time alone says little. Where steps overlap
and cannot be timed one by one, `best_comb` goes by the model's roofline.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from vllm_mtp.forecast import Batch, StepCost
from vllm_mtp.layout import group_lengths
from vllm_mtp.roofline import WORTH_IT, Roofline
from vllm_mtp.shaping import FIRST_PRICE, LOWEST_PRICE, SHAPED

SETTLE = 2  # steps after a change that still verify, or pay for, what was asked for before it
BURST = 24
TRIAL = 8  # steps of a burst that tries the other way, and more where those with drafts have few requests
OF_A_TRIAL = 32  # a request in a step each: how many tokens it gets differs too much for fewer of them to tell anything
PATIENCE = 3  # steps that are not comparable, over those that a trial has, after which it is given up
FIRST_RETRY, LAST_RETRY = 8, 64  # bursts until it is tried again; doubled each time it loses
COST_OF_LOOKING = 0.003  # share of the time that trials may cost; what is far off waits longer
CLEARLY = 1.02  # drafts take over if they promise twice this more; plain decoding takes over even with so much less
LEARN = 0.5  # how fast trials correct what one way costs beside the forecast
UNSETTLED = 1.15  # a trial means nothing where the other way's own steps changed so much meanwhile
REMEMBER = 0.99  # what is left of such a correction a burst later
OF_ANOTHER_PRICE = 50.0  # most that this counts at another price than it was seen at
DEARER = 1.5  # drafts that lost when a row was held so many times cheaper have not lost: there were too many of them
RECENT = 8  # bursts with drafts; what one before them brought means nothing if rows have become dearer or cheaper
IN_MIND = 200.0
"""A request in a step each, after which older ones count less in what is known of tokens and rows."""
NEW = 0.3  # most that a burst counts in it
ALIKE = 0.1  # share by which the number of requests may differ between steps of a burst that are told apart by something else
KINDS_OF_ROWS = attrgetter("rows"), attrgetter("prompt_rows")  # of a step, which the steps of a burst may differ in
TOLD_APART = 0.2  # share by which steps must differ from others, in rows or in context, to tell what that takes


def candidate_layouts(k: int) -> list[tuple[int, ...]]:
    """Layouts for all loads, in order of their rows: none, then linear ones and combs of growing width.

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
"""Most mask rows of a step on an accelerator, unless `max_mask_rows` says otherwise: what memory is set aside for. How many are
worth their time says `roofline`."""


def mask_row_budget(asked: int | None, max_rows: int, *, on_cpu: bool) -> int:
    """Most mask rows of a step: the operator's `max_mask_rows` or the platform's, and never more than a step may have rows."""
    return min(max_rows, asked or (max_rows if on_cpu else MASK_ROWS_OF_AN_ACCELERATOR))


def best_comb(
    layouts: list[tuple[int, ...]], num_requests: int, max_rows: int, max_mask_rows: int, roofline: Roofline
) -> tuple[int, ...]:
    """The layout with groups behind every row that promises most of those that `num_requests` requests have room for; the one
    without masks if none promises more than plain decoding.

    What stands for `auto` where steps are not timed one by one, because under asynchronous scheduling they overlap.

    Args:
        layouts: from which to choose, in order of their rows.
        num_requests: decoding requests of the step.
        max_rows, max_mask_rows: most rows of a step, and most mask rows.
        roofline: of the model.
    """
    fitting = {
        lengths: roofline.gain(num_requests, max(lengths), rows_of(lengths))
        for lengths in layouts
        if lengths[0] and num_requests * rows_of(lengths) <= max_rows and num_requests * sum(lengths) <= max_mask_rows
    }
    best = max(fitting, key=fitting.__getitem__, default=None)
    return best if best is not None and fitting[best] >= WORTH_IT else (0,) * len(layouts[0])


def drafts_by_batch_size(
    layouts: list[tuple[int, ...]], max_requests: int, max_rows: int, max_mask_rows: int, roofline: Roofline
) -> list[tuple[int, int, int]]:
    """What `best_comb` drafts, as vLLM's scheduler wants it: (first, last number of requests, drafts)."""
    ranges: list[tuple[int, int, int]] = []
    for count in range(1, max_requests + 1):
        drafts = max(best_comb(layouts, count, max_rows, max_mask_rows, roofline))
        if ranges and ranges[-1][2] == drafts:
            ranges[-1] = (ranges[-1][0], count, drafts)
        else:
            ranges.append((count, count, drafts))
    return ranges


@dataclass
class _Way:
    """What is known of plain decoding, or of drafting, at one batch size.

    Attributes:
        slowness: what its steps take, of what was forecast, relative to the other way's at this batch size.
        tried: whether it has run at this batch size.
        wait: bursts until it is tried again.
        due: burst, counted at this batch size, at which that is.
    """

    slowness: float = 1.0
    tried: bool = False
    wait: int = FIRST_RETRY
    due: int = 0


@dataclass
class _Bucket:
    """One batch size.

    Attributes:
        plain, shaped: the two ways.
        drafts: whether steps have drafts, but for trials.
        pace: what its steps take of late, of what was forecast; it changes with the machine's neighbours, for both ways alike.
    """

    plain: _Way = field(default_factory=_Way)
    shaped: _Way = field(default_factory=_Way)
    drafts: bool = True
    bursts: int = 0
    pace: float = 1.0

    def way(self, drafts: bool) -> _Way:
        """Drafting, or plain decoding."""
        return self.shaped if drafts else self.plain


class _Step(NamedTuple):
    """What was in a step, or in the steps of a burst in the mean, what it gave, and how long it took."""

    requests: float
    rows: float
    context: float
    prompt_rows: float
    tokens: float
    seconds: float

    @property
    def batch(self) -> Batch:
        return Batch(self.requests, self.rows, self.context, self.prompt_rows)


@dataclass
class _Trial:
    """A burst of the other way between two of the better one.

    Attributes:
        mean: its steps.
        ratio: of their time to the forecast.
        pace: of the better way before it.
    """

    mean: _Step
    ratio: float
    pace: float


class _Gain(NamedTuple):
    """What drafts bring.

    Attributes:
        tokens, rows: of a request in a step with drafts.
        weight: of how many, a request in a step each, that is known.
    """

    tokens: float
    rows: float
    weight: float

    def with_burst(self, tokens: float, rows: float, weight: float) -> "_Gain":
        """With what a burst showed."""
        share = weight / (self.weight + weight)
        if self.weight == IN_MIND:
            share = min(NEW, share)

        def mixed(old: float, new: float) -> float:
            return old + share * (new - old)

        return _Gain(mixed(self.tokens, tokens), mixed(self.rows, rows), min(IN_MIND, self.weight + weight))


HOPED_GAIN = _Gain(1.8, 6.0, 8.0)  # before drafts were seen


class LoadControl:
    """Chooses from what the steps before it gave whether a step has drafts, and says what a row may cost.

    Args:
        k: most mask tokens of a group.
        agree: makes one list of times of those that the ranks of an engine measured; called once a burst. The times are all that
            could make them choose differently.
        cost: what is known of steps; None: nothing.
    """

    def __init__(self, k: int, agree: Callable[[list[float]], list[float]] = list, cost: StepCost | None = None) -> None:
        self.agree, self.cost = agree, StepCost() if cost is None else cost
        self.plain = (0,) * (k + 1)
        self.price = FIRST_PRICE
        """Of a row, in tokens."""
        self._gains: dict[int, _Gain] = {}
        """By price, each level of which is `DEARER` times the one before."""
        self._seen: deque[int] = deque(maxlen=RECENT)
        """Levels of the last bursts with drafts."""
        self._buckets: dict[int, _Bucket] = {}
        self._bucket = -1
        self._drafts = True
        self._length, self._settling = BURST, 0
        self._rested = False
        """Whether the last burst was one of the better way at this batch size, which a trial can be held against."""
        self._last = _Step(0, 0, 0, 0, 0, 0)
        """That burst."""
        self._trial: _Trial | None = None
        self._context = self._priced_at = 0.0
        self._steps: list[_Step] = []
        """Those of the running burst."""
        self._skipped = 0
        """Steps beside them that were not comparable."""
        self._without = 0
        """Requests in them, counted in every step, that wanted no drafts."""

    def choose(self, num_requests: int, context: float = 0.0) -> tuple[int, ...]:
        """The layout of a step with `num_requests` requests of so many tokens in the mean: without masks, or `SHAPED`."""
        bucket, self._context = (num_requests - 1).bit_length(), context
        if bucket != self._bucket:
            self._bucket, self._rested, self._trial = bucket, False, None
            self._start(num_requests)
        elif self._is_elsewhere(context, self._priced_at) and self._drafts == self._known(bucket).drafts:
            self._reconsider(num_requests)
        return self.running

    def observe(self, tokens: Sequence[int], rows: int, seconds: float, without: int = 0, prompt_rows: int = 0) -> None:
        """Takes in a step.

        Those after an idle server are not comparable and must not be given; those that are mostly prompts are left out here.

        Args:
            tokens: that each request got, of those that got any.
            rows: of these requests, mask rows among them and prompts not.
            seconds: from the end of the step before to its own.
            without: requests that wanted no drafts. They say nothing of what drafts bring, and a step of them alone says nothing.
            prompt_rows: of the step; of a prompt that ends in it all but the last one.
        """
        if without == len(tokens):
            return
        step = _Step(len(tokens), rows, self._context, prompt_rows, sum(tokens), seconds)
        if prompt_rows and self.cost.is_mostly_prompts(step.batch):
            self.skip(len(tokens))
            return
        if self._settling:
            self._settling -= 1
            return
        self._steps.append(step)
        self._without += without
        count = len(self._steps)
        if count == self._length or (count >= TRIAL and count + self._skipped >= 2 * self._length):
            self._finish()
            self._start(len(tokens))

    def skip(self, num_requests: int) -> None:
        """A step of `num_requests` requests went by that is not comparable.

        Where most are not, since prompts are long and many, a burst ends with fewer steps, and a trial that sees too few of its own
        ends with none: the other way would run on for want of a verdict.
        """
        self._skipped += 1
        bucket = self._buckets.get(self._bucket)
        if bucket is None or self._drafts == bucket.drafts or self._skipped < PATIENCE * self._length:
            return
        other = bucket.way(self._drafts)
        other.due, other.wait = bucket.bursts + other.wait, min(LAST_RETRY, 2 * other.wait)
        self._trial, self._rested = None, False
        self._start(num_requests)

    @property
    def running(self) -> tuple[int, ...]:
        """The layout of the running burst."""
        return SHAPED if self._drafts else self.plain

    def expected(self, num_requests: int, rows: int, prompt_rows: int = 0) -> float:
        """Seconds that a step of the running burst should take."""
        bucket = self._known(self._bucket)
        slowness = bucket.way(self._drafts).slowness * bucket.pace
        batch = Batch(num_requests, rows, self._context, prompt_rows)
        return self.cost.predict(batch) * slowness if self.cost.is_fitted else 0.0

    def best(self, num_requests: int) -> tuple[int, ...]:
        """What is better so far for `num_requests` requests."""
        return SHAPED if self._drafts_win(self._known((num_requests - 1).bit_length()), num_requests) else self.plain

    @property
    def _level(self) -> int:
        """Of the price."""
        return round(math.log(self.price, DEARER))

    @property
    def _gain(self) -> _Gain:
        """What drafts bring at about this price, or where that was not seen for long, as they did last."""
        if self._level in self._seen:
            return self._gains[self._level]
        return self._gains[self._seen[-1]] if self._seen else HOPED_GAIN

    def _known(self, bucket: int) -> _Bucket:
        if bucket not in self._buckets:
            # What trials have shown at the next batch size is nearer to the truth than the forecast alone.
            near = self._buckets.get(min(self._buckets, key=lambda other: abs(other - bucket), default=-1), _Bucket())
            self._buckets[bucket] = _Bucket(_Way(near.plain.slowness), _Way(near.shaped.slowness))
        return self._buckets[bucket]

    def _forecast(self, num_requests: float, rows: float) -> float:
        """Seconds of a step at the context that requests have now."""
        return self.cost.predict(Batch(num_requests, rows, self._context))

    def _promises(self, bucket: _Bucket, num_requests: float) -> tuple[float, float]:
        """Tokens a second of plain decoding and with drafts."""
        tokens, rows, _ = self._gain
        plain = num_requests / (self._forecast(num_requests, num_requests) * bucket.plain.slowness)
        return plain, num_requests * tokens / (self._forecast(num_requests, num_requests * rows) * bucket.shaped.slowness)

    def _drafts_win(self, bucket: _Bucket, num_requests: int) -> bool:
        """Whether drafts are worth their rows. In doubt it stays as it is, and above all plain: what brings nothing is not worth
        its rows."""
        plain, shaped = self._promises(bucket, num_requests)
        return shaped > (CLEARLY if bucket.drafts else CLEARLY**2) * plain

    @staticmethod
    def _is_elsewhere(context: float, before: float) -> bool:
        """Whether requests have become so much longer or shorter that it tells something, or matters."""
        return abs(context - before) > TOLD_APART * max(context, before)

    def _reconsider(self, num_requests: int) -> None:
        """Holds to the better way at the context that there is now; the running burst goes on where that is the same."""
        bucket = self._known(self._bucket)
        self._set_price(bucket, num_requests)
        if self.cost.is_fitted and self._drafts_win(bucket, num_requests) != bucket.drafts:
            self._rested, self._trial = False, None
            self._start(num_requests)

    def _set_price(self, bucket: _Bucket, num_requests: int) -> None:
        self._priced_at = self._context
        if self.cost.is_fitted:
            self.price = max(LOWEST_PRICE, self.cost.of_a_row(self._context) * max(self._promises(bucket, num_requests)))

    def _start(self, num_requests: int) -> None:
        """Begins a burst of the better way, or a trial of the other one if that is due."""
        bucket, before = self._known(self._bucket), self._drafts
        self._drafts, self._length = bucket.drafts, TRIAL
        self._set_price(bucket, num_requests)
        if self.cost.is_fitted and self._trial is None:
            drafts = self._drafts_win(bucket, num_requests)
            self._rested &= drafts == bucket.drafts
            bucket.drafts = self._drafts = drafts
            self._length = BURST
            due = bucket.way(not drafts).due <= bucket.bursts or (not drafts and self._level not in self._seen)
            if self._rested and due:
                self._drafts, self._length = not drafts, _steps_of_a_trial(not drafts, num_requests)
        self._settling = SETTLE if self._drafts != before else 0
        self._steps, self._skipped, self._without = [], 0, 0

    def _finish(self) -> None:
        """Learns from a burst.

        Its time is the median of its steps', each held against what was forecast of its rows: a neighbour on the machine makes some
        of them many times as long.
        """
        bucket, count = self._buckets[self._bucket], len(self._steps)
        way, mean = bucket.way(self._drafts), _mean(self._steps)
        by_kind = [(kind, *_halves(self._steps, kind)) for kind in KINDS_OF_ROWS]
        parts = [self._steps, *(half for _, *halves in by_kind for half in halves)]
        ratios = {step: step.seconds / self._of(step) for step in self._steps}
        ratio, *of_halves = self.agree([statistics.median(ratios[step] for step in steps) for steps in parts])
        bucket.bursts += 1
        if self._drafts:
            without = self._without / count
            requests = mean.requests - without
            known = self._gain
            if self._level not in self._seen:
                known = known._replace(weight=min(known.weight, OF_ANOTHER_PRICE) if bucket.drafts else 0.0)
            seen = (mean.tokens - without) / requests, (mean.rows - without) / requests
            self._gains[self._level] = known.with_burst(*seen, requests * count)
            self._seen.append(self._level)
        if self._drafts != bucket.drafts:
            self._trial, self._rested = _Trial(mean, ratio, bucket.pace), False
            return
        if not way.tried:  # nothing has run at this batch size yet
            self.cost.observe(mean.batch, ratio * self._of(mean))
            way.tried, ratio = True, 1.0
        else:
            for (kind, few, many), of_few, of_many in zip(by_kind, of_halves[::2], of_halves[1::2], strict=True):
                self._learn_rows(kind, _mean(few), _mean(many), of_few / ratio, of_many / ratio)
        if self._rested:
            self._learn_context(self._last, mean, ratio / way.slowness / bucket.pace)
        bucket.pace, self._rested, self._last = ratio / way.slowness, True, mean
        if self._trial is not None:
            self._settle(bucket, self._trial, mean)
            self._trial = None
        for each in (bucket.plain, bucket.shaped):  # an old verdict is worth less, and another trial
            each.slowness **= REMEMBER

    def _of(self, step: _Step) -> float:
        """Seconds that were forecast for such a step."""
        return self.cost.predict(step.batch)

    def _learn_rows(self, kind: Callable[[_Step], float], few: _Step, many: _Step, of_few: float, of_many: float) -> None:
        """Learns what a row takes from the steps of a burst that had fewer of a kind and those that had more.

        Args:
            kind: rows of a step.
            few, many: the steps, in the mean.
            of_few, of_many: what they took, of what was forecast, beside all steps of the burst.
        """
        if abs(many.requests - few.requests) > ALIKE * few.requests:
            return
        if kind(many) - kind(few) < TOLD_APART * (few.rows + few.prompt_rows):
            return
        less, more = self._of(few) * of_few, self._of(many) * of_many
        self.cost.observe_change(few.batch, many.batch, more - less, less)

    def _learn_context(self, before: _Step, after: _Step, change: float) -> None:
        """Learns what context takes from two bursts of the better way, one after the other, where it is not the same.

        Args:
            before, after: the bursts.
            change: of what their steps took beside the forecast.
        """
        if self._is_elsewhere(after.context, before.context):
            step = self._of(before)
            self.cost.observe_change(before.batch, after.batch, change * self._of(after) - step, step)

    def _settle(self, bucket: _Bucket, trial: _Trial, after: _Step) -> None:
        """Learns from a trial, by what the better way took before and after it.

        Args:
            bucket: the batch size.
            trial: the other way's burst.
            after: of the better way's burst after it.
        """
        other, best = bucket.way(not bucket.drafts), bucket.way(bucket.drafts)
        if not 1 / UNSETTLED < bucket.pace / trial.pace < UNSETTLED:
            other.due = bucket.bursts + FIRST_RETRY // 2
            return
        pace = (trial.pace * bucket.pace) ** 0.5
        rival, before = trial.ratio * self._of(trial.mean), self._of(after)
        beside = pace * best.slowness * before
        self.cost.observe(trial.mean.batch, rival)
        self.cost.observe(after.batch, beside)
        forecast = self._of(after)
        bucket.pace *= before / forecast
        measured = best.slowness * (rival / beside) / (self._of(trial.mean) / forecast)
        other.slowness *= (measured / other.slowness) ** LEARN
        other.tried = True
        promises = self._promises(bucket, after.requests)
        # In steps of the better way; those of the other one may be many times as long.
        steps = _steps_of_a_trial(not bucket.drafts, after.requests) + SETTLE
        lost = steps * rival / beside * max(1 - promises[not bucket.drafts] / promises[bucket.drafts], 0.0)
        other.due = bucket.bursts + max(other.wait, round(lost / (COST_OF_LOOKING * BURST)))
        other.wait = min(LAST_RETRY, 2 * other.wait)


def _steps_of_a_trial(drafts: bool, num_requests: float) -> int:
    """What plain decoding gives is known, and its time is much the same in every step."""
    return max(TRIAL, math.ceil(OF_A_TRIAL / num_requests)) if drafts else TRIAL


def _halves(steps: Sequence[_Step], key: Callable[[_Step], float]) -> tuple[list[_Step], list[_Step]]:
    """The half of the steps where `key` is small, and that where it is large; one in the middle is in neither."""
    in_order, count = sorted(steps, key=key), len(steps)
    return in_order[: count // 2], in_order[(count + 1) // 2 :]


def _mean(steps: Sequence[_Step]) -> _Step:
    return _Step(*(statistics.fmean(column) for column in zip(*steps, strict=True)))
