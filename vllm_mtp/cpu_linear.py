"""Our own linear layers on a CPU: on vLLM's packed kernels, which at one row take a third of torch's time in bf16, and the low-rank
update on a kernel of ours."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_mtp.gated_lora import LowRank, LowRankUpdate, RowSplit, Update
from vllm_mtp.kernels import cpu
from vllm_mtp.kernels.gated_lora import CpuLowRankSlices, LowRankSlices
from vllm_mtp.sampler_head import SamplerHead


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

    def __init__(self, slices: list[tuple[int, LowRank]], num_outputs: int, rows: RowSplit) -> None:
        cpu.load()
        scaled = [(at, lora.a, lora.scale * lora.b) for at, lora in slices]
        self.rows, self.packed = rows, CpuLowRankSlices.pack(LowRankSlices.pack(scaled, num_outputs), rows.gate.dtype)

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        torch.ops.vllm_mtp.gated_lora_cpu_(y, x, *self.packed, self.rows.first_mask)
        return y


def packed_products(slices: list[tuple[int, LowRank]], num_outputs: int, rows: RowSplit) -> Update:
    """The update as two products with packed weights."""
    return LowRankUpdate(slices, num_outputs, rows, PackedLinear)
