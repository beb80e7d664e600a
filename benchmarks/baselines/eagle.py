"""EAGLE and EAGLE-3 as vLLM's `llama_eagle.py` and `llama_eagle3.py` have them: one decoder layer over the base's own features.

A chain that starts behind row r has r's feature and the embedding of token r + 1, predicts token r + 2, and goes on with its own
output for a feature and with its draft for a token. It sees the features of rows up to r, and its own outputs behind them: so it
is trained too, over `unroll` tokens (EAGLE-3's training-time test; with one it is EAGLE's published recipe). Chains of all rows
run at once, a chain's own keys beside those of the rows.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, apply_rotary_pos_emb, repeat_kv

from benchmarks.baselines.drafter import Drafter, labelled, mean_cross_entropy

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]


class Chains(Drafter):
    """The layer that EAGLE and EAGLE-3 share, and its attention.

    Args:
        base: the base.
        unroll: tokens of a chain that are trained.
        unroll_decay: token i of a chain counts unroll_decay^(i-1).
    """

    def __init__(self, base: PreTrainedModel, unroll: int = 3, unroll_decay: float = 0.8) -> None:
        super().__init__(base)
        if not isinstance(base.config, LlamaConfig):
            raise ValueError(f"EAGLE drafts here for Llama only, and the base is a {base.config.model_type}")
        self.unroll, self.unroll_decay = unroll, unroll_decay
        self.layer = LlamaDecoderLayer(base.config, 0)
        self.rotary = base.get_decoder().rotary_emb
        for module in self.layer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=base.config.initializer_range)

    def attend(self, x: torch.Tensor, step: int, seen: KeysValues) -> torch.Tensor:
        """Attention [B, N, d] of token `step` of N chains over the rows up to each chain's first and the chain's own tokens before.

        Args:
            x: normed input [B, N, ..].
            step: tokens of the chain before this one.
            seen: keys and values [B, heads, N, D] of the tokens before; this one's are appended.
        """
        attention = self.layer.self_attn
        B, N, _ = x.shape
        positions = torch.arange(step, step + N, device=x.device)[None]
        cos, sin = self.rotary(x, positions)
        q, k, v = (p(x).view(B, N, -1, attention.head_dim).transpose(1, 2) for p in self._projections())
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k, v = (repeat_kv(t, attention.num_key_value_groups) for t in (k, v))
        seen.append((k, v))
        rows, own = seen[0], seen[1:]
        scores = q @ rows[0].transpose(2, 3)
        hidden = torch.ones(N, N, dtype=torch.bool, device=x.device).triu(1)
        scores = torch.cat([scores.masked_fill(hidden, float("-inf")), *((q * key).sum(-1, keepdim=True) for key, _ in own)], -1)
        weights = (scores * attention.scaling).softmax(-1, dtype=torch.float32).to(v.dtype)
        output = weights[..., :N] @ rows[1]
        for i, (_, value) in enumerate(own):
            output = output + weights[..., N + i, None] * value
        return attention.o_proj(output.transpose(1, 2).reshape(B, N, -1))

    def _projections(self) -> tuple[nn.Module, ...]:
        attention = self.layer.self_attn
        return attention.q_proj, attention.k_proj, attention.v_proj

    def next(self, tokens: torch.Tensor, feature: torch.Tensor, seen: KeysValues) -> torch.Tensor:
        """Features [B, N, d] behind a further token [B, N] of each of N chains, given those before."""
        x, residual = self.mixed(self.embed(tokens), feature)
        hidden = residual + self.attend(x, len(seen), seen)
        return hidden + self.layer.mlp(self.layer.post_attention_layernorm(hidden))

    def mixed(self, embedding: torch.Tensor, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input of the attention and of the residual around it."""
        raise NotImplementedError

    def features(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the base's rows give a chain to start from, and their states behind the final norm, both [B, T, d]."""
        raise NotImplementedError

    def logits(self, feature: torch.Tensor) -> torch.Tensor:
        """Of the token that a feature predicts."""
        raise NotImplementedError

    def feature_loss(self, feature: torch.Tensor, state: torch.Tensor, counts: torch.Tensor) -> torch.Tensor | None:
        """Distance of features from the base's, where the method has such a term."""
        return None

    def noisy(self, feature: torch.Tensor) -> torch.Tensor:
        """Features as training shows them."""
        return feature

    def forward(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, answers: torch.Tensor, prefix_lengths: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`loss`; `ce_1`, .. of the chains' tokens; `feature` of the first where the method has the term."""
        feature, state = self.features(input_ids)
        with torch.no_grad():
            target = self.unembed(state).float().softmax(-1)
        counts, N = labelled(lengths, answers), input_ids.shape[1] - self.unroll - 1
        feature = self.noisy(feature[:, :N])
        seen: KeysValues = []
        loss, terms, total = feature.new_zeros(()), dict[str, torch.Tensor](), 0.0
        for step in range(self.unroll):
            # Chain r takes token r + 1 + step, for the state of that row, which predicts token r + 2 + step.
            at, weight = slice(1 + step, 1 + step + N), self.unroll_decay**step
            feature = self.next(input_ids[:, at], feature, seen)
            counted = counts[:, 2 + step : 2 + step + N]
            entropy = mean_cross_entropy(self.logits(feature).float(), target[:, at], counted)
            distance = self.feature_loss(feature, state[:, at], counted)
            terms[f"ce_{step + 1}"] = entropy.detach()
            loss, total = loss + weight * entropy, total + weight
            if distance is not None:
                terms.setdefault("feature", distance.detach())
                loss = loss + weight * distance
        return {"loss": loss / total, **terms}

    @torch.no_grad()
    def drafts(self, ids: torch.Tensor, first: int, k: int) -> torch.Tensor:
        feature, tokens = self.features(ids[None])[0][:, :-1], ids[None, 1:]
        seen: KeysValues = []
        drafts = []
        for _ in range(k):
            feature = self.next(tokens, feature, seen)
            tokens = self.logits(feature).argmax(-1)
            drafts.append(tokens[0, first:])
        return torch.stack(drafts, 1)

    def _layer_tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return {f"{prefix}.{name}": tensor for name, tensor in self.layer.state_dict().items()}

    def _config(self, architecture: str) -> dict[str, Any]:
        return {**self.base.config.to_dict(), "architectures": [architecture], "num_hidden_layers": 1, "dtype": "bfloat16"}


class Eagle(Chains):
    """EAGLE: the layer takes fc([embedding; feature]) and predicts the next state behind the final norm; the head is the base's.

    Args:
        base: the base.
        noise: features are trained with uniform noise of up to so much of their own spread.
        feature_weight: of the smooth-L1 distance to the base's states, beside 1 for the cross-entropy.
        options: of `Chains`.
    """

    def __init__(self, base: PreTrainedModel, noise: float = 0.1, feature_weight: float = 1.0, **options: Any) -> None:
        super().__init__(base, **options)
        self.noise, self.feature_weight = noise, feature_weight
        self.layer.input_layernorm = nn.Identity()  # type: ignore[assignment]  # as vLLM does
        d = base.config.hidden_size
        self.fc = nn.Linear(2 * d, d, bias=False)
        nn.init.normal_(self.fc.weight, std=base.config.initializer_range)
        with torch.no_grad():
            self.fc.weight[:, d:] += torch.eye(d)  # a chain starts from what it is to end as: the feature

    def mixed(self, embedding: torch.Tensor, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.fc(torch.cat([embedding, feature], -1))
        return x, x

    @torch.no_grad()
    def features(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = self.base.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        return state, state

    def logits(self, feature: torch.Tensor) -> torch.Tensor:
        return self.unembed(feature)

    def feature_loss(self, feature: torch.Tensor, state: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        rows = F.smooth_l1_loss(feature.float(), state.float(), reduction="none").mean(-1)
        return self.feature_weight * (rows * counts).sum() / counts.sum().clamp(min=1)

    def noisy(self, feature: torch.Tensor) -> torch.Tensor:
        return feature + (2 * torch.rand_like(feature) - 1) * self.noise * feature.std()

    def folder_config(self) -> dict[str, Any]:
        return self._config("LlamaForCausalLM")

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"fc.weight": self.fc.weight, **self._layer_tensors("layers.0")}

    def speculative_config(self, folder: Path, k: int) -> dict[str, Any]:
        return {"method": "eagle", "model": str(folder), "num_speculative_tokens": k}


class Eagle3(Chains):
    """EAGLE-3: features are fc of three of the base's inner states, the layer's projections take [embedding; feature], each normed;
    the head is its own.

    Args:
        base: the base, of at least four layers.
        options: of `Chains`.
    """

    def __init__(self, base: PreTrainedModel, **options: Any) -> None:
        super().__init__(base, **options)
        config, d = base.config, base.config.hidden_size
        n = config.num_hidden_layers
        if n < 4:
            raise ValueError(f"EAGLE-3 takes states from three inner layers, and the base has {n} layers")
        # As vLLM counts them: the state that goes into layer i. By itself it takes 2, n / 2 and n - 3, which for n = 4 are 2, 2, 1.
        self.layer_ids = (min(2, n // 2 - 1), n // 2, max(n - 3, n // 2 + 1))
        attention, std = self.layer.self_attn, config.initializer_range
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = nn.Linear(2 * d, getattr(attention, name).out_features, bias=False)
            nn.init.normal_(projection.weight, std=std)
            setattr(attention, name, projection)
        self.hidden_norm, self.norm = (LlamaRMSNorm(d, eps=config.rms_norm_eps) for _ in range(2))
        self.fc, self.lm_head = nn.Linear(3 * d, d, bias=False), nn.Linear(d, config.vocab_size, bias=False)
        nn.init.normal_(self.fc.weight, std=std)
        with torch.no_grad():
            self.lm_head.weight.copy_(base.get_output_embeddings().weight)

    def mixed(self, embedding: torch.Tensor, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([self.layer.input_layernorm(embedding), self.hidden_norm(feature)], -1), feature

    def features(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            out = self.base.get_decoder()(input_ids=input_ids, use_cache=False, output_hidden_states=True)
            inner = torch.cat([out.hidden_states[i] for i in self.layer_ids], -1)
        return self.fc(inner), out.last_hidden_state

    def logits(self, feature: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(feature))

    def folder_config(self) -> dict[str, Any]:
        return {
            **self._config("LlamaForCausalLMEagle3"),
            "tie_word_embeddings": False,
            "draft_vocab_size": self.base.config.vocab_size,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(self.layer_ids), "use_aux_hidden_state": True},
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        own = {"fc": self.fc.weight, "norm": self.norm.weight, "lm_head": self.lm_head.weight}
        own["midlayer.hidden_norm"] = self.hidden_norm.weight
        return {**{f"{name}.weight": weight for name, weight in own.items()}, **self._layer_tensors("midlayer")}

    def speculative_config(self, folder: Path, k: int) -> dict[str, Any]:
        return {"method": "eagle3", "model": str(folder), "num_speculative_tokens": k}
