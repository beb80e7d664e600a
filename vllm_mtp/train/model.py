"""The model in training: a frozen base over real rows, and the same weights with LoRA over the mask rows behind them.

*Your LLM Knows the Future*, section 3: masked input and gated LoRA. Real rows see neither masks nor LoRA, so they run once, without
gradients, through the base as it is; mask rows then attend to the keys and values it left. The gate is thus exact by
construction, n prefixes cost one forward of real rows, and the backward pass touches mask rows only.
"""

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from vllm_mtp.causal_lm import attend_as_defined, check_layers, linears, unembedding
from vllm_mtp.sampler_head import SamplerHead
from vllm_mtp.train import group_attention
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.losses import masked_losses


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A second tree of modules over the very same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class MaskedModel(nn.Module):
    """Mask embeddings, gated LoRA and sampler head around a frozen base.

    Args:
        base: a causal LM; its parameters are frozen in place and never change.
        config: options of training.

    Raises:
        UnsupportedModel: the base has layers that mask rows cannot be served with.
    """

    def __init__(self, base: PreTrainedModel, config: TrainConfig) -> None:
        super().__init__()
        check_layers(base.config, stateful=base._is_stateful)
        attend_as_defined(base)
        self.options = config
        self.base = base.requires_grad_(False).eval()
        student = shared_copy(base)
        student.set_attn_implementation(group_attention.NAME)
        lora = LoraConfig(
            r=config.rank, lora_alpha=config.alpha or 2 * config.rank, target_modules=list(linears(student)), task_type="CAUSAL_LM"
        )
        self.student: PeftModel = get_peft_model(student, lora)  # type: ignore[assignment]
        self.embed, self.unembed = base.get_input_embeddings(), unembedding(base)
        width = base.config.hidden_size
        with torch.no_grad():
            spread = self.embed(torch.arange(base.config.vocab_size, device=base.device)).float().std()
        masks = torch.randn(config.mask_tokens, width, device=base.device) * spread
        self.mask_embeddings = nn.Parameter(masks, requires_grad=config.train_mask_embeddings)
        self.sampler = SamplerHead(width, config.sampler_residual).to(base.device) if config.sampler else None

    def train(self, mode: bool = True) -> "MaskedModel":
        """Stays in evaluation mode: mask rows learn from a base without dropout, as it is served."""
        return super().train(False)

    def trainable(self) -> dict[str, torch.Tensor]:
        """Name -> tensor of everything that training owns, frozen mask embeddings included."""
        own = {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}
        return {**own, "mask_embeddings": self.mask_embeddings.detach()}

    def load_trainable(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set what `trainable` returned; ValueError when it was another model's."""
        own = dict(self.named_parameters())
        wanted = {name: tensor.shape for name, tensor in self.trainable().items()}
        for name in sorted(wanted.keys() | tensors.keys()):
            if name not in wanted or name not in tensors or tensors[name].shape != wanted[name]:
                raise ValueError(f"the checkpoint was written with other options: {name} differs")
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)

    def states(self, input_ids: torch.Tensor, prefix_lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Final-norm states of the real rows [B, T, d] and of the groups' mask rows [B, G, K, d].

        Args:
            input_ids: token ids, shape [B, T].
            prefix_lengths: L of each group, at least 1; its mask tokens stand at positions L .. L+K-1 and see real
                rows 0 .. L-1, shape [B, G].
        """
        (B, T), G, K = input_ids.shape, prefix_lengths.shape[1], len(self.mask_embeddings)
        with torch.no_grad():
            # A cache of its own choosing would drop what is outside of a sliding window, which earlier groups still see.
            out = self.base.get_decoder()(input_ids=input_ids, past_key_values=DynamicCache(), use_cache=True)
        rows = self.mask_embeddings.to(out.last_hidden_state.dtype).expand(B, G, -1, -1).reshape(B, G * K, -1)
        positions = prefix_lengths[..., None] + torch.arange(K, device=input_ids.device)
        hidden = torch.arange(T, device=input_ids.device) >= prefix_lengths[..., None]
        bias = torch.zeros_like(hidden, dtype=rows.dtype).masked_fill(hidden, torch.finfo(torch.bfloat16).min)
        z = (
            self.student.get_base_model()
            .get_decoder()(  # type: ignore[operator]
                inputs_embeds=rows,
                position_ids=positions.flatten(1),
                attention_mask=bias[:, None],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            .last_hidden_state
        )
        return out.last_hidden_state, z.view(B, G, K, -1)

    def forward(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        prefix_lengths: torch.Tensor,
        answers: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses of a packed batch: `loss` and its unweighted terms.

        Args:
            input_ids: token ids, padded on the right, shape [B, T].
            lengths: tokens of each sequence that are not padding, shape [B].
            prefix_lengths: as in `states`, shape [B, G].
            answers: tokens that may be labels, shape [B, T]; a group has labels up to the first that may not. None: all.
        """
        T, K = input_ids.shape[1], len(self.mask_embeddings)
        real, z = self.states(input_ids, prefix_lengths)
        # Mask token i (from 0) stands where token L+i stands, whose row is the one that predicts the same label, L+i+1.
        at = prefix_lengths[..., None] + torch.arange(K, device=input_ids.device)
        counts = at + 1 < lengths[:, None, None]
        at = at.clamp(max=T - 2).flatten(1)
        if answers is not None:
            counts &= answers.gather(1, at + 1).view(counts.shape).cumprod(-1).bool()
        teacher = real.gather(1, at[..., None].expand(-1, -1, real.shape[-1])).view_as(z)
        previous, labels = input_ids.gather(1, at).view(counts.shape), input_ids.gather(1, at + 1).view(counts.shape)
        sampled = self.sampler(self.embed(previous), z) if self.sampler is not None else None
        return masked_losses(self.unembed, teacher, z, sampled, labels, counts, self.options)
