"""Planning against a plain-Python reading of the definitions."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_mtp.layout import Groups, capped, group_lengths, plan_groups, shapes_of
from vllm_mtp.mask_attention import ForkedSequences
from vllm_mtp.plan import EngineStep

K = 4
Requests = list[tuple[int, int, int]]


@st.composite
def requests(draw: st.DrawFn) -> Requests:
    """(computed, rows, drafts or -1) of up to five requests."""
    result = []
    for _ in range(draw(st.integers(1, 5))):
        computed = draw(st.integers(0, 70))
        if draw(st.booleans()):
            drafts = draw(st.integers(0, K))
            rows = 1 + drafts
        else:  # a prompt chunk, which may or may not end its prompt
            rows, drafts = draw(st.integers(1, 40)), draw(st.sampled_from([-1, 0]))
        result.append((computed, rows, drafts))
    return result


def plan(
    batch: Requests, lengths: tuple[int, ...], max_rows: int, max_tail: int = 1000, most: tuple[int, ...] = ()
) -> Groups | None:
    _, rows, drafts = zip(*batch, strict=True)
    shapes = shapes_of(lengths, drafts)
    return plan_groups(rows, capped(shapes, most) if most else shapes, K, max_rows, 1000, max_tail, torch.device("cpu"))


def request_len(batch: Requests) -> torch.Tensor:
    return torch.tensor([computed + rows for computed, rows, _ in batch])


def expected_groups(
    batch: Requests, lengths: tuple[int, ...], max_rows: int, most: list[int] | None = None
) -> list[tuple[int, ...]]:
    groups, first_row, used = [], 0, 0
    for request, (computed, rows, drafts) in enumerate(batch):
        for accepted in range(drafts + 1):
            row = first_row + rows - 1 - drafts + accepted
            length = max(lengths) if accepted == drafts < K else lengths[accepted]
            length = length if most is None else min(length, most[request])
            if length and used + length <= max_rows:
                groups.append((request, accepted, row, computed + rows - drafts + accepted, length))
                used += length
        first_row += rows
    return groups


LAYOUTS = st.sampled_from([group_lengths("quadratic", K), group_lengths("linear", K), (4, 3, 2, 1, 1), (0, 0, 1, 0, 2), (0,) * 5])


@given(requests(), LAYOUTS, st.sampled_from([1000, 10, 3, 0]))
def test_groups_follow_the_definition(batch: Requests, lengths: tuple[int, ...], max_rows: int) -> None:
    expected = expected_groups(batch, lengths, max_rows)
    groups = plan(batch, lengths, max_rows)
    if groups is None:
        assert expected == []
        return
    prefix_len = groups.prefix_len(request_len(batch))
    found = zip(groups.request.tolist(), groups.row.tolist(), prefix_len.tolist(), groups.length.tolist(), strict=True)
    assert list(found) == [(request, row, length_before, length) for request, _, row, length_before, length in expected]
    after = [[-1] * (K + 1) for _ in batch]
    for g, (request, accepted, *_) in enumerate(expected):
        after[request][accepted] = g
    assert groups.after == after
    positions = [length_before + m for *_, length_before, length in expected for m in range(length)]
    assert groups.positions(prefix_len, 10_000).tolist() == positions
    assert groups.positions(prefix_len, 60).tolist() == [min(position, 59) for position in positions]
    assert groups.num_rows == len(positions) <= max_rows


@given(requests(), LAYOUTS, st.sampled_from([1000, 10]), st.lists(st.integers(-1, K), min_size=5, max_size=5))
def test_drafts_come_from_the_group_behind_the_row_accepted_last(
    batch: Requests, lengths: tuple[int, ...], max_rows: int, accepted: list[int]
) -> None:
    groups = plan(batch, lengths, max_rows)
    if groups is None:
        return
    of_requests = torch.tensor(accepted[: len(batch)], dtype=torch.int32)
    rows, own = groups.draft_rows(of_requests, K), groups.of_own_group(of_requests, K)
    assert rows.shape == own.shape == (len(batch), K)
    assert int(rows.max()) < groups.num_rows
    for request, count in enumerate(of_requests.tolist()):
        group = groups.after[request][count] if count >= 0 else -1
        expected = range(groups.starts[group], groups.starts[group + 1]) if group >= 0 else range(0)
        assert rows[request][own[request]].tolist() == list(expected)
        assert own[request].tolist() == [m < len(expected) for m in range(K)]


@given(requests(), LAYOUTS, st.sampled_from([1000, 10]), st.lists(st.integers(0, K), min_size=5, max_size=5))
def test_no_group_is_longer_than_its_request_can_use(
    batch: Requests, lengths: tuple[int, ...], max_rows: int, most: list[int]
) -> None:
    groups = plan(batch, lengths, max_rows, most=tuple(most[: len(batch)]))
    found = [] if groups is None else list(zip(groups.request.tolist(), groups.row.tolist(), groups.lengths, strict=True))
    expected = expected_groups(batch, lengths, max_rows, most)
    assert found == [(request, row, length) for request, _, row, _, length in expected]


@given(requests(), st.sampled_from([group_lengths("quadratic", K), (4, 3, 2, 1, 1)]), st.sampled_from([4, 16, 32]))
def test_a_fork_holds_its_prefix_and_its_group(batch: Requests, lengths: tuple[int, ...], block_size: int) -> None:
    """Executes the plan on a cache of token labels and reads every fork back through its block table."""
    groups = plan(batch, lengths, 10_000, block_size)
    if groups is None:
        return
    width = 128 // block_size
    table = torch.arange(len(batch) * width).view(len(batch), width)
    scratch = len(batch) * width
    forks = ForkedSequences(lambda step: step)
    cache = torch.full((scratch + groups.num_groups * forks.blocks_per_group(K, block_size), block_size), -1)
    labels = []  # of the step's rows: request * 1000 + position, and 100_000 + mask row
    for request, (computed, rows, _) in enumerate(batch):
        for position in range(computed + rows):
            label = request * 1000 + position
            if position >= computed:
                labels.append(label)
            else:
                cache[table[request, position // block_size], position % block_size] = label
    prefix_len = groups.prefix_len(request_len(batch))
    step = EngineStep((), (), request_len(batch), 200, table)
    fork = forks.plan(groups, prefix_len, step, block_size, scratch)
    cache[fork.copy_to] = cache[fork.copy_from]
    for request, (computed, rows, _) in enumerate(batch):
        for position in range(computed, computed + rows):  # the engine's own writes
            cache[table[request, position // block_size], position % block_size] = request * 1000 + position
    labels += [100_000 + m for m in range(groups.num_rows)]
    written = fork.slots >= 0
    assert fork.written_rows[: groups.num_real].tolist() == list(range(groups.num_real))
    cache.view(-1)[fork.slots[written]] = torch.tensor(labels)[fork.written_rows[groups.num_real :][written]]
    starts = fork.query_start.tolist()
    assert fork.longest_query == max(end - start for start, end in pairwise(starts))
    for request, (computed, rows, _) in enumerate(batch):
        found = cache[fork.block_table[request].long()].view(-1)[: int(fork.seq_lens[request])].tolist()
        assert found == [request * 1000 + p for p in range(computed + rows)]
        assert starts[request + 1] - starts[request] == rows
    for g in range(groups.num_groups):
        sequence = len(batch) + g
        found = cache[fork.block_table[sequence].long()].view(-1)[: int(fork.seq_lens[sequence])].tolist()
        assert starts[sequence : sequence + 2] == [groups.num_real + groups.starts[g], groups.num_real + groups.starts[g + 1]]
        masks = range(groups.starts[g], groups.starts[g + 1])
        label = int(groups.request[g]) * 1000
        assert found == [label + p for p in range(int(prefix_len[g]))] + [100_000 + m for m in masks]
