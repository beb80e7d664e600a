"""The gated LoRA in plain torch: the oracle of the tests, and what runs where Triton does not."""

import torch
import torch.nn.functional as F

from .slices import LowRankSlices


def gated_lora_add_reference(y: torch.Tensor, x: torch.Tensor, lora: LowRankSlices, num_real: torch.Tensor) -> torch.Tensor:
    """y + gate * scale * (x A^T) B^T, slice by slice; gate is 1 on rows from `num_real` on, 0 before.

    Args:
        y: [M, out]; not changed.
        x: [M, in].
        lora: the slices.
        num_real: N, one integer on the device; never read on the host.
    """
    gate = (torch.arange(x.shape[0], device=x.device) >= num_real)[:, None]
    y = y.clone()
    for a, (first, end) in zip(lora.a, lora.spans.tolist(), strict=True):
        update = lora.scale * (x @ a.T) @ lora.b[first:end].T
        y[:, first:end] += torch.where(gate, update, 0)
    return y


def gated_lora_reference(
    x: torch.Tensor, weight: torch.Tensor, lora: LowRankSlices, num_real: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x W^T + bias on all rows, + scale * (x A^T) B^T on rows from `num_real` on. [M, out]."""
    return gated_lora_add_reference(F.linear(x, weight, bias), x, lora, num_real)
