"""Which layout a step uses under `auto`: the one that has given the most tokens a second, at this batch size, on this machine.

Mask rows are nearly free while a step is bound by reading weights and cost full price after that; where that is depends on model,
machine and batch, and what the rows are worth depends on the text. So both are measured while serving: each layout runs in bursts
of steps, the best one most of the time and its rivals ever more rarely. The layout without mask rows, plain decoding, is one of
them. Where steps overlap and cannot be timed one by one, `widest_comb` takes what the batch has rows for.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_mtp.layout import group_lengths

SETTLE = 2  # steps after a change that still verify, or pay for, what the layout before asked for
BURST = 24
TRIAL = 12  # steps of a burst that tries a rival
FIRST_RETRY, LAST_RETRY = 8, 512  # bursts until a rival is tried again; doubled each time it loses
MEMORY = 0.8  # what an older burst counts when a newer one of the same layout comes in
GLIMPSE, FAR_OFF = 3, 0.75  # a trial ends after so many steps if they gave less than this share of the best one's tokens a second
HOPELESS = 0.85  # a layout slower than this share of the best is tried again rarely; if of a narrower one, no wider one is tried
CLEARLY = 1.02  # a rival must be better by this factor to take over; plain decoding takes over even when worse by it


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
    """What is known of one layout at one batch size."""

    tokens: float = 0.0
    seconds: float = 0.0
    wait: int = FIRST_RETRY
    due: int = 0
    """Burst, counted at this batch size, at which it is tried again."""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class _Bucket:
    """The layouts at one batch size."""

    arms: list[_Arm]
    best: int
    bursts: int = 0


@dataclass
class LayoutChooser:
    """Chooses each step's layout from what the steps before it gave.

    Args:
        layouts: what to choose from (`fitting_layouts`), in order of their rows.
        agree: makes one time of those that the ranks of an engine measured; called once or twice a burst. The time is all that
            could make them choose different layouts.
    """

    layouts: list[tuple[int, ...]]
    agree: Callable[[float], float] = float

    def __post_init__(self) -> None:
        self._plain = [i for i, lengths in enumerate(self.layouts) if not any(lengths)]
        self._buckets: dict[int, _Bucket] = {}
        self._bucket = -1
        self._arm = 0
        self._left = self._settling = 0
        self._tokens = self._seconds = 0.0

    def choose(self, num_requests: int) -> tuple[int, ...]:
        """The layout of a step with `num_requests` requests."""
        bucket = (num_requests - 1).bit_length()
        if bucket != self._bucket:
            self._bucket = bucket
            self._start()
        return self.layouts[self._arm]

    def observe(self, tokens: int, seconds: float) -> None:
        """Takes in a step that only decoded: tokens that it gave, and the time from the end of the step before to its own.

        Steps with prompts in them, and those after an idle server, are not comparable and must not be given.
        """
        if self._settling:
            self._settling -= 1
            return
        self._tokens += tokens
        self._seconds += seconds
        self._left -= 1
        if self._left == 0 or self._is_far_off():
            self._finish()
            self._start()

    def _is_far_off(self) -> bool:
        """Whether a trial's first steps say enough."""
        bucket = self._buckets[self._bucket]
        best = bucket.arms[bucket.best]
        glimpsed = self._arm != bucket.best and best.seconds and TRIAL - self._left == GLIMPSE
        return bool(glimpsed) and self._tokens < FAR_OFF * best.rate * self.agree(self._seconds)

    def best(self, num_requests: int) -> tuple[int, ...]:
        """The layout that is best so far for `num_requests` requests."""
        return self.layouts[self._known((num_requests - 1).bit_length()).best]

    def _known(self, bucket: int) -> _Bucket:
        if bucket not in self._buckets:
            nearest = min(self._buckets, key=lambda other: abs(other - bucket), default=None)
            if nearest is None:  # an unknown server starts in the middle
                self._buckets[bucket] = _Bucket([_Arm() for _ in self.layouts], len(self.layouts) // 2)
            else:
                # The nearest batch size is the best guess, also of what is not worth trying soon; plain decoding always is.
                near = self._buckets[nearest]
                waits = [arm.wait if arm.seconds else FIRST_RETRY**2 for arm in near.arms]
                arms = [_Arm(wait=wait, due=wait // 4 if i and wait > FIRST_RETRY else 0) for i, wait in enumerate(waits)]
                self._buckets[bucket] = _Bucket(arms, near.best)
        return self._buckets[bucket]

    def _start(self) -> None:
        """Begins a burst of the best layout, or of a rival that is due."""
        bucket = self._known(self._bucket)
        before = self._arm
        rivals = [i for i in self._rivals(bucket) if bucket.arms[i].due <= bucket.bursts]
        if bucket.arms[bucket.best].seconds == 0 or not rivals:
            self._arm = bucket.best
        else:
            self._arm = min(rivals, key=lambda i: (bucket.arms[i].due, abs(i - bucket.best)))
        self._left = BURST if self._arm == bucket.best else TRIAL
        self._settling = SETTLE if self._arm != before else 0
        self._tokens = self._seconds = 0.0

    def _rivals(self, bucket: _Bucket) -> list[int]:
        """Every layout but the best, less those that were never tried and are wider than one that lost by being too wide."""
        tried = [(lengths, arm.rate) for lengths, arm in zip(self.layouts, bucket.arms, strict=True) if arm.seconds]

        def too_wide(lengths: tuple[int, ...]) -> bool:
            kin = sorted((max(other), rate) for other, rate in tried if not max(other) or bool(other[0]) == bool(lengths[0]))
            narrower = [rate for width, rate in kin if width < max(lengths)]
            return len(narrower) > 1 and narrower[-1] < HOPELESS * max(narrower)

        return [
            i
            for i, (lengths, arm) in enumerate(zip(self.layouts, bucket.arms, strict=True))
            if i != bucket.best and (arm.seconds or not too_wide(lengths))
        ]

    def _takes_over(self, bucket: _Bucket, rival: int) -> bool:
        """Whether a layout becomes the best. In a tie it is plain decoding: what brings nothing is not worth its rows."""
        if rival == bucket.best or not bucket.arms[rival].seconds:
            return False
        margin = 1 / CLEARLY if rival in self._plain else CLEARLY**2 if bucket.best in self._plain else CLEARLY
        return bucket.arms[rival].rate > margin * bucket.arms[bucket.best].rate

    def _finish(self) -> None:
        bucket = self._buckets[self._bucket]
        arm, best = bucket.arms[self._arm], bucket.arms[bucket.best]
        arm.tokens = MEMORY * arm.tokens + self._tokens
        arm.seconds = MEMORY * arm.seconds + self.agree(self._seconds)
        bucket.bursts += 1
        if arm is best:
            better = max(range(len(bucket.arms)), key=lambda i: bucket.arms[i].rate)
            for rival in (better, *self._plain):
                if self._takes_over(bucket, rival):
                    bucket.best = rival
            return
        if self._takes_over(bucket, self._arm):
            bucket.best, arm.wait = self._arm, FIRST_RETRY
            best.wait, best.due = FIRST_RETRY, bucket.bursts + FIRST_RETRY
            return
        arm.wait = min(
            LAST_RETRY, arm.wait * (2 if arm.rate > HOPELESS * best.rate else 8 if arm.rate > FAR_OFF * best.rate else 64)
        )
        arm.due = bucket.bursts + arm.wait
