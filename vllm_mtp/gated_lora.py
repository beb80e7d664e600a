"""The gated LoRA: linear layers whose low-rank update is active on mask rows only.

Rows before N are real rows, rows from N on are mask rows, so the gate is a split at N: y = W x on real rows and (W + s B A)
x on mask rows.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vllm_mtp.cpu_linear import PackedLinear


class LowRank(Protocol):
    """One module's LoRA: a [r, in], b [out, r], scale."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass
class RowSplit:
    """N of the running step; None outside an expanded step, when all rows are real."""

    num_real: int | None = None


class GatedLinear:
    """One linear layer of the target with its LoRA slices.

    Two forms. *merged*, for unquantized layers on CPUs: mask rows go through a second copy of the weights, W + s B A, and real rows
    through the layer as it is, with the same row count as without mask rows, so that they are the same to the bit. *added*,
    for everything
    else: one base product over all rows, then the low-rank products on the mask rows. A merged copy doubles the weight bytes
    of a step, which is why it is for CPUs only, where three small products cost more than the bytes.

    Args:
        layer: vLLM's linear layer (model_executor/layers/linear.py, LinearBase), loaded.
        slices: (first output row, LoRA) of each fused part: q, k, v or gate, up, or the layer itself.
        rows: where real rows end.
        merge: use the merged form.
    """

    def __init__(self, layer: Any, slices: list[tuple[int, LowRank]], rows: RowSplit, merge: bool) -> None:
        self.rows, self.out_features = rows, layer.output_size_per_partition
        method = copy.copy(layer.quant_method)
        self.base: Callable[..., torch.Tensor] = layer.quant_method.apply
        self.slices: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.merged: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor] | None = None
        device, dtype = next((p.device for p in layer.parameters()), torch.device("cpu")), layer.params_dtype
        if merge:
            self.merged = _merged_linear(layer, slices, dtype)
        else:
            self.slices = [(at, lora.a.to(device, dtype), (lora.scale * lora.b).to(device, dtype)) for at, lora in slices]
        name = layer.prefix
        out_features = self.out_features

        def apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            if torch.compiler.is_compiling():
                return torch.ops.vllm_mtp.gated_linear(x, bias, name, out_features)
            return self(layer, x, bias)

        self.layer = layer
        method.apply = apply
        layer.quant_method = method

    def __call__(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """y [rows, out] of x [rows, in]."""
        n = self.rows.num_real
        if n is None or n >= x.shape[0]:
            return self.base(layer, x, bias)
        if self.merged is not None:
            return torch.cat([self.base(layer, x[:n], bias), self.merged(x[n:], bias)])
        y = self.base(layer, x, bias)
        masks = x[n:]
        for at, a, b in self.slices:
            y[n:, at : at + b.shape[0]] += (masks @ a.T) @ b.T
        return y


def layer_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """W [out, in] of a loaded linear layer, read off by sending the identity through it.

    vLLM packs CPU weights for its kernels and drops the original; a product with the identity is exact whatever the packing.
    """
    eye = torch.eye(layer.input_size_per_partition, dtype=dtype)
    return layer.quant_method.apply(layer, eye, None).T.contiguous()


def _merged_linear(
    layer: Any, slices: list[tuple[int, LowRank]], dtype: torch.dtype
) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    weight = layer_weight(layer, dtype).float()
    for at, lora in slices:
        weight[at : at + lora.b.shape[0]] += lora.scale * (lora.b.float() @ lora.a.float())
    return PackedLinear(weight.to(dtype))


class GatedLinears:
    """The gated layers of one target, found by name from inside compiled graphs."""

    active: "GatedLinears | None" = None
    """The target whose forward is running. A compiled graph holds layer names only, so it may be reused by another engine."""

    def __init__(self) -> None:
        self.by_name: dict[str, GatedLinear] = {}

    def __enter__(self) -> None:
        GatedLinears.active = self

    def __exit__(self, *_: object) -> None:
        GatedLinears.active = None


def _gated_linear(x: torch.Tensor, bias: torch.Tensor | None, name: str, out_features: int) -> torch.Tensor:
    assert GatedLinears.active is not None
    gated = GatedLinears.active.by_name[name]
    return gated(gated.layer, x, bias)


def _gated_linear_fake(x: torch.Tensor, bias: torch.Tensor | None, name: str, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


# One opaque operation: inside a traced region `x[:n]` would bake n into the graph. Library.impl instead of torch.library.custom_op,
# whose Python wrapper costs tens of microseconds a call.
_library = torch.library.Library("vllm_mtp", "FRAGMENT")
_library.define("gated_linear(Tensor x, Tensor? bias, str name, int out_features) -> Tensor")
_library.impl("gated_linear", _gated_linear, "CompositeExplicitAutograd")
_library._register_fake("gated_linear", _gated_linear_fake)


def install(target: torch.nn.Module, lora: dict[str, Any], rows: RowSplit, merge: Callable[[Any], bool]) -> GatedLinears:
    """Puts the LoRA beside every linear layer of `target` that it names.

    Args:
        target: a loaded vLLM model; its `packed_modules_mapping` says which modules are fused.
        lora: LoRA weights by the base's module path, for example `model.layers.0.self_attn.q_proj`.
        rows: where real rows end.
        merge: whether a layer takes the merged form.

    Raises:
        ValueError: if a LoRA has no layer to sit on, or has another shape than its layer.
    """
    from vllm.model_executor.layers.linear import LinearBase

    packed: dict[str, list[str]] = getattr(target, "packed_modules_mapping", {})
    linears, unused = GatedLinears(), set(lora)
    for name, layer in target.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        parent, _, last = name.rpartition(".")
        parts = packed.get(last, [last])
        sizes = list(getattr(layer, "output_sizes", [layer.output_size])) if len(parts) > 1 else [layer.output_size]
        slices, at = [], 0
        for part, size in zip(parts, sizes, strict=True):
            path = f"{parent}.{part}"
            if path in lora:
                shape = (lora[path].b.shape[0], lora[path].a.shape[1])
                if shape != (size, layer.input_size):
                    raise ValueError(
                        f"the LoRA of {path} maps {shape[1]} to {shape[0]} features; the base has {layer.input_size} and {size}"
                    )
                slices.append((at, lora[path]))
                unused.discard(path)
            at += size
        if slices:
            linears.by_name[layer.prefix] = GatedLinear(layer, slices, rows, merge(layer))
    if unused:
        raise ValueError(
            f"the adapter has LoRA weights for modules that the served model does not have: {', '.join(sorted(unused)[:3])}"
        )
    return linears
