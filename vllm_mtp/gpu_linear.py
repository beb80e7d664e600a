"""Linear layers on a GPU: product and low-rank update in one launch of our Triton kernel (kernels/gated_lora).

Where weights are quantized, or laid out for another kernel, the layer's own product comes first and the update is a launch of its
own.
"""

from typing import Any

import torch

from vllm_mtp.gated_lora import BaseThenUpdate, Expanded, RowSplit, Slices, with_two_products
from vllm_mtp.kernels.gated_lora import MAX_RANK, LowRankSlices, gated_lora, gated_lora_


def weight_is_read(layer: Any, num_outputs: int, dtype: torch.dtype) -> bool:
    """Whether the kernel reads the weight of a linear layer of vLLM's where it lies."""
    from vllm import envs
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    if not isinstance(layer.quant_method, UnquantizedLinearMethod) or envs.VLLM_BATCH_INVARIANT:
        return False
    weight = layer.weight
    return weight.dtype == dtype and weight.ndim == 2 and weight.shape[0] == num_outputs and weight.stride(1) == 1


class OneLaunch:
    """A layer and its LoRA in one launch; called as `gated_lora.Expanded`."""

    def __init__(self, lora: LowRankSlices, rows: RowSplit) -> None:
        self.lora, self.rows = lora, rows

    def __call__(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return gated_lora(x, layer.weight, self.lora, self.rows.first_mask, bias)


class AddedUpdate:
    """The low-rank update in one launch, written into y; a `gated_lora.Update`."""

    def __init__(self, lora: LowRankSlices, rows: RowSplit) -> None:
        self.lora, self.rows = lora, rows

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return gated_lora_(y, x, self.lora, self.rows.first_mask)


def with_kernel(layer: Any, slices: Slices, num_outputs: int, rows: RowSplit) -> Expanded:
    """The layer with its LoRA on the kernel (`gated_lora.WithLora`); as torch's products where the rank is beyond it."""
    if max(lora.a.shape[0] for _, lora in slices) > MAX_RANK:
        return with_two_products(layer, slices, num_outputs, rows)
    like = rows.gate
    lora = LowRankSlices.pack([(at, lora.a.to(like), (lora.scale * lora.b).to(like)) for at, lora in slices], num_outputs)
    if weight_is_read(layer, num_outputs, like.dtype):
        return OneLaunch(lora, rows)
    return BaseThenUpdate(layer, AddedUpdate(lora, rows), rows)
