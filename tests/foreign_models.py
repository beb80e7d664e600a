"""Weights in exactly the layouts in which other projects release theirs, with random numbers."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_mtp.adapter import linear_shapes

PADDING = 128
CODE = "raise RuntimeError('code of a checkpoint was run')\n"


def mask_token(base: Path) -> int:
    """The mask token of `full_checkpoint(base)`."""
    return json.loads((base / "config.json").read_text())["vocab_size"] + 1


def full_checkpoint(base: Path, folder: Path) -> Path:
    """An `mtp-lm` checkpoint: the base, its vocabulary padded for a mask token in a slot that its tokenizer does not know, and a
    class of its own for transformers, which is code."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("figures.json"))
    config = json.loads((base / "config.json").read_text())
    config |= {
        "vocab_size": config["vocab_size"] + PADDING,
        "auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_llama.py").write_text(CODE)
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            rows = torch.randn(PADDING, tensors[name].shape[1], generator=generator)
            tensors[name] = torch.cat([tensors[name], (rows * tensors[name].float().std()).to(tensors[name].dtype)])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def noise_lora(base: Path, folder: Path, *, prefix: str = "", rank: int = 8) -> Path:
    """An UNO adapter: a PEFT LoRA in float32 on all seven linears, alpha twice the rank, and no other file.

    Args:
        base: the model that it is for.
        folder: where to.
        prefix: in front of modules' names; PEFT's is `base_model.model.`.
        rank: of all of it.
    """
    folder.mkdir(parents=True)
    shapes = linear_shapes(base)
    assert shapes is not None
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, (d_out, d_in) in shapes.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) * 0.1
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/some-base",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
