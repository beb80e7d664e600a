"""The model in training: a frozen base over real rows, and the same weights with LoRA over the mask rows behind them.

*Your LLM Knows the Future*, section 3: masked input and gated LoRA. Real rows see neither masks nor LoRA, so they run once, without
gradients, through the base as it is; mask rows then attend to the keys and values it left. The gate is thus exact by
construction, n prefixes cost one forward of real rows, and the backward pass touches mask rows only.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Self, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from vllm_mtp.causal_lm import attend_as_defined, check_layers, linears, unembedding
from vllm_mtp.sampler_head import SamplerHead
from vllm_mtp.train import group_attention
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.losses import masked_losses, supervised
from vllm_mtp.train.parts import Switched, decode, is_in_parts, leave_to_fsdp


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A second tree of modules over the very same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def with_group_attention(model: PreTrainedModel) -> PreTrainedModel:
    """A model over the same weights for rows of groups."""
    groups = shared_copy(model)
    groups.set_attn_implementation(group_attention.NAME)
    return groups


def checkpointed(model: PreTrainedModel, again: Callable[[], AbstractContextManager[None]] = nullcontext) -> PreTrainedModel:
    """The model, of whose layers the backward pass keeps what enters them and computes the rest again.

    Not transformers' own switch, which takes the cache away that mask rows read.

    Args:
        model: whose layers' forward is replaced.
        again: what it is computed in again.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            contexts = partial(_contexts, again)
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
    return model


def _contexts(
    again: Callable[[], AbstractContextManager[None]],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), again()


class _Real(DynamicLayer):
    """Keys and values of all real rows, also when they are computed again."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class _Behind(DynamicLayer):
    """What rows behind the real ones read: those and their own, which are not kept."""

    def __init__(self, real: DynamicLayer) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = real.keys, real.values, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


def read(model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[torch.Tensor, Cache]:
    """Final-norm states of real rows [B, T, d], and the keys and values that rows behind them read."""
    # A cache of its own choosing would drop what is outside of a sliding window, which earlier groups still see.
    cache = Cache(layer_class_to_replicate=_Real)
    return decode(model, input_ids=input_ids, past_key_values=cache, use_cache=True).last_hidden_state, cache


def read_groups(model: nn.Module, rows: torch.Tensor, prefix_lengths: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Final-norm states of groups' rows [B, G, K, d].

    Args:
        model: what `with_group_attention` made, with LoRA or without, or a tree that computes rows of groups (`Switched`).
        rows: what enters the first layer, shape [B, G, K, d].
        prefix_lengths: L of each group; its rows stand at positions L .. L+K-1 and see real rows 0 .. L-1, shape [B, G].
        cache: what `read` left of the real rows; it is left as it was.
    """
    B, G, K, _ = rows.shape
    positions = prefix_lengths[..., None] + torch.arange(K, device=rows.device)
    layers = [cast("DynamicLayer", layer) for layer in cache.layers]
    learn = any(layer.keys is not None and layer.keys.requires_grad for layer in layers)
    out = decode(
        model,
        inputs_embeds=rows.flatten(1, 2),
        position_ids=positions.flatten(1),
        attention_mask=rows.new_zeros(1, 1, 1, 1),  # so that none is made; `groups` says what rows see
        past_key_values=Cache([_Behind(layer) for layer in layers]),
        use_cache=True,
        groups=group_attention.Groups.of(prefix_lengths, real_learn=learn),
    )
    return out.last_hidden_state.view(B, G, K, -1)


class Trained(nn.Module):
    """What a checkpoint keeps of a model that is trained beside a base.

    Attributes:
        base: the model that reads real rows; it defines what is right.
        embed, unembed: its embedding, and states to logits.
    """

    base: PreTrainedModel
    embed: nn.Module
    unembed: Callable[[torch.Tensor], torch.Tensor]

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: what is learned from is a base without dropout, as it is served."""
        return super().train(False)

    def trainable(self) -> dict[str, torch.Tensor]:
        """Name -> tensor of everything that training owns."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

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


class TrainedModel(Trained, ABC):
    """What every recipe trains.

    Attributes:
        options: of training.
        sampler: the sampler head, None without one.
    """

    options: TrainConfig
    sampler: SamplerHead | None

    def groups(self, *, lora: bool) -> AbstractContextManager[None]:
        """What `read_groups` is called in; `lora`: whether the student reads, or the teacher."""
        return nullcontext()

    @abstractmethod
    def read_real(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        """What `read` gives of real rows, with gradients where they are trained."""

    @abstractmethod
    def mask_states(self, prefix_lengths: torch.Tensor, num_masks: int, cache: Cache, real: torch.Tensor) -> torch.Tensor:
        """Final-norm states of so many mask rows of each group [B, G, num_masks, d].

        Args:
            prefix_lengths: as in `states`.
            num_masks: at most `options.mask_tokens`.
            cache, real: what `read_real` gave.
        """

    def states(self, input_ids: torch.Tensor, prefix_lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Final-norm states of the real rows [B, T, d] and of the groups' mask rows [B, G, K, d].

        Args:
            input_ids: token ids, shape [B, T].
            prefix_lengths: L of each group, at least 1; its mask tokens stand at positions L .. L+K-1 and see real
                rows 0 .. L-1, shape [B, G].
        """
        real, cache = self.read_real(input_ids)
        return real, self.mask_states(prefix_lengths, self.options.mask_tokens, cache, real)


def lora_config(names: list[str], config: TrainConfig) -> LoraConfig:
    """PEFT's configuration of LoRA on linear layers of these names; ValueError where `rank_of` has a part that none of them has."""
    ranks = {}
    for part, _, rank in [asked.partition("=") for asked in config.rank_of]:
        having = [name for name in names if part in name]
        if not having:
            kinds = sorted({name.rpartition(".")[2] for name in names})
            raise ValueError(f"rank_of {part}={rank}: no linear layer has that in its name; they are {', '.join(kinds)}")
        ranks.update(dict.fromkeys(having, int(rank)))
    alphas = {name: config.alpha or 2 * rank for name, rank in ranks.items()}
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or 2 * config.rank,
        target_modules=names,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        task_type="CAUSAL_LM",
    )


class MaskedModel(TrainedModel):
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
        base.requires_grad_(False).eval()
        lora = lora_config(list(linears(base)), config)
        self.switched = Switched(base, lora) if is_in_parts(base) else None
        if self.switched is not None:
            student, self.student = base, self.switched.student
        else:
            student = with_group_attention(base)
            self.student = get_peft_model(student, lora)  # type: ignore[assignment]
        if base.dtype == torch.float32:
            for layer in student.modules():
                if isinstance(layer, LoraLayer):
                    # With autocast, which takes what enters a linear to bfloat16, PEFT would take it to float32 and back again.
                    layer.cast_input_dtype_enabled = False  # type: ignore[assignment]
        if config.gradient_checkpointing:
            checkpointed(student, partial(self.groups, lora=True))
        self.base = base
        self.embed, self.unembed = base.get_input_embeddings(), unembedding(base)
        width = base.config.hidden_size
        with torch.no_grad():
            spread = self.embed(torch.arange(base.config.vocab_size, device=base.device)).float().std()
        masks = torch.randn(config.mask_tokens, width, device=base.device) * spread
        self.mask_embeddings = nn.Parameter(masks, requires_grad=config.train_mask_embeddings)
        self.sampler = SamplerHead(width, config.sampler_residual).to(base.device) if config.sampler else None
        if self.switched is not None:
            leave_to_fsdp(self)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Stays where it is with its base in parts: those are on their devices, and FSDP2 moves no part that is put together."""
        return self if self.switched is not None else super().to(*args, **kwargs)

    def groups(self, *, lora: bool) -> AbstractContextManager[None]:
        return nullcontext() if self.switched is None else self.switched.groups(lora)

    def trainable(self) -> dict[str, torch.Tensor]:
        """Name -> tensor of everything that training owns, frozen mask embeddings included."""
        return {**super().trainable(), "mask_embeddings": self.mask_embeddings.detach()}

    def read_real(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        with torch.no_grad():
            return read(self.base, input_ids)

    def mask_states(self, prefix_lengths: torch.Tensor, num_masks: int, cache: Cache, real: torch.Tensor) -> torch.Tensor:
        rows = self.mask_embeddings[:num_masks].to(real.dtype).expand(*prefix_lengths.shape, -1, -1)
        with self.groups(lora=True):
            return read_groups(self.student.get_base_model(), rows, prefix_lengths, cache)

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
            answers: as in `losses.supervised`.
        """
        T, K = input_ids.shape[1], len(self.mask_embeddings)
        real, z = self.states(input_ids, prefix_lengths)
        # Mask token i (from 0) stands where token L+i stands, whose row is the one that predicts the same label, L+i+1.
        at = prefix_lengths[..., None] + torch.arange(K, device=input_ids.device)
        counts = supervised(at + 1, lengths, answers)
        at = at.clamp(max=T - 2).flatten(1)
        teacher = real.gather(1, at[..., None].expand(-1, -1, real.shape[-1])).view_as(z)
        previous, labels = input_ids.gather(1, at).view(counts.shape), input_ids.gather(1, at + 1).view(counts.shape)
        sampled = self.sampler(self.embed(previous), z) if self.sampler is not None else None
        return masked_losses(self.unembed, self.unembed, teacher, z, sampled, labels, counts, self.options)
