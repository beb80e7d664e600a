"""The recipe self-distill: a model drafts k tokens in one forward, and learns what a frozen teacher says of its own tokens.

*Multi-Token Prediction via Self-Distillation* (arXiv 2602.06019). Slot 0 is the last row of a prefix, slots 1 .. k-1 are mask rows
behind it. The tokens of all slots but the last go to the teacher behind the same prefix, and what it predicts at each of them is
the target of the slot that stands there. Nothing of the text behind a prefix is learned, only where prefixes end.

The paper packs a sequence in regions of P real tokens and k-1 masks, and the tokens in whose place masks stood come again, with
their positions, in the next region. Real tokens skip masks; masks see the real tokens before them and the masks of their region.
That is one sequence of real rows with a group of masks behind every P-th row, and so it is computed here (`read_groups`).
"""

import copy
from abc import abstractmethod
from typing import cast

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from vllm_mtp.causal_lm import attend_as_defined, check_layers, unembedding
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.losses import masked_losses, supervised
from vllm_mtp.train.model import MaskedModel, TrainedModel, checkpointed, read, read_groups, with_group_attention
from vllm_mtp.train.parts import is_in_parts

EMBEDDING_ROWS = 64
"""A vocabulary that has no slot for the mask token grows to a multiple of this."""


class Student(TrainedModel):
    """A model that drafts, and the teacher that reads its drafts.

    Attributes:
        teacher: the frozen model that reads real rows; the base itself where that never changes.
        reader: the teacher over rows of groups.
        teacher_embed: the teacher's embedding.
    """

    teacher: PreTrainedModel
    reader: PreTrainedModel
    teacher_embed: nn.Module

    @abstractmethod
    def predict(self, states: torch.Tensor) -> torch.Tensor:
        """The teacher's states [..., d] to its logits [..., V]."""

    def best(self, states: torch.Tensor) -> torch.Tensor:
        """The token of each state [..., d], shape [...]."""
        return self.unembed(states).argmax(-1)

    @torch.no_grad()
    def own_tokens(self, last: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """What the student drafts in all slots but the last, as it is served: its sampler head starts from the token before.

        Args:
            last: states of the prefixes' last rows, shape [B, G, d].
            z: states of the mask rows, shape [B, G, k-1, d].

        Returns:
            tokens, shape [B, G, k-1].
        """
        tokens = [self.best(last)]
        for state in z[:, :, :-1].unbind(2):
            tokens.append(self.best(state if self.sampler is None else self.sampler(self.embed(tokens[-1]), state)))
        return torch.stack(tokens, -1)

    def forward(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        prefix_lengths: torch.Tensor,
        slots: torch.Tensor,
        answers: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses of a packed batch, the mean over all slots: `loss` and its unweighted terms.

        Args:
            input_ids: token ids, padded on the right, shape [B, T].
            lengths: tokens of each sequence that are not padding, shape [B].
            prefix_lengths: L of each group, at least 1; slot i stands where token L+i-1 does, shape [B, G].
            slots: 0 .. k-1, one row a sequence, shape [B, k].
            answers: tokens in whose place a slot may draft, as in `losses.supervised`.
        """
        counts = supervised(prefix_lengths[..., None] + slots[:, None], lengths, answers)
        input_ids = input_ids[:, : int(prefix_lengths.max())]  # no prefix reaches further
        at = (prefix_lengths - 1)[..., None]
        real, cache = self.read_real(input_ids)
        last = _rows(real, at)
        z = self.mask_states(prefix_lengths, slots.shape[1] - 1, cache, real)
        own = self.own_tokens(last[:, :, 0], z)
        with torch.no_grad():
            if self.teacher is not self.base:
                real, cache = read(self.teacher, input_ids)
            rows = self.teacher_embed(own).to(real.dtype)
            with self.groups(lora=False):
                behind = read_groups(self.reader, rows, prefix_lengths, cache)
            teacher = torch.cat([_rows(real, at), behind], 2)
        sampled = None
        if self.sampler is not None:
            sampled = torch.cat([last, self.sampler(self.embed(own), z)], 2)
        return masked_losses(self.unembed, self.predict, teacher, torch.cat([last, z], 2), sampled, None, counts, self.options)


def _rows(states: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """States [B, T, d] in the places [B, G, 1], shape [B, G, 1, d]."""
    B, G, _ = at.shape
    return states.gather(1, at.expand(-1, -1, states.shape[-1])).view(B, G, 1, -1)


class GatedStudent(Student, MaskedModel):  # type: ignore[misc]  # its forward takes slots
    """Gated LoRA learns, and the model without it is the teacher: slot 0 is the base's own and stays so."""

    def __init__(self, base: PreTrainedModel, config: TrainConfig) -> None:
        super().__init__(base, config)
        self.teacher, self.reader = self.base, self.base if is_in_parts(self.base) else with_group_attention(self.base)
        self.teacher_embed = self.embed

    def predict(self, states: torch.Tensor) -> torch.Tensor:
        return self.unembed(states)


class FullStudent(Student):
    """All weights learn, one token of the vocabulary stands in every mask row, and a copy of the model at the start is the teacher.

    Args:
        base: a causal LM with a slot for the mask token (`add_mask_token`); it is trained in place.
        config: options of training.
        mask_token_id: that slot.
        num_tokens: ids from here on are no tokens of the base either.

    Raises:
        UnsupportedModel: the base has layers that mask rows cannot be served with.
    """

    no_tokens: torch.Tensor

    def __init__(self, base: PreTrainedModel, config: TrainConfig, mask_token_id: int, num_tokens: int) -> None:
        super().__init__()
        check_layers(base.config, stateful=base._is_stateful)
        attend_as_defined(base)
        self.options, self.mask_token_id, self.sampler = config, mask_token_id, None
        self.base = base.eval()
        self.teacher = copy.deepcopy(base).requires_grad_(False)
        self.student = with_group_attention(base)
        if config.gradient_checkpointing:
            checkpointed(base)
            checkpointed(self.student)
        self.reader = with_group_attention(self.teacher)
        self.embed, self.unembed = base.get_input_embeddings(), unembedding(base)
        self.teacher_embed, self.teacher_unembed = self.teacher.get_input_embeddings(), unembedding(self.teacher)
        unused = {mask_token_id, *range(num_tokens, len(_tables(base)[0]))}
        no_tokens = torch.tensor(sorted(unused), device=base.device)
        self.register_buffer("no_tokens", no_tokens, persistent=False)

    def read_real(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        return read(self.base, input_ids)

    def mask_states(self, prefix_lengths: torch.Tensor, num_masks: int, cache: Cache, real: torch.Tensor) -> torch.Tensor:
        tokens = prefix_lengths.new_full((*prefix_lengths.shape, num_masks), self.mask_token_id)
        return read_groups(self.student, self.embed(tokens).to(real.dtype), prefix_lengths, cache)

    def best(self, states: torch.Tensor) -> torch.Tensor:
        return self._of_tokens(self.unembed(states)).argmax(-1)

    def predict(self, states: torch.Tensor) -> torch.Tensor:
        """The teacher's logits; a slot that is no token has probability 0, and so the student learns never to say it."""
        return self._of_tokens(self.teacher_unembed(states))

    def _of_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, self.no_tokens, -torch.inf)


@torch.no_grad()
def add_mask_token(base: PreTrainedModel, num_tokens: int, mask_token_id: int | None) -> int:
    """Put a mask token into a slot of the vocabulary, drawn with mean and covariance of the embeddings; its id.

    Args:
        base: changed in place; where no slot is left, its vocabulary grows.
        num_tokens: ids from here on are not used by the tokenizer.
        mask_token_id: the slot; None: the first that is not used.

    Raises:
        ValueError: there is no such slot.
    """
    embed, head = _tables(base)
    size, known = len(embed), embed[:num_tokens].float()
    token = num_tokens if mask_token_id is None else mask_token_id
    if token > size:
        raise ValueError(f"mask_token_id={token} is no slot of the base's vocabulary of {size}: give one of them, or none.")
    mean, mean_of_head = known.mean(0), head[:num_tokens].float().mean(0)
    if token == size:
        base.resize_token_embeddings(size + 1, pad_to_multiple_of=EMBEDDING_ROWS, mean_resizing=False)
        embed, head = _tables(base)
        head[size:] = mean_of_head.to(head.dtype)
        embed[size:] = mean.to(embed.dtype)
    # A sum of centred rows with independent weights of variance 1/n has exactly their covariance.
    weights = torch.randn(len(known), device=known.device) / len(known) ** 0.5
    embed[token] = (mean + weights @ (known - mean)).to(embed.dtype)
    return token


def _tables(base: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of embedding and unembedding, [V, d]; they may be one."""
    return cast("torch.Tensor", base.get_input_embeddings().weight), cast("torch.Tensor", base.get_output_embeddings().weight)
