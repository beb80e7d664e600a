"""The drafter on a CPU in one call of a kernel of ours (kernels/cpu/drafter.cpp), where model and processor allow it.

The two dozen small operations of `drafter.Drafter` cost more to call than to compute; and compiled they want one number of drafts,
whatever a step's layout can use.
"""

from typing import Any

import torch
from torch import nn

from vllm_mtp.cpu_linear import PackedSampler, PanelLinear
from vllm_mtp.drafter import Drafter

PROBED = 64  # tokens by which an embedding is told from one that does more than look up


class PanelDrafter:
    """Drafts as `Drafter.__call__` does, up to rounding.

    Args:
        drafter: whose candidates, sampler head and unembedding are taken.
        sampler: its sampler head.
        head: the unembedding as the model's own layer runs it.
        embedding: E [V, d].
    """

    def __init__(self, drafter: Drafter, sampler: PackedSampler, head: PanelLinear, embedding: torch.Tensor) -> None:
        assert drafter.unembedding is not None
        assert drafter.candidates is not None
        # What changes when weights are loaded anew changes in place.
        self.shared = head.panels, drafter.unembedding.weight, embedding
        self.sampler = (
            *(_panels(linear) for linear in (sampler.from_previous, sampler.from_state)),
            sampler.from_state.bias,
            *_norm(sampler.norm_1),
            _panels(sampler.linear_2),
            sampler.linear_2.bias,
            *_norm(sampler.norm_2),
            sampler.residual,
        )
        self.numbers = drafter.unembedding.end, drafter.candidates

    @staticmethod
    def of(drafter: Drafter, model: Any) -> "PanelDrafter | None":
        """The same drafter in one call; None where it cannot be.

        Args:
            drafter: of the served model.
            model: the model, loaded.
        """
        sampler, head = drafter.sampler, getattr(getattr(model, "lm_head", None), "cpu_linear", None)
        unembedding = drafter.unembedding
        if (
            not isinstance(sampler, PackedSampler)
            or not isinstance(head, PanelLinear)
            or not all(isinstance(linear.packed, PanelLinear) for linear in sampler.linears)
            or unembedding is None
            or unembedding.sum_over_ranks is not None
            or drafter.candidates is None
            or unembedding.weight.shape[1] % 16
        ):
            return None
        embedding = _looked_up(model, drafter, unembedding.end)
        return None if embedding is None else PanelDrafter(drafter, sampler, head, embedding)

    def __call__(self, hidden: torch.Tensor, rows: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        """Drafts [R, n] for n <= k.

        Args:
            hidden, rows, sampled: as `Drafter.__call__` takes them, with rows [R, n].
        """
        return self.with_confidence(hidden, rows, sampled)[0]

    def with_confidence(self, hidden: torch.Tensor, rows: torch.Tensor, sampled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drafts and their probabilities, [R, n], as `Drafter.with_confidence` gives them.

        Args:
            hidden, rows, sampled: as `__call__` takes them.
        """
        return torch.ops.vllm_mtp.draft_cpu(hidden, rows, sampled, *self.shared, *self.sampler, *self.numbers)


def _panels(linear: Any) -> torch.Tensor:
    return linear.packed.panels


def _norm(norm: nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor, float]:
    return norm.weight.data, norm.bias.data, norm.eps


def _looked_up(model: nn.Module, drafter: Drafter, vocab_size: int) -> torch.Tensor | None:
    """The table [V, d] whose rows are the model's embeddings, as they are; None where embedding does more (Gemma scales it)."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    with torch.inference_mode():
        tokens = torch.linspace(0, vocab_size - 1, min(PROBED, vocab_size)).long()
        wanted = drafter.embed(tokens)
        for module in model.modules():
            table = getattr(module, "weight", None)
            if (
                isinstance(module, VocabParallelEmbedding)
                and isinstance(table, torch.Tensor)
                and table.ndim == 2
                and table.shape[0] >= vocab_size
                and table.dtype == torch.bfloat16
                and torch.equal(table[tokens], wanted)
            ):
                return table
    return None
