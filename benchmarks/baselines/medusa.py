"""Medusa heads as vLLM's `medusa.py` has them: head i is a residual block and an unembedding on the base's last state."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from benchmarks.baselines.drafter import Drafter, labelled, mean_cross_entropy


class Medusa(Drafter):
    """Heads that predict token r + 1 + i from the state of row r, each by itself.

    Args:
        base: the base.
        heads: how many, and so the most drafts.
        own_unembeddings: each head has an unembedding of its own that starts as the base's, as published; False: all share the
            base's, which is stored once more, since vLLM's loader takes it from the folder.
        decay: head i counts decay^i.
    """

    def __init__(self, base: PreTrainedModel, heads: int = 8, own_unembeddings: bool = True, decay: float = 0.8) -> None:
        super().__init__(base)
        d, unembedding = base.config.hidden_size, base.get_output_embeddings().weight
        self.max_drafts, self.own_unembeddings, self.decay = heads, own_unembeddings, decay
        self.blocks = nn.ParameterList(torch.zeros(d, d) for _ in range(heads))  # a head starts as the base's own
        self.lm_heads = nn.ParameterList(unembedding.detach().clone() for _ in range(heads if own_unembeddings else 0))

    def logits(self, state: torch.Tensor, head: int) -> torch.Tensor:
        """Of head `head`, counted from 0."""
        state = state + F.silu(F.linear(state, self.blocks[head]))
        return F.linear(state, self.lm_heads[head]) if self.own_unembeddings else self.unembed(state)

    @torch.no_grad()
    def states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """States behind the final norm, [B, T, d]."""
        return self.base.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state

    def forward(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, answers: torch.Tensor, prefix_lengths: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`loss` and `ce_1`, .. of the heads."""
        state = self.states(input_ids)
        with torch.no_grad():
            target = self.unembed(state).float().softmax(-1)
        counts, T = labelled(lengths, answers), input_ids.shape[1]
        loss, terms, total = state.new_zeros(()), dict[str, torch.Tensor](), 0.0
        for i in range(len(self.blocks)):
            N, weight = T - 2 - i, self.decay ** (i + 1)
            entropy = mean_cross_entropy(self.logits(state[:, :N], i).float(), target[:, 1 + i : 1 + i + N], counts[:, 2 + i :])
            terms[f"ce_{i + 1}"] = entropy.detach()
            loss, total = loss + weight * entropy, total + weight
        return {"loss": loss / total, **terms}

    @torch.no_grad()
    def drafts(self, ids: torch.Tensor, first: int, k: int) -> torch.Tensor:
        state = self.states(ids[None])[0, first:-1]
        return torch.stack([self.logits(state, i).argmax(-1) for i in range(k)], 1)

    def folder_config(self) -> dict[str, Any]:
        return {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": self.base.config.hidden_size,
            "vocab_size": self.base.config.vocab_size,
            "num_heads": len(self.blocks),
            "num_hidden_layers": 1,
            "original_lm_head": not self.own_unembeddings,
            "dtype": "bfloat16",
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            **{f"blocks.{i}.layers.0.weight": block for i, block in enumerate(self.blocks)},
            **{f"lm_heads.{i}.weight": head for i, head in enumerate(self.lm_heads or [self.base.get_output_embeddings().weight])},
        }

    def speculative_config(self, folder: Path, k: int) -> dict[str, Any]:
        return {"method": "medusa", "model": str(folder), "num_speculative_tokens": k}
