"""Which layout a step uses: as many mask rows as its batch can carry.

The mask rows of a comb are nearly free while a step is bound by reading weights and cost full price after that, so the layout gets
thinner as the batch grows, down to no masks at all.
"""

from vllm_mtp.layout import group_lengths


def layouts_by_richness(k: int) -> list[tuple[int, ...]]:
    """The layouts that `auto` chooses from, richest first: full comb, shorter combs, then linear ones, then none.

    All have 1 + k entries, so that a request may still verify k drafts of the step before.
    """
    combs = [tuple(min(k, width) for _ in range(k + 1)) for width in range(k, 0, -1)]
    none = (0,) * (k + 1)
    return [group_lengths("quadratic", k), *combs[1:], none]


def rows_of(lengths: tuple[int, ...]) -> int:
    """Rows of a request that verifies as many drafts as the layout's longest group gives: verified rows and mask rows."""
    width = max(lengths)
    return 1 + width + sum(lengths[: width + 1])


def choose(num_requests: int, k: int, max_rows: int) -> tuple[int, ...]:
    """The richest layout whose rows for `num_requests` decoding requests stay within `max_rows`."""
    for lengths in layouts_by_richness(k):
        if max(lengths) == 0 or num_requests * rows_of(lengths) <= max_rows:
            return lengths
    raise AssertionError("the layout without masks always fits")
