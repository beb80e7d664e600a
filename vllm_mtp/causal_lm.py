"""What training and the reference ask of a causal LM of transformers, whatever its modules are called: the linear layers of its
decoder layers, its logits, and attention as its configuration defines it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers, as `layer_types` of a configuration names them, whose mask rows can be served."""


class UnsupportedModel(ValueError):
    """A base model whose layers carry more than a KV cache that mask rows could read; one sentence with the reason."""


def check_layers(config: Any, *, stateful: bool = False) -> None:
    """Refuse models with layers other than attention over a KV cache, or a window of one.

    A state-space or linear-attention layer folds every row that it sees into one state for the whole request. Mask rows must not
    enter it, and the groups behind different rows would each need a state of their own.

    Args:
        config: of transformers.
        stateful: what transformers or vLLM says of the model class: its layers hand a state on from token to token.

    Raises:
        UnsupportedModel: it is one.
    """
    others = sorted(set(getattr(config, "layer_types", None) or ()) - SERVED_LAYERS)
    if stateful or others:
        kinds = f" (layers of kind {', '.join(map(str, others))})" if others else ""
        raise UnsupportedModel(
            f"mask-token prediction does not support {config.model_type} models{kinds}: their state-space, linear or chunked "
            "attention layers keep a state of the request that mask rows would change, or attend to parts of it only; take a "
            "base model whose layers are full or sliding-window attention"
        )


def _decoder_layers(decoder: nn.Module, num_layers: int) -> Iterator[tuple[str, nn.Module]]:
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            for i, layer in enumerate(module):
                yield f"{name}.{i}" if name else str(i), layer
            return


def _routed(layer: nn.Module, num_experts: int | None) -> set[nn.Module]:
    """Linear layers of a decoder layer that belong to its experts or choose among them."""
    routed: set[nn.Module] = set()
    if not num_experts:
        return routed
    for block in layer.modules():
        children = list(block.children())
        lists = [child for child in children if isinstance(child, nn.ModuleList) and len(child) == num_experts]
        stacked = [child for child in children if any(p.ndim == 3 for p in child.parameters(recurse=False))]
        for experts in (*lists, *stacked):
            routed.update(experts.modules())
        if lists or stacked:  # a router, or the gate of a shared expert
            routed.update(c for c in children if isinstance(c, nn.Linear) and c.out_features in (1, num_experts))
    return routed


def linears(model: Any) -> dict[str, nn.Linear]:
    """Path in the model -> every linear layer that all rows of its decoder layers go through.

    Found by what they are and not by name: `nn.Linear` inside the decoder's layers. Experts of a mixture and what routes rows to
    them are left out, and so is all that stands outside of the layers, the unembedding among it.

    Args:
        model: a `PreTrainedModel` with an unembedding.

    Raises:
        UnsupportedModel: there are none.
    """
    config, decoder = model.config, model.get_decoder()
    (prefix,) = [name for name, module in model.named_modules() if module is decoder]
    num_experts = next(
        (n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(config, key, None))), None
    )
    found = {}
    for at, layer in _decoder_layers(decoder, config.num_hidden_layers):
        routed = _routed(layer, num_experts)
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and module not in routed:
                found[".".join(part for part in (prefix, at, name) if part)] = module
    if not found:
        raise UnsupportedModel(f"no linear layer was found in the decoder layers of {type(model).__name__}: nothing can be adapted")
    return found


class CappedUnembedding(nn.Module):
    """Logits under a soft cap: c tanh(W z / c).

    Args:
        unembedding: z [..., d] -> W z [..., V].
        cap: c.
    """

    def __init__(self, unembedding: nn.Module, cap: float) -> None:
        super().__init__()
        self.unembedding, self.cap = unembedding, cap

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.cap * torch.tanh(self.unembedding(states) / self.cap)


def unembedding(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """States after the final norm [..., d] -> the logits that the model's own forward gives for them [..., V]."""
    head, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    return CappedUnembedding(head, cap) if cap else head


def attend_as_defined(model: Any) -> None:
    """Switch to an attention of transformers that computes what the configuration says: of its own only `eager` caps scores, and
    the others leave the cap out without a word."""
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
