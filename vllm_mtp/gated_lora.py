"""The gated LoRA: linear layers whose low-rank update is active on mask rows only.

Rows before N are real rows, rows from N on are mask rows, so the gate is a split at N: y = W x on all rows, + s B A x on mask rows.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Product = Callable[[torch.Tensor], torch.Tensor]
"""x [rows, in] -> x W^T [rows, out]."""


class LowRank(Protocol):
    """One module's LoRA: a [r, in], b [out, r], scale."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass
class Shard:
    """The part of a module's LoRA that sits on one tensor-parallel rank: a [r, in of the rank], b [out of the rank, r], scale."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def shard(lora: LowRank, layer: Any, outputs: list[tuple[int, int]]) -> Shard:
    """The part of `lora` that belongs to a rank's part of the base weight W [out, in].

    Where a rank has rows of W (column-parallel), it takes the same rows of B, and all of A. Where it has columns of W
    (row-parallel), it takes the same columns of A, and all of B: the layer's all-reduce sums the ranks' B A x with their W x, once.
    What W repeats on several ranks, K and V heads fewer than ranks, B repeats too. A module that the base itself has fused, as
    Phi-3 has q, k and v, is split part by part.

    Args:
        lora: of the whole module.
        layer: vLLM's linear layer (model_executor/layers/linear.py, LinearBase) that the module is, or is fused into.
        outputs: output features of each part of the module: of the whole part, and on this rank.
    """
    num_inputs = getattr(layer, "input_size_per_partition", layer.input_size)

    def first(here: int, everywhere: int) -> int:
        neighbours_with_the_same = layer.tp_size * here // everywhere
        return layer.tp_rank // neighbours_with_the_same * here

    a = lora.a.narrow(1, first(num_inputs, lora.a.shape[1]), num_inputs)
    parts = lora.b.split([everywhere for everywhere, _ in outputs])
    b = [part.narrow(0, first(here, everywhere), here) for part, (everywhere, here) in zip(parts, outputs, strict=True)]
    return Shard(a, b[0] if len(b) == 1 else torch.cat(b), lora.scale)


class RowSplit:
    """Where mask rows begin in the running step, for code that runs row by row and for code that was compiled once for all steps.

    Args:
        max_rows: most rows of a step.
        device, dtype: of the layers.
    """

    def __init__(self, max_rows: int, device: torch.device, dtype: torch.dtype) -> None:
        self.num_real: int | None = None
        self.gate = torch.zeros(max_rows, 1, device=device, dtype=dtype)
        """1 on mask rows, 0 on real rows, [max_rows, 1]; compiled graphs read it."""
        self.first_mask = torch.zeros(1, device=device, dtype=torch.long)
        """N of the running step where kernels read it, [1]."""
        self.tracing_expanded = False
        """Whether the graph that is being traced serves steps with mask rows."""

    def begin(self, num_real: int, num_rows: int) -> None:
        """Starts a step of `num_rows` rows, of which the first `num_real` are real."""
        self.num_real = num_real
        self.first_mask.fill_(num_real)
        self.gate[:num_real].zero_()
        self.gate[num_real:num_rows].fill_(1)

    def end(self) -> None:
        """Ends it: all rows are real."""
        self.num_real = None


class Update(Protocol):
    """The low-rank update of one layer: y + s B A x on mask rows, y on real rows; it may write into y."""

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor: ...


class LowRankUpdate:
    """The update as two products.

    The slices of a fused layer share x, so their A lie in one matrix [sum of ranks, in] and their B block by block in another.

    Args:
        slices: (first output row, LoRA) of each fused part.
        num_outputs: of the layer, on this rank.
        rows: where real rows end.
        linear: makes a product with a weight [out, in].
    """

    def __init__(
        self,
        slices: list[tuple[int, LowRank]],
        num_outputs: int,
        rows: RowSplit,
        linear: Callable[[torch.Tensor], Product],
    ) -> None:
        self.rows, like = rows, rows.gate
        self.down = linear(torch.cat([lora.a for _, lora in slices]).to(like))
        up = torch.zeros(num_outputs, sum(lora.a.shape[0] for _, lora in slices))
        column = 0
        for at, lora in slices:
            up[at : at + lora.b.shape[0], column : column + lora.a.shape[0]] = lora.scale * lora.b
            column += lora.a.shape[0]
        self.up = linear(up.to(like))

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            # No branch on N, which would be baked in, but a gate; before the product, where it melts into what computes x.
            return y + self.up(self.down(x * self.rows.gate[: x.shape[0]]))
        n = self.rows.num_real
        y[n:].add_(self.up(self.down(x[n:])))
        return y


Expanded = Callable[[Any, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""A layer in a step with mask rows: (layer, x [rows, in], bias) -> y [rows, out]."""


class BaseThenUpdate:
    """One product of the layer over all rows, so that its weights are read once, then the update of the mask rows.

    Args:
        layer: vLLM's linear layer.
        update: of the layer: q, k, v or gate, up together where they are fused.
        rows: where real rows end.
    """

    def __init__(self, layer: Any, update: Update, rows: RowSplit) -> None:
        self.base: Expanded = layer.quant_method.apply
        self.update, self.rows = update, rows

    def __call__(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = self.base(layer, x, bias)
        if not torch.compiler.is_compiling():
            n = self.rows.num_real
            if n is None or n >= x.shape[0]:
                return y
            # Kernels for one row sum in another order than those for several; a lone real row must not feel its mask rows.
            if n == 1:
                y[:1] = self.base(layer, x[:1], bias)
        return self.update(y, x)


def gate(layer: Any, expanded: Expanded, rows: RowSplit) -> None:
    """Lets `layer` compute `expanded` in steps with mask rows, and what it always did in all others.

    Args:
        layer: vLLM's linear layer (model_executor/layers/linear.py, LinearBase), loaded.
        expanded: the layer with its LoRA.
        rows: where real rows end.
    """
    method = copy.copy(layer.quant_method)
    base: Expanded = layer.quant_method.apply

    def apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        has_masks = rows.tracing_expanded if torch.compiler.is_compiling() else rows.num_real is not None
        if not has_masks:
            return base(layer, x, bias)
        if x.ndim == 2:
            return expanded(layer, x, bias)
        # Models that vLLM takes over from transformers keep a batch dimension of one in front of the rows.
        return expanded(layer, x.flatten(0, -2), bias).view(*x.shape[:-1], -1)

    method.apply = apply
    layer.quant_method = method


def plain_product(weight: torch.Tensor) -> Product:
    return lambda x: torch.nn.functional.linear(x, weight)


def _output_features(layer: Any) -> list[tuple[int, int]]:
    """Output features of each part of a layer that is fused, or of the layer: of the whole part, and on this rank."""
    sizes = getattr(layer, "output_sizes", [layer.output_size])
    # QKVParallelLinear counts a K or V head once for every rank that has it.
    copies = getattr(layer, "num_kv_head_replicas", 1)
    first, *others = sizes
    return list(zip([first, *(size // copies for size in others)], layer.output_partition_sizes, strict=True))


Slices = list[tuple[int, LowRank]]
"""(first output row, LoRA) of each fused part of a layer."""
WithLora = Callable[[Any, Slices, int, RowSplit], Expanded]
"""(layer, its slices, its outputs on this rank, where real rows end) -> what it computes in steps with mask rows."""


def with_two_products(layer: Any, slices: Slices, num_outputs: int, rows: RowSplit) -> Expanded:
    """The layer's own product, and the update as two of torch's."""
    return BaseThenUpdate(layer, LowRankUpdate(slices, num_outputs, rows, plain_product), rows)


def install(
    target: torch.nn.Module,
    lora: dict[str, Any],
    rows: RowSplit,
    with_lora: WithLora = with_two_products,
) -> None:
    """Puts the LoRA beside every linear layer of `target` that it names; of a layer split over ranks, this rank's part.

    Args:
        target: a loaded vLLM model; its `packed_modules_mapping` says which modules are fused.
        lora: LoRA weights by the base's module path, for example `model.layers.0.self_attn.q_proj`.
        rows: where real rows end.
        with_lora: makes of a layer what it computes in steps with mask rows.

    Raises:
        ValueError: if a LoRA has no layer to sit on, or has another shape than its layer.
    """
    from vllm.model_executor.layers.linear import LinearBase

    packed: dict[str, list[str]] = getattr(target, "packed_modules_mapping", {})
    unused = set(lora)
    for name, layer in target.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        parent, _, last = name.removesuffix(".base_layer").rpartition(".")  # wrapped for request LoRA adapters
        names = packed.get(last, [last])
        if unused.isdisjoint(f"{parent}.{name}" for name in names):
            continue
        outputs = _output_features(layer)
        # Each part of a fused layer is a module of its own in the base, unless the base has fused them too.
        parts = [[size] for size in outputs] if len(names) > 1 else [outputs]
        slices: list[tuple[int, LowRank]] = []
        at = 0
        for part, sizes in zip(names, parts, strict=True):
            path = f"{parent}.{part}"
            if path in lora:
                shape, size = (lora[path].b.shape[0], lora[path].a.shape[1]), sum(everywhere for everywhere, _ in sizes)
                if shape != (size, layer.input_size):
                    raise ValueError(
                        f"the LoRA of {path} maps {shape[1]} to {shape[0]} features; the base has {layer.input_size} and {size}"
                    )
                slices.append((at, shard(lora[path], layer, sizes)))
                unused.discard(path)
            at += sum(here for _, here in sizes)
        gate(layer, with_lora(layer, slices, at, rows), rows)
    if unused:
        raise ValueError(
            f"the adapter has LoRA weights for modules that the served model does not have: {', '.join(sorted(unused)[:3])}"
        )
