"""The LoRA of one linear layer, packed for one launch: the parts of a fused layer keep their own A and B."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

MAX_RANK = 256


@dataclass(frozen=True)
class LowRankSlices:
    """S low-rank updates of one linear layer, each on its own span of output features.

    Attributes:
        a: A of each slice, [S, r, in], contiguous; slices of a smaller rank are filled up with zeros.
        b: B of all slices, [out, r], contiguous; row o belongs to the slice whose span holds o, rows of no slice are zero.
        spans: first and last + 1 output feature of each slice, [S, 2] int32, on the device.
        scale: factor of every update (lora_alpha / r).
    """

    a: torch.Tensor
    b: torch.Tensor
    spans: torch.Tensor
    scale: float = 1.0

    @staticmethod
    def pack(slices: Sequence[tuple[int, torch.Tensor, torch.Tensor]], out_features: int, scale: float = 1.0) -> "LowRankSlices":
        """Packs (first output feature, A [r, in], B [size, r]) of each slice, for example q, k and v of a fused projection.

        Raises:
            ValueError: if a rank is not in 1..256, if A and B do not fit together, or if spans overlap or leave the layer.
        """
        if not slices:
            raise ValueError("no slices; a layer without a LoRA needs no gated linear")
        rank, last = max(a.shape[0] for _, a, _ in slices), 0
        first_a = slices[0][1]
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"rank {rank} is not in 1..{MAX_RANK}")
        packed_a = first_a.new_zeros(len(slices), rank, first_a.shape[1])
        packed_b = first_a.new_zeros(out_features, rank)
        spans = []
        for i, (at, a, b) in enumerate(sorted(slices, key=lambda s: s[0])):
            if a.shape[1] != first_a.shape[1] or a.shape[0] != b.shape[1]:
                raise ValueError(f"A {tuple(a.shape)} and B {tuple(b.shape)} do not fit a layer of {first_a.shape[1]} inputs")
            end = at + b.shape[0]
            if at < last or end > out_features:
                raise ValueError(f"slice {at}..{end} overlaps the slice before it or leaves the {out_features} output features")
            packed_a[i, : a.shape[0]] = a
            packed_b[at:end, : b.shape[1]] = b
            spans.append((at, end))
            last = end
        return LowRankSlices(packed_a, packed_b, torch.tensor(spans, dtype=torch.int32, device=first_a.device), scale)


BLOCK = 32  # columns of a block of the CPU kernel


class CpuLowRankSlices(NamedTuple):
    """S low-rank updates as the CPU kernel streams them (cpu/gated_lora.cpp): in blocks of 32 columns, filled up with zeros.

    Attributes:
        a: A of all slices side by side, [blocks of S rank, in, 32].
        b: scale B, slice by slice, [sum of the slices' blocks, rank, 32].
        spans: first and last + 1 output feature of each slice, [S, 2] int64.
    """

    a: torch.Tensor
    b: torch.Tensor
    spans: torch.Tensor

    @staticmethod
    def pack(slices: LowRankSlices, dtype: torch.dtype) -> "CpuLowRankSlices":
        """The same updates in `dtype`."""
        spans = slices.spans.tolist()
        b = torch.cat([_blocks(slices.scale * slices.b[first:end].T) for first, end in spans])
        return CpuLowRankSlices(_blocks(slices.a.flatten(0, 1).T).to(dtype), b.to(dtype), slices.spans.long())


def _blocks(matrix: torch.Tensor) -> torch.Tensor:
    """[rows, columns] as [blocks of columns, rows, 32], contiguous."""
    rows, columns = matrix.shape
    padded = torch.cat([matrix, matrix.new_zeros(rows, -columns % BLOCK)], 1)
    return padded.view(rows, -1, BLOCK).transpose(0, 1).contiguous()
