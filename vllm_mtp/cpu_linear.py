"""Linear layers on a CPU.

In bfloat16 on processors with AVX-512 or AVX2 those of the served model run on a kernel of ours (kernels/cpu/linear.cpp), in steps
with mask rows and without: it reads the weights once for all rows of a step and adds the low-rank update of mask rows in passing,
which is what makes rows cheap. With AVX-512 BF16 its sums are those of vLLM's kernels at one row. Processors that multiply no
bfloat16 do it in float32: there vLLM's products take four times as long (AVX-512), or five (AVX2). Elsewhere layers stay vLLM's,
and the update is a call of its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_mtp.cpu_attention import kernels_load
from vllm_mtp.gated_lora import BaseThenUpdate, Expanded, LowRankUpdate, RowSplit, Slices
from vllm_mtp.kernels.cpu import has_linear
from vllm_mtp.kernels.cpu.linear import PanelSlices, panels
from vllm_mtp.kernels.gated_lora import CpuLowRankSlices, LowRankSlices
from vllm_mtp.sampler_head import SamplerHead


def fits_panels(layer: Any) -> bool:
    """Whether a linear layer that vLLM is about to pack can run on our kernel. CPUs with AMX have something better.

    Args:
        layer: with its `weight` [out, in], as loaded.
    """
    weight = layer.weight
    return (
        not weight.is_meta
        and weight.ndim == 2
        and weight.dtype == torch.bfloat16
        and weight.shape[1] % 2 == 0
        and not torch.cpu.get_capabilities().get("amx_tile", False)
        and kernels_load()
        and has_linear()
    )


class PanelLinear:
    """y = x W^T + b on our kernel, as vLLM calls a packed layer (`cpu_linear`). What stands for the weight is changed in place when
    weights are loaded anew, so that compiled graphs see it.

    Args:
        weight: W [out, in], bfloat16; not kept.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.num_outputs = weight.shape[0]
        self.panels = panels(weight.detach())

    def load(self, weight: torch.Tensor) -> None:
        """Takes another W of the same shape."""
        self.panels.copy_(panels(weight.detach()))

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """y [..., out] of x [..., in]; `weight` is what is left of the layer's own, which nobody needs."""
        y = torch.ops.vllm_mtp.linear_cpu(x.flatten(0, -2), self.panels, bias, self.num_outputs)
        return y.view(*x.shape[:-1], self.num_outputs)


class PanelsAndUpdate:
    """A `PanelLinear` and its LoRA in one pass over its weights; called as `gated_lora.Expanded`.

    Nothing is to be done for a lone real row: what a row sums to does not depend on how many there are.
    """

    def __init__(self, base: PanelLinear, slices: Slices, num_outputs: int, rows: RowSplit) -> None:
        self.base, self.rows = base, rows
        self.lora = PanelSlices.pack(_packed(slices, num_outputs))

    def __call__(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        base = self.base
        return torch.ops.vllm_mtp.gated_linear_cpu(x, base.panels, bias, base.num_outputs, *self.lora, self.rows.first_mask)


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed as vLLM packs its own layers (model_executor/layers/utils.py, dispatch_cpu_unquantized_gemm).

    Args:
        weight: W [out, in]; not kept.
        bias: b [out], or None for a bias given at each call.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)
        self.packed: Any = self.cpu_linear

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """y [..., out] of x [..., in]."""
        return self.packed(x, self.weight, self.bias if bias is None else bias)


class PackedSampler:
    """A sampler head whose linears are packed; `project` and `step` are `SamplerHead`'s."""

    def __init__(self, head: SamplerHead) -> None:
        width = head.linear_1.out_features
        weight = head.linear_1.weight.data
        self.from_previous = PackedLinear(weight[:, :width])
        self.from_state = PackedLinear(weight[:, width:], head.linear_1.bias.data)
        self.linear_2 = PackedLinear(head.linear_2.weight.data, head.linear_2.bias.data)
        self.norm_1, self.norm_2, self.residual = head.norm_1, head.norm_2, head.residual

    @property
    def linears(self) -> tuple[PackedLinear, ...]:
        """All of them."""
        return self.from_previous, self.from_state, self.linear_2

    def project(self, z: torch.Tensor) -> torch.Tensor:
        """As `SamplerHead.project`."""
        return self.from_state(z)

    def step(self, previous: torch.Tensor, projected: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """As `SamplerHead.step`."""
        h = self.norm_1(F.silu(self.from_previous(previous) + projected))
        h = self.norm_2(F.silu(self.linear_2(h)))
        return z + h if self.residual else h


class KernelUpdate:
    """The low-rank update in one call of `gated_lora_cpu_`, written into y; arguments as `LowRankUpdate`'s."""

    def __init__(self, slices: Slices, num_outputs: int, rows: RowSplit) -> None:
        self.rows, self.lora = rows, CpuLowRankSlices.pack(_packed(slices, num_outputs), rows.gate.dtype)

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        torch.ops.vllm_mtp.gated_lora_cpu_(y, x, *self.lora, self.rows.first_mask)
        return y


def _packed(slices: Slices, num_outputs: int) -> LowRankSlices:
    return LowRankSlices.pack([(at, lora.a.float(), lora.scale * lora.b.float()) for at, lora in slices], num_outputs)


def with_kernels(layer: Any, slices: Slices, num_outputs: int, rows: RowSplit) -> Expanded:
    """The layer with its LoRA on the best kernel of ours that fits its weights (`gated_lora.WithLora`)."""
    if isinstance(getattr(layer, "cpu_linear", None), PanelLinear):
        return PanelsAndUpdate(layer.cpu_linear, slices, num_outputs, rows)
    return BaseThenUpdate(layer, KernelUpdate(slices, num_outputs, rows), rows)


def with_packed_products(layer: Any, slices: Slices, num_outputs: int, rows: RowSplit) -> Expanded:
    """The layer's own product, and the update as two with packed weights."""
    return BaseThenUpdate(layer, LowRankUpdate(slices, num_outputs, rows, PackedLinear), rows)
