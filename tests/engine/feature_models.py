"""Small models and LoRA adapters that the tests of vLLM's features make from the demo base or from nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_mtp import demo
from vllm_mtp.adapter import LoRAWeights, base_facts, linear_shapes, write_adapter
from vllm_mtp.config import AdapterConfig
from vllm_mtp.sampler_head import SamplerHead

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def request_lora(folder: Path, seed: int, modules: tuple[str, ...] = LINEAR) -> Path:
    """A PEFT LoRA of random weights for the demo base, strong enough to change what it says."""
    generator = torch.Generator().manual_seed(seed)
    shapes = linear_shapes(demo.BASE)
    assert shapes is not None
    tensors = {}
    for name, (d_out, d_in) in shapes.items():
        if name.rpartition(".")[2] in modules:
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, d_in, generator=generator) * 0.1
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(d_out, 4, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": modules, "bias": "none", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _changed_base(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(demo.BASE, folder)
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stated, **config}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def retrained_base(folder: Path) -> Path:
    """The demo base with another first layer, as a trainer would hand over new weights."""
    tensors = load_file(demo.BASE / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].roll(7, 0)
    return _changed_base(folder, {}, tensors)


def int8_base(folder: Path) -> Path:
    """The demo base in compressed-tensors' W8A8: int8 weights with a scale a channel, activations quantized token by token."""
    tensors = load_file(demo.BASE / "model.safetensors")
    for name in [name for name in tensors if name.removesuffix(".weight").rpartition(".")[2] in LINEAR]:
        weight = tensors[name].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[name.removesuffix("weight") + "weight_scale"] = scale

    def eight_bits(strategy: str, dynamic: bool) -> dict[str, Any]:
        return {"num_bits": 8, "type": "int", "strategy": strategy, "symmetric": True, "dynamic": dynamic}

    group = {"targets": ["Linear"], "weights": eight_bits("channel", False), "input_activations": eight_bits("token", True)}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return _changed_base(folder, {"quantization_config": quantization}, tensors)


def random_model(folder: Path, **config: Any) -> Path:
    """A model of random weights with the demo's tokenizer, as `config` has it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(demo.BASE, folder, ignore=shutil.ignore_patterns("model.safetensors", "config.json", "figures.json"))
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 2048,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**sizes, **config})).save_pretrained(folder)
    return folder


def random_adapter_for(base: Path, folder: Path) -> Path:
    """An adapter of random weights for a base."""
    facts, shapes = base_facts(base), linear_shapes(base)
    assert shapes is not None
    lora = {
        name: LoRAWeights(torch.randn(4, d_in) * 0.1, torch.randn(d_out, 4) * 0.1, 1.0) for name, (d_out, d_in) in shapes.items()
    }
    write_adapter(
        folder,
        AdapterConfig(num_mask_tokens=4, base=facts),
        lora,
        torch.randn(4, facts.hidden_size),
        SamplerHead(facts.hidden_size),
    )
    return folder
