"""The gated LoRA: linear layers whose low-rank update is active on mask rows only (*Your LLM Knows the Future*, section 3.2).

    y[i] = x[i] W^T + bias + [i >= N] scale (x[i] A^T) B^T

Rows before N are real rows, rows from N on mask rows. N lies on the device and is read by the kernel, so it may change between
replays of a CUDA graph. `fused` does all of it in one launch; `add` leaves the base product to whoever does it best (a quantized
kernel, cuBLAS for prompts) and adds the update in place, shrink and expand in one launch.
"""

import torch
import torch.nn.functional as F

from ..dispatch import runs_triton
from .reference import gated_lora_add_reference, gated_lora_reference
from .slices import MAX_RANK, CpuLowRankSlices, LowRankSlices

__all__ = [
    "MAX_RANK",
    "CpuLowRankSlices",
    "LowRankSlices",
    "gated_lora",
    "gated_lora_",
    "gated_lora_add_reference",
    "gated_lora_reference",
]

FUSED_MAX_ROWS = 128
"""Largest batch of `fused`: one row tile. With more rows W is read again for each tile and cuBLAS has the better schedule.
Reasoned (gated_lora/triton.py), not measured."""


def gated_lora(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora: LowRankSlices,
    num_real: torch.Tensor,
    bias: torch.Tensor | None = None,
    form: str = "auto",
) -> torch.Tensor:
    """y = x W^T + bias, plus the LoRA on rows from `num_real` on.

    Runs the Triton kernel on GPUs and under Triton's interpreter, `gated_lora_reference` elsewhere. A torch operation: no graph
    break, capturable, no host synchronization. Launches on one device may not overlap.

    Args:
        x: rows of shape [M, in], float32, float16 or bfloat16, last dimension contiguous.
        weight: W [out, in], dtype of x.
        lora: low-rank slices of the layer, dtype of x.
        num_real: N, one int32 or int64 on the device of x; N >= M leaves the base product alone.
        bias: [out] or None.
        form: "fused", "add" (cuBLAS, then the update), or "auto": fused up to 128 rows. The reference has one form.

    Returns:
        y [M, out], dtype of x; sums in float32.

    Raises:
        ValueError: if shapes or dtypes do not fit.

    Example:
        >>> lora = LowRankSlices.pack([(0, torch.randn(4, 16), torch.randn(8, 4))], out_features=8)
        >>> gated_lora(torch.randn(5, 16), torch.randn(8, 16), lora, torch.tensor([3])).shape
        torch.Size([5, 8])
    """
    _check(x, lora, num_real, weight.shape[0])
    if weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        raise ValueError(f"weight {tuple(weight.shape)} {weight.dtype} does not fit x {tuple(x.shape)} {x.dtype}")
    if form not in ("auto", "fused", "add"):
        raise ValueError(f"form {form!r} is none of auto, fused, add")
    return torch.ops.vllm_mtp.gated_lora(x, weight, bias, lora.a, lora.b, lora.spans, lora.scale, num_real, form)


def gated_lora_(y: torch.Tensor, x: torch.Tensor, lora: LowRankSlices, num_real: torch.Tensor) -> torch.Tensor:
    """y += scale (x A^T) B^T in place, on rows from `num_real` on; rows before are not touched.

    For bases whose product another kernel made: quantized weights, prompts. Otherwise as `gated_lora`.

    Args:
        y: the base's product [M, out], last dimension contiguous.
        x: rows of shape [M, in].
        lora: low-rank slices of the layer, dtype of x.
        num_real: N, one int32 or int64 on the device of x.

    Returns:
        y.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    _check(x, lora, num_real, y.shape[1])
    if y.shape[0] != x.shape[0] or y.dtype != x.dtype:
        raise ValueError(f"y {tuple(y.shape)} {y.dtype} does not fit x {tuple(x.shape)} {x.dtype}")
    torch.ops.vllm_mtp.gated_lora_(y, x, lora.a, lora.b, lora.spans, lora.scale, num_real)
    return y


def _check(x: torch.Tensor, lora: LowRankSlices, num_real: torch.Tensor, out: int) -> None:
    if x.dim() != 2 or x.shape[1] != lora.a.shape[2] or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} does not fit A {tuple(lora.a.shape)}: float rows [M, in] are needed")
    if lora.b.shape[0] != out or lora.a.dtype != x.dtype or lora.b.dtype != x.dtype:
        raise ValueError(f"B {tuple(lora.b.shape)} {lora.b.dtype} does not fit {out} output features of {x.dtype}")
    if num_real.numel() != 1 or num_real.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"num_real must be one int32 or int64 on the device, not {num_real.numel()} of {num_real.dtype}")


def _gated_lora(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    spans: torch.Tensor,
    scale: float,
    num_real: torch.Tensor,
    form: str,
) -> torch.Tensor:
    if not runs_triton(x):
        return gated_lora_reference(x, weight, LowRankSlices(a, b, spans, scale), num_real, bias)
    from .triton import launch

    if form == "add" or (form == "auto" and x.shape[0] > FUSED_MAX_ROWS):
        y = F.linear(x, weight, bias)
        launch(y, x, None, None, a, b, spans, scale, num_real)
        return y
    y = x.new_empty(x.shape[0], weight.shape[0])
    launch(y, x, weight, bias, a, b, spans, scale, num_real)
    return y


def _gated_lora_fake(x: torch.Tensor, weight: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _gated_lora_(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, spans: torch.Tensor, scale: float, num_real: torch.Tensor
) -> None:
    if not runs_triton(x):
        y.copy_(gated_lora_add_reference(y, x, LowRankSlices(a, b, spans, scale), num_real))
        return
    from .triton import launch

    launch(y, x, None, None, a, b, spans, scale, num_real)


def _gated_lora_fake_(*_: object) -> None:
    return None


# Library.impl instead of torch.library.custom_op, whose Python wrapper costs tens of microseconds a call.
_library = torch.library.Library("vllm_mtp", "FRAGMENT")
_library.define(
    "gated_lora(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor spans, float scale, Tensor num_real, str form)"
    " -> Tensor"
)
_library.impl("gated_lora", _gated_lora, "CompositeExplicitAutograd")
_library._register_fake("gated_lora", _gated_lora_fake)
_library.define("gated_lora_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor spans, float scale, Tensor num_real) -> ()")
_library.impl("gated_lora_", _gated_lora_, "CompositeExplicitAutograd")
_library._register_fake("gated_lora_", _gated_lora_fake_)
