"""Tiny random models of every architecture that is supported, with the sizes in which they differ from a Llama."""

from dataclasses import dataclass, field
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
WINDOWED = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 32}


@dataclass(frozen=True)
class Architecture:
    """A configuration of transformers, and the last names of the modules that the LoRA sits on."""

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = DENSE

    @property
    def config(self) -> dict[str, Any]:
        """For `feature_models.random_model`."""
        return {"model_type": self.model_type, **self.options}


EXPERTS = {"num_experts_per_tok": 2}
ARCHITECTURES = {
    "llama": Architecture("llama"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "mistral": Architecture("mistral", {"sliding_window": 24}),
    "gemma2": Architecture("gemma2", {**WINDOWED, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0}),
    "gemma3": Architecture("gemma3_text", WINDOWED),
    "phi3": Architecture("phi3", {"pad_token_id": 1}, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "olmo2": Architecture("olmo2"),
    "mixtral": Architecture("mixtral", {**EXPERTS, "num_local_experts": 4}, ATTENTION),
    "qwen3_moe": Architecture("qwen3_moe", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 64}, ATTENTION),
    "qwen2_moe": Architecture(
        "qwen2_moe",
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    ),
}
