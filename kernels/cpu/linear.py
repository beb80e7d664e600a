"""Linear layers in bfloat16 on a CPU (cpu/linear.cpp): W, A and B as the kernel streams them."""

from typing import NamedTuple

import torch

from ..gated_lora import LowRankSlices

COLUMNS = 32
"""Outputs of a panel: with AVX-512, 12 rows of it, as float32 in two vectors each, are what the registers hold."""


def panels(weight: torch.Tensor) -> torch.Tensor:
    """W [out, in] as [panels, in / 2, 32, 2]: for each pair of inputs the weights of 32 outputs, filled up with zeros.

    Raises:
        ValueError: `in` is odd.
    """
    outputs, inputs = weight.shape
    if inputs % 2:
        raise ValueError(f"inputs come in pairs, and {inputs} is odd")
    padded = torch.cat([weight, weight.new_zeros(-outputs % COLUMNS, inputs)])
    return padded.view(-1, COLUMNS, inputs // 2, 2).transpose(1, 2).contiguous()


class PanelSlices(NamedTuple):
    """S low-rank updates of one linear layer.

    Attributes:
        a: A of all slices side by side, one rank after the other, in panels.
        b: scale B panel by panel of W, one after the other: each has those ranks that its outputs need.
        parts: (first rank, ranks, where in `b`) of each panel of W, [panels, 3] int64.
    """

    a: torch.Tensor
    b: torch.Tensor
    parts: torch.Tensor

    @staticmethod
    def pack(slices: LowRankSlices) -> "PanelSlices":
        """The same updates in bfloat16."""
        num_slices, rank, inputs = slices.a.shape
        even = rank + rank % 2
        a = slices.a.new_zeros(num_slices, even, inputs)
        a[:, :rank] = slices.a
        outputs = slices.b.shape[0]
        spans = slices.spans.tolist()
        parts, blocks, at = [], [], 0
        for first in range(0, outputs, COLUMNS):
            last = min(first + COLUMNS, outputs)
            here = [s for s, (start, end) in enumerate(spans) if start < last and end > first]
            ranks = even * (here[-1] - here[0] + 1) if here else 0
            parts.append((even * here[0] if here else 0, ranks, at))
            if not here:
                continue
            block = slices.b.new_zeros(COLUMNS, ranks)
            for s in here:
                start, end = max(spans[s][0], first), min(spans[s][1], last)
                column = even * (s - here[0])
                block[start - first : end - first, column : column + rank] = slices.scale * slices.b[start:end]
            blocks.append(panels(block).flatten())
            at += blocks[-1].numel()
        return PanelSlices(panels(a.flatten(0, 1)).bfloat16(), torch.cat(blocks).bfloat16(), torch.tensor(parts))
