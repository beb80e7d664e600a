"""Which mask rows stand where: all that the tree mask of a step follows from."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass(frozen=True)
class CombLayout:
    """G groups of mask rows behind R requests, M rows in group order, groups in request order.

    Row i of group g stands at position prefix_len[g] + i. It sees the tokens of its request before prefix_len[g] and rows 0 .. i of
    its own group. All tensors int32 or int64, on the device.

    Attributes:
        prefix_len: L of each group, [G]; it may be 0 and changes every step, the rest follows from the step's shape.
        group_start: first row of each group and M at the end, [G + 1]; a group of length 0 is padding.
        group_of_row: group of each row, [M].
        row_start: first row of each request and M at the end, [R + 1]; rows beyond (graph padding) are not attended.
        max_rows: most rows that a request has, on the host: it decides the grid of a captured launch.
    """

    prefix_len: torch.Tensor
    group_start: torch.Tensor
    group_of_row: torch.Tensor
    row_start: torch.Tensor
    max_rows: int

    @staticmethod
    def of(
        request: Sequence[int], length: Sequence[int], prefix_len: Sequence[int], num_requests: int, device: torch.device
    ) -> "CombLayout":
        """The layout of groups given by request (ascending), length and prefix length.

        Raises:
            ValueError: if groups are not in request order.
        """
        if list(request) != sorted(request):
            raise ValueError("groups must be in the order of their requests")
        rows = [sum(n for r, n in zip(request, length, strict=True) if r == i) for i in range(num_requests)]

        def tensor(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device=device)

        return CombLayout(
            prefix_len=tensor(prefix_len),
            group_start=tensor([0, *accumulate(length)]),
            group_of_row=tensor([g for g, n in enumerate(length) for _ in range(n)]),
            row_start=tensor([0, *accumulate(rows)]),
            max_rows=max(rows, default=0),
        )
