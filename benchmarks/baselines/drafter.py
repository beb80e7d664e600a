"""What the baselines have in common: a drafter in training beside a frozen base, and the folder that vLLM loads it from."""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from vllm_mtp.causal_lm import unembedding
from vllm_mtp.train.model import Trained
from vllm_mtp.whole_files import whole, write_whole

WEIGHTS = "model.safetensors"


class Drafter(Trained, ABC):
    """A drafter and the frozen base that it drafts for.

    Args:
        base: a Llama-like causal LM; its parameters are frozen in place, and none of them is trained or stored.
    """

    max_drafts: int | None = None
    """The most drafts that it gives; None: any number."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        self.embed, self.unembed = base.get_input_embeddings(), unembedding(base)

    @abstractmethod
    def forward(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, answers: torch.Tensor, prefix_lengths: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`loss` and its terms on a batch of `vllm_mtp.train.data.Sequences`."""

    @abstractmethod
    def drafts(self, ids: torch.Tensor, first: int, k: int) -> torch.Tensor:
        """Drafts [rows, k] of a text [T] behind each row r from `first` to the last but one: tokens r + 2 and on, given tokens up
        to r + 1."""

    @abstractmethod
    def folder_config(self) -> dict[str, Any]:
        """What stands in the folder's config.json."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the folder under vLLM's name for it."""

    @abstractmethod
    def speculative_config(self, folder: Path, k: int) -> dict[str, Any]:
        """How vLLM is asked to draft k tokens with the folder."""

    def save(self, folder: Path) -> None:
        """Write config.json and the weights in bfloat16."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.json", json.dumps(self.folder_config(), indent=2) + "\n")
        with whole(folder / WEIGHTS) as part:
            save_file({n: t.detach().to(torch.bfloat16).contiguous() for n, t in self.tensors().items()}, part, {"format": "pt"})

    @torch.no_grad()
    def load(self, folder: Path) -> "Drafter":
        """Take over the weights of a folder that `save` wrote for the same base and shape."""
        own, stored = self.tensors(), load_file(folder / WEIGHTS)
        if own.keys() != stored.keys():
            raise ValueError(f"{folder} holds another drafter: {sorted(own.keys() ^ stored.keys())}")
        for name, tensor in stored.items():
            own[name].copy_(tensor)
        return self


def mean_cross_entropy(logits: torch.Tensor, target: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits [.., V] against distributions [.., V], the mean over the rows that count [..]."""
    rows = logits.logsumexp(-1) - torch.linalg.vecdot(target, logits)
    return (rows * counts).sum() / counts.sum().clamp(min=1)


def labelled(lengths: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Tokens that may be labels: neither padding nor a prompt of a chat, shape [B, T]."""
    return answers & (torch.arange(answers.shape[1], device=answers.device) < lengths[:, None])
