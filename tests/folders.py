"""A base model of three layers and an adapter for it, both with random weights: what adapters are checked against."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_mtp.adapter import LoRAWeights, base_facts, linear_shapes, write_adapter
from vllm_mtp.config import AdapterConfig
from vllm_mtp.sampler_head import SamplerHead

BASE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}


def write_base(folder: Path) -> Path:
    """A base model's config.json and norm weights: all that an adapter is checked against."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(BASE))
    torch.manual_seed(0)
    norms = [f"model.layers.{i}.{name}.weight" for i in range(3) for name in ("input_layernorm", "post_attention_layernorm")]
    save_file({name: torch.rand(16) for name in [*norms, "model.norm.weight"]}, folder / "model.safetensors")
    return folder


def write_small_adapter(folder: Path, base: Path) -> Path:
    """An adapter with four mask tokens for `base`."""
    config = AdapterConfig(num_mask_tokens=4, base=base_facts(base, "some/base"), training={"steps": 3})
    shapes = linear_shapes(base)
    assert shapes is not None
    lora = {name: LoRAWeights(torch.randn(2, d_in), torch.randn(d_out, 2), 0.5) for name, (d_out, d_in) in shapes.items()}
    write_adapter(folder, config, lora, torch.randn(4, 16), SamplerHead(16))
    return folder
