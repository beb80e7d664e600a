"""Groups and rows of a step: which real rows are followed by mask tokens, how many, and at which positions.

A *group* stands for "this row's token is the last one accepted": it has `length` mask tokens that follow the prefix ending
in that row.

A step has a *shape* (rows and drafts of each request, group lengths) and *prefix lengths*. Everything that follows from the
shape alone is
made once and kept, because decoding repeats a few shapes over and over; what depends on prefix lengths is a handful of
tensor operations
without host reads. No vLLM import.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain

import torch


def group_lengths(layout: str | tuple[int, ...], k: int) -> tuple[int, ...]:
    """Length of the group behind row j of a decoding request, for j = 0 .. k drafts accepted.

    Args:
        layout: "quadratic" (k behind every row), "linear" (k behind the last row only; *Your LLM Knows the Future*, section
        3.3) or the
            lengths themselves, 1 + k of them.
        k: number of drafts a request verifies a step.
    """
    if layout == "quadratic":
        return (k,) * (k + 1)
    if layout == "linear":
        return (0,) * k + (k,)
    assert isinstance(layout, tuple)
    assert len(layout) == k + 1
    return layout


@dataclass(frozen=True)
class Groups:
    """The mask rows that follow from a step's shape: R requests, N real rows, G groups, M mask rows in group order.

    Attributes:
        num_real: N.
        request: request of each group, [G].
        row: real row that the group follows, [G].
        ahead: the group's prefix length less its request's, 0 or below, [G]: drafts of the step that the group takes as rejected.
        length: mask tokens of each group, [G].
        start: first mask row of each group, counted from 0, and M at the end, [G + 1].
        group_of_row: group of each mask row, [M].
        request_start: first mask row of each request, and M at the end, [R + 1].
        mask_index: which mask token stands in each mask row, 0 .. k - 1, [M].
        written_rows: rows of the step whose K/V are written, [N + S]: the N real rows to where the engine wants them, and S rows
            (real ones, then mask rows) to the groups' own copies of the sequence end.
        written_group: group of each of those S, [S].
        written_ahead: its position less the group's prefix length, [S].
        query_start: first row of each request and, behind them, of each group, and N + M at the end, [R + G + 1], int32.
        query_start_cpu: the same on the host.
        longest_query: most rows that a request or a group has.
        most_masks: most mask rows of a request.
        accepted_group: group to draft from when request i accepted j drafts, -1 where there is none, [R, k + 1].
        after, starts, lengths: `accepted_group`, `start` and `length` as lists.
    """

    num_real: int
    request: torch.Tensor
    row: torch.Tensor
    ahead: torch.Tensor
    length: torch.Tensor
    start: torch.Tensor
    group_of_row: torch.Tensor
    request_start: torch.Tensor
    mask_index: torch.Tensor
    written_rows: torch.Tensor
    written_group: torch.Tensor
    written_ahead: torch.Tensor
    query_start: torch.Tensor
    query_start_cpu: torch.Tensor
    longest_query: int
    most_masks: int
    accepted_group: torch.Tensor
    after: list[list[int]]
    starts: list[int]
    lengths: list[int]

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.lengths)

    @property
    def num_rows(self) -> int:
        """M."""
        return self.starts[-1]

    def prefix_len(self, request_len: torch.Tensor) -> torch.Tensor:
        """L of each group, [G]: tokens of the prefix that ends in the row it follows.

        Args:
            request_len: tokens of each request once all its rows count, [R].
        """
        return request_len[self.request] + self.ahead

    def positions(self, prefix_len: torch.Tensor, max_model_len: int) -> torch.Tensor:
        """Position of each mask row, [M]: L .. L + length - 1, clamped because rotary tables end at the model's length.

        A clamped row gives a draft that no request can use; drafts are cut where they are handed out.
        """
        return (prefix_len[self.group_of_row] + self.mask_index).clamp(max=max_model_len - 1)

    def draft_rows(self, accepted: torch.Tensor, k: int) -> torch.Tensor:
        """Where the states stand that each request drafts from, [R, k]; without a host read.

        Past the end of a group, and for a request that has none to draft from, a row of another group stands there: what is
        drafted from it is a token like any other, and verification decides.

        Args:
            accepted: drafts that each request accepted, [R] or fewer if the last ones are padding; below 0 for a request that
                sampled nothing.
            k: rows wanted.
        """
        first = self.start[self._group(accepted).clamp(min=0)]
        return (first + torch.arange(k, device=first.device)).clamp(max=self.num_rows - 1)

    def of_own_group(self, accepted: torch.Tensor, k: int) -> torch.Tensor:
        """Which of `draft_rows` are in the group that the request drafts from, [R, k]; without a host read."""
        group = self._group(accepted)
        count = torch.where((group >= 0) & (accepted[:, None] >= 0), self.length[group.clamp(min=0)], 0)
        return torch.arange(k, device=count.device) < count

    def _group(self, accepted: torch.Tensor) -> torch.Tensor:
        """The group that each request drafts from, -1 where there is none, [R, 1]."""
        of_requests = self.accepted_group[: accepted.shape[0]]
        return of_requests.gather(1, accepted.long().clamp(0, of_requests.shape[1] - 1)[:, None])


@lru_cache(maxsize=512)
def shapes_of(lengths: tuple[int, ...], num_drafts: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes of requests under a layout: lengths of each one's groups by drafts accepted, one more than it verifies drafts;
    empty for a request that cannot use a draft.

    A request that verifies fewer than k drafts always gets a longest group behind its last row, so that a linear layout
    starts anew.

    Args:
        lengths: group lengths by drafts accepted, 1 + k of them (`group_lengths`).
        num_drafts: how many of each request's rows are drafts to verify; -1 for a request that cannot use a draft (a prompt chunk
            that does not end the prompt, a last token).
    """
    k, longest = len(lengths) - 1, max(lengths)
    return tuple([(*lengths[:drafts], longest if drafts < k else lengths[k]) if drafts >= 0 else () for drafts in num_drafts])


def capped(shapes: tuple[tuple[int, ...], ...], most: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Shapes without a group that is longer than `most` of its request."""
    return tuple([tuple([min(length, limit) for length in shape]) for shape, limit in zip(shapes, most, strict=True)])


@lru_cache(maxsize=512)
def plan_groups(
    num_rows: tuple[int, ...],
    shapes: tuple[tuple[int, ...], ...],
    k: int,
    max_rows: int,
    max_groups: int,
    max_tail: int,
    device: torch.device,
) -> Groups | None:
    """The groups of a step's shape, or None when there is none.

    Args:
        num_rows: real rows of each request, in batch order.
        shapes: of the requests (`shapes_of`).
        k: most drafts of a request.
        max_rows, max_groups: mask rows and groups that the step has room for; groups beyond are left out, and their requests verify
            nothing next step.
        max_tail: the last rows of a request whose K/V a group may need for itself: those that can share a block with its
        mask tokens.
        device: of the tensors.
    """
    request: list[int] = []
    row: list[int] = []
    ahead: list[int] = []
    length: list[int] = []
    starts = [0]
    request_start = [0]
    after = [[-1] * (k + 1) for _ in num_rows]
    source_rows: list[int] = []
    written_group: list[int] = []
    written_ahead: list[int] = []
    num_real, first_row = sum(num_rows), 0
    for i, (rows, shape) in enumerate(zip(num_rows, shapes, strict=True)):
        drafts = len(shape) - 1
        for accepted, wanted in enumerate(shape):
            if wanted == 0 or starts[-1] + wanted > max_rows or len(length) == max_groups:
                continue
            group, last = len(length), first_row + rows - 1 - drafts + accepted
            after[i][accepted] = group
            request.append(i)
            row.append(last)
            ahead.append(accepted - drafts)
            length.append(wanted)
            tail = min(last + 1 - first_row, max_tail)
            source_rows += [*range(last + 1 - tail, last + 1), *range(num_real + starts[-1], num_real + starts[-1] + wanted)]
            written_group += [group] * (tail + wanted)
            written_ahead += range(-tail, wanted)
            starts.append(starts[-1] + wanted)
        request_start.append(starts[-1])
        first_row += rows
    if not length:
        return None

    query_start = [*accumulate(num_rows, initial=0), *(num_real + start for start in starts[1:])]
    columns = _to_device(
        [
            request,
            row,
            ahead,
            length,
            starts,
            [group for group, wanted in enumerate(length) for _ in range(wanted)],
            [m for wanted in length for m in range(wanted)],
            [*range(num_real), *source_rows],
            written_group,
            written_ahead,
            query_start,
            list(chain.from_iterable(after)),
            request_start,
        ],
        device,
    )
    return Groups(
        num_real=num_real,
        request=columns[0],
        row=columns[1],
        ahead=columns[2],
        length=columns[3],
        start=columns[4],
        group_of_row=columns[5],
        request_start=columns[12],
        mask_index=columns[6],
        written_rows=columns[7],
        written_group=columns[8],
        written_ahead=columns[9],
        query_start=columns[10].int(),
        query_start_cpu=torch.tensor(query_start, dtype=torch.int32),
        longest_query=max(*num_rows, *length),
        most_masks=max(map(operator.sub, request_start[1:], request_start)),
        accepted_group=columns[11].view(-1, k + 1),
        after=after,
        starts=starts,
        lengths=length,
    )


def _to_device(columns: list[list[int]], device: torch.device) -> list[torch.Tensor]:
    """The columns as int64 tensors on `device`, carried there by one copy that the host does not wait for."""
    packed = torch.tensor(list(chain.from_iterable(columns)))
    if device.type == "cuda":
        packed = packed.pin_memory()
    return list(packed.to(device, non_blocking=True).split([len(column) for column in columns]))
