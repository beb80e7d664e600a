"""Planning against a plain-Python reading of the definitions."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm_mtp.layout import Batch, group_lengths, plan_groups
from vllm_mtp.load import choose, layouts_by_richness, rows_of
from vllm_mtp.mask_attention import blocks_per_fork, plan_forks

K = 4


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """(computed, rows, drafts or -1, most tokens) of up to five requests."""
    result = []
    for _ in range(draw(st.integers(1, 5))):
        computed = draw(st.integers(0, 70))
        if draw(st.booleans()):
            drafts = draw(st.integers(0, K))
            rows = 1 + drafts
        else:  # a prompt chunk, which may or may not end its prompt
            rows, drafts = draw(st.integers(1, 40)), draw(st.sampled_from([-1, 0]))
        most = computed + rows + draw(st.integers(-K, 12))
        result.append((computed, rows, drafts, max(most, computed + rows - max(drafts, 0))))
    return result


def to_batch(batch: list[tuple[int, int, int, int]]) -> Batch:
    computed, rows, drafts, most = (torch.tensor(column) for column in zip(*batch, strict=True))
    start = torch.cat([torch.zeros(1, dtype=torch.long), rows.cumsum(0)])
    return Batch(start, computed + rows, drafts, most)


def expected_groups(batch: list[tuple[int, int, int, int]], lengths: tuple[int, ...], max_rows: int) -> list[tuple[int, ...]]:
    groups, first_row, used = [], 0, 0
    for request, (computed, rows, drafts, most) in enumerate(batch):
        for accepted in range(drafts + 1):
            row = first_row + rows - 1 - drafts + accepted
            prefix_len = computed + rows - drafts + accepted
            wanted = max(lengths) if accepted == drafts < K else lengths[accepted]
            length = max(0, min(wanted, most - 1 - prefix_len))
            used += length
            if length and used <= max_rows:
                groups.append((request, accepted, row, prefix_len, length))
        first_row += rows
    return groups


LAYOUTS = st.sampled_from([group_lengths("quadratic", K), group_lengths("linear", K), (4, 3, 2, 1, 1), (0, 0, 1, 0, 2), (0,) * 5])


@given(requests(), LAYOUTS, st.sampled_from([1000, 10, 3, 0]))
def test_groups_follow_the_definition(batch: list[tuple[int, int, int, int]], lengths: tuple[int, ...], max_rows: int) -> None:
    expected = expected_groups(batch, lengths, max_rows)
    groups = plan_groups(to_batch(batch), torch.tensor(lengths), max_rows)
    if groups is None:
        assert expected == []
        return
    found = zip(groups.request.tolist(), groups.row.tolist(), groups.prefix_len.tolist(), groups.length.tolist(), strict=True)
    assert list(found) == [(request, row, prefix_len, length) for request, _, row, prefix_len, length in expected]
    after = torch.full((len(batch), K + 1), -1)
    for g, (request, accepted, *_) in enumerate(expected):
        after[request, accepted] = g
    assert torch.equal(groups.after, after)
    positions = [prefix_len + m for *_, prefix_len, length in expected for m in range(length)]
    assert groups.positions.tolist() == positions
    assert groups.num_rows == len(positions) <= max_rows


@given(requests(), st.sampled_from([group_lengths("quadratic", K), (4, 3, 2, 1, 1)]), st.sampled_from([4, 16, 32]))
def test_a_fork_holds_its_prefix_and_its_group(batch: list[tuple[int, int, int, int]], lengths: tuple[int, ...], block_size: int) -> None:
    """Executes the plan on a cache of token labels and reads every fork back through its block table."""
    plan = to_batch(batch)
    groups = plan_groups(plan, torch.tensor(lengths), 10_000)
    if groups is None:
        return
    width = 128 // block_size
    table = torch.arange(len(batch) * width).view(len(batch), width)
    scratch = len(batch) * width
    cache = torch.full((scratch + groups.num_groups * blocks_per_fork(K, block_size), block_size), -1)
    labels = []  # of the step's rows: request * 1000 + position, and 100_000 + mask row
    for request, (computed, rows, _, _) in enumerate(batch):
        for position in range(computed + rows):
            label = request * 1000 + position
            if position >= computed:
                labels.append(label)
            else:
                cache[table[request, position // block_size], position % block_size] = label
    fork = plan_forks(plan, groups, table, block_size, scratch, K)
    cache[fork.copy_to] = cache[fork.copy_from]
    for request, (computed, rows, _, _) in enumerate(batch):
        for position in range(computed, computed + rows):  # the engine's own writes
            cache[table[request, position // block_size], position % block_size] = request * 1000 + position
    labels += [100_000 + m for m in range(groups.num_rows)]
    cache.view(-1)[fork.slots] = torch.tensor(labels)[fork.source_rows]
    for g in range(groups.num_groups):
        length = int(fork.seq_lens[g])
        found = cache[fork.block_table[g].long()].view(-1)[:length].tolist()
        request, prefix_len = int(groups.request[g]), int(groups.prefix_len[g])
        masks = range(int(groups.start[g]), int(groups.start[g + 1]))
        assert found == [request * 1000 + p for p in range(prefix_len)] + [100_000 + m for m in masks]


def test_auto_gets_thinner_as_the_batch_grows_and_ends_without_masks() -> None:
    chosen = [choose(batch, 8, 128) for batch in range(1, 200)]
    richness = [layouts_by_richness(8).index(lengths) for lengths in chosen]
    assert richness == sorted(richness)
    assert chosen[0] == group_lengths("quadratic", 8)
    assert max(chosen[-1]) == 0
    assert all(batch * rows_of(lengths) <= 128 for batch, lengths in enumerate(chosen, 1) if max(lengths))
