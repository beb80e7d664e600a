"""Groups and rows of a step: which real rows are followed by mask tokens, how many, and at which positions.

A *group* stands for "this row's token is the last one accepted": it has `length` mask tokens that follow the prefix ending in that row.
Pure tensor functions, vectorised over requests and groups; no vLLM import.
"""

from dataclasses import dataclass

import torch


def group_lengths(layout: str | tuple[int, ...], k: int) -> tuple[int, ...]:
    """Length of the group behind row j of a decoding request, for j = 0 .. k drafts accepted.

    Args:
        layout: "quadratic" (k behind every row), "linear" (k behind the last row only; *Your LLM Knows the Future*, section 3.3) or the
            lengths themselves, 1 + k of them.
        k: number of drafts a request verifies a step.
    """
    if layout == "quadratic":
        return (k,) * (k + 1)
    if layout == "linear":
        return (0,) * k + (k,)
    assert isinstance(layout, tuple) and len(layout) == k + 1
    return layout


@dataclass(frozen=True)
class Batch:
    """The real rows of a step, as the engine scheduled them. R requests, N rows; integer tensors on one device.

    Attributes:
        query_start: first row of each request and N at the end, [R + 1].
        prefix_len: tokens of each request once all its rows count, [R].
        num_drafts: how many of its rows are drafts to verify, [R]; -1 for a prompt chunk that does not end the prompt.
        max_len: tokens after which a request must stop (model length, max_tokens), [R].
    """

    query_start: torch.Tensor
    prefix_len: torch.Tensor
    num_drafts: torch.Tensor
    max_len: torch.Tensor


@dataclass(frozen=True)
class Groups:
    """The mask rows of a step: G groups, M mask rows in group order.

    Attributes:
        request: request of each group, [G].
        row: real row that the group follows, [G].
        prefix_len: L, tokens of the prefix that ends in that row, [G].
        length: mask tokens of the group, at positions L .. L + length - 1, [G].
        start: first mask row of each group, counted from 0, and M at the end, [G + 1].
        group_of_row: group of each mask row, [M].
        mask_index: which mask token stands in each mask row, 0 .. k - 1, [M].
        after: group to draft from when request i accepted j drafts, [R, 1 + k]; -1 where there is none.
    """

    request: torch.Tensor
    row: torch.Tensor
    prefix_len: torch.Tensor
    length: torch.Tensor
    start: torch.Tensor
    group_of_row: torch.Tensor
    mask_index: torch.Tensor
    after: torch.Tensor

    @property
    def num_groups(self) -> int:
        """G."""
        return self.request.shape[0]

    @property
    def num_rows(self) -> int:
        """M."""
        return self.group_of_row.shape[0]

    @property
    def positions(self) -> torch.Tensor:
        """Position of each mask row in its request, [M]."""
        return self.prefix_len[self.group_of_row] + self.mask_index


def plan_groups(batch: Batch, lengths: torch.Tensor, max_rows: int) -> Groups | None:
    """The groups of a step, or None when no request can use a draft.

    A group is shortened to the drafts that its request can still use: the token sampled at its row takes index L, so draft i takes L + i,
    which must lie below `max_len`. A request that verifies fewer than k drafts always gets a full group behind its last row.

    Args:
        batch: the real rows.
        lengths: group lengths by drafts accepted, [1 + k] (`group_lengths`).
        max_rows: mask rows that the step has room for; groups beyond it are left out, and their requests verify nothing next step.
    """
    k = lengths.shape[0] - 1
    groups_per_request = batch.num_drafts + 1
    request = torch.repeat_interleave(groups_per_request)
    first = torch.cumsum(groups_per_request, 0) - groups_per_request
    accepted = torch.arange(request.shape[0], device=request.device) - first[request]
    drafts = batch.num_drafts[request]
    prefix_len = batch.prefix_len[request] - drafts + accepted
    row = batch.query_start[1:][request] - 1 - drafts + accepted
    full = lengths.max()
    wanted = torch.where((accepted == drafts) & (drafts < k), full, lengths[accepted])
    length = torch.minimum(wanted, batch.max_len[request] - 1 - prefix_len)
    kept = (length > 0) & (torch.cumsum(length.clamp(min=0), 0) <= max_rows)
    if not bool(kept.all()):
        request, row, prefix_len, length, accepted = (t[kept] for t in (request, row, prefix_len, length, accepted))
    num_groups = request.shape[0]
    if num_groups == 0:
        return None
    start = torch.zeros(num_groups + 1, dtype=length.dtype, device=length.device)
    torch.cumsum(length, 0, out=start[1:])
    group_of_row = torch.repeat_interleave(length)
    after = torch.full((batch.num_drafts.shape[0], k + 1), -1, dtype=request.dtype, device=request.device)
    after[request, accepted] = torch.arange(num_groups, device=request.device)
    return Groups(
        request=request,
        row=row,
        prefix_len=prefix_len,
        length=length,
        start=start,
        group_of_row=group_of_row,
        mask_index=torch.arange(group_of_row.shape[0], device=start.device) - start[group_of_row],
        after=after,
    )
