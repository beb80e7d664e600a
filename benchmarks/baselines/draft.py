"""Draft models: a small Llama with the base's tokens, distilled from it; and the same with mask tokens that give all drafts in one
forward (PARD, arXiv 2504.18583)."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.baselines.drafter import Drafter, labelled, mean_cross_entropy
from vllm_mtp.train.losses import supervised
from vllm_mtp.train.model import read, read_groups, with_group_attention


def small_config(base: Any, layers: int = 2, share: float = 1 / 6) -> LlamaConfig:
    """A Llama of about `share` of the base's parameters and of two thirds of its width, with the base's heads for keys and values.

    Its MLP takes up what is left. vLLM then finds one page size in both models' caches.

    Raises:
        ValueError: the base's vocabulary alone takes more.
    """
    head, kv = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads, base.num_key_value_heads
    d = max(kv, round(base.hidden_size * 2 / 3 / head / kv) * kv) * head

    def attention(width: int) -> int:
        return 2 * width * width + 2 * width * kv * head

    tables = 1 if base.tie_word_embeddings else 2
    whole = tables * base.vocab_size * base.hidden_size + base.num_hidden_layers * (
        attention(base.hidden_size) + 3 * base.hidden_size * base.intermediate_size
    )
    left = share * whole - base.vocab_size * d - layers * attention(d)
    intermediate = int(left / (layers * 3 * d)) // 32 * 32
    if intermediate < 32:
        raise ValueError(
            f"a draft model of width {d} and {layers} layers is larger than {share:.2f} of the base: ask for a larger share"
        )
    return LlamaConfig(
        vocab_size=base.vocab_size,
        hidden_size=d,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=d // head,
        num_key_value_heads=kv,
        head_dim=head,
        max_position_embeddings=base.max_position_embeddings,
        rms_norm_eps=base.rms_norm_eps,
        rope_parameters=getattr(base, "rope_parameters", None),
        bos_token_id=base.bos_token_id,
        eos_token_id=base.eos_token_id,
        tie_word_embeddings=True,
        attn_implementation=base._attn_implementation,  # type: ignore[call-arg]  # of every configuration
    )


class Draft(Drafter):
    """A small Llama trained on the base's next-token distribution at every row.

    Args:
        base: the base.
        layers: its layers.
        share: its parameters over the base's.
    """

    def __init__(self, base: PreTrainedModel, layers: int = 2, share: float = 1 / 6) -> None:
        super().__init__(base)
        self.model = LlamaForCausalLM(small_config(base.config, layers, share))

    def _target(self, input_ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.base(input_ids=input_ids, use_cache=False).logits.float().softmax(-1)

    def forward(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, answers: torch.Tensor, prefix_lengths: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`loss`."""
        logits = self.model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        counts = labelled(lengths, answers)[:, 1:]
        return {"loss": mean_cross_entropy(logits.float(), self._target(input_ids)[:, :-1], counts)}

    @torch.no_grad()
    def drafts(self, ids: torch.Tensor, first: int, k: int) -> torch.Tensor:
        T, rows = len(ids), torch.arange(first, len(ids) - 1)
        texts = torch.cat([ids, ids.new_zeros(k)]).repeat(len(rows), 1)
        for i in range(k):
            known = rows + 2 + i  # tokens of each text
            states = self.model.model(input_ids=texts[:, : T + i], use_cache=False).last_hidden_state
            texts[torch.arange(len(rows)), known] = self.model.lm_head(states[torch.arange(len(rows)), known - 1]).argmax(-1)
        return torch.stack([texts[torch.arange(len(rows)), rows + 2 + i] for i in range(k)], 1)

    def folder_config(self) -> dict[str, Any]:
        return {**self.model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_parameters())

    def speculative_config(self, folder: Path, k: int) -> dict[str, Any]:
        return {"method": "draft_model", "model": str(folder), "num_speculative_tokens": k}


class ParallelDraft(Draft):
    """A draft model whose last token and k - 1 mask tokens behind it give k drafts in one forward.

    Trained on groups of mask tokens behind random rows, as the adapter's are, beside every row's own next token.

    Args:
        base: the base.
        mask_token: a token that no text has; its embedding is the mask's.
        masks: mask tokens of a group, one less than the most drafts.
        options: of `Draft`.
    """

    def __init__(self, base: PreTrainedModel, mask_token: int, masks: int = 7, **options: Any) -> None:
        super().__init__(base, **options)
        self.mask_token, self.masks, self.max_drafts = mask_token, masks, masks + 1
        self.grouped = with_group_attention(self.model)

    def states(self, input_ids: torch.Tensor, prefix_lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States of the rows [B, T, d] and of the groups' mask tokens [B, G, K, d], as `MaskedModel.states` lays them out."""
        real, cache = read(self.model, input_ids)
        masks = self.model.model.embed_tokens(prefix_lengths.new_full((*prefix_lengths.shape, self.masks), self.mask_token))
        return real, read_groups(self.grouped, masks, prefix_lengths, cache)

    def forward(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, answers: torch.Tensor, prefix_lengths: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`loss`; `ce_1` of the rows, `ce_2` of the mask tokens."""
        real, z = self.states(input_ids, prefix_lengths)
        target = self._target(input_ids)
        rows = mean_cross_entropy(self.model.lm_head(real[:, :-1]).float(), target[:, :-1], labelled(lengths, answers)[:, 1:])
        # Mask token i (from 0) stands where token L + i stands, whose row predicts token L + i + 1.
        at = prefix_lengths[..., None] + torch.arange(self.masks, device=input_ids.device)
        counts = supervised(at + 1, lengths, answers)
        at = at.clamp(max=input_ids.shape[1] - 2).flatten(1)
        wanted = target.gather(1, at[..., None].expand(-1, -1, target.shape[-1])).view(*counts.shape, -1)
        masks = mean_cross_entropy(self.model.lm_head(z).float(), wanted, counts)
        return {"loss": (rows + masks) / 2, "ce_1": rows.detach(), "ce_2": masks.detach()}

    @torch.no_grad()
    def drafts(self, ids: torch.Tensor, first: int, k: int) -> torch.Tensor:
        lengths = torch.arange(first + 2, len(ids) + 1)
        real, z = self.states(ids[None], lengths[None])
        states = torch.cat([real[0, first + 1 :, None], z[0, :, : k - 1]], 1)
        return self.model.lm_head(states).argmax(-1)

    def folder_config(self) -> dict[str, Any]:
        return {**super().folder_config(), "pard_token": self.mask_token}

    def speculative_config(self, folder: Path, k: int) -> dict[str, Any]:
        return {**super().speculative_config(folder, k), "parallel_drafting": True}
