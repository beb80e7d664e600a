"""From a model in training to an adapter folder."""

import copy
from pathlib import Path

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer

from vllm_mtp.adapter import LoRAWeights, base_facts, write_adapter
from vllm_mtp.config import AdapterConfig, SamplerConfig
from vllm_mtp.train.model import MaskedModel


def lora_weights(model: MaskedModel, dtype: torch.dtype) -> dict[str, LoRAWeights]:
    """Module path in the base -> its LoRA."""
    weights, parameters = {}, dict(model.student.named_parameters())
    for name, layer in model.student.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (parameters[f"{name}.lora_{x}.default.weight"].detach().to(dtype) for x in "AB")
            weights[name.removeprefix("base_model.model.")] = LoRAWeights(a, b, layer.scaling["default"])
    return weights


def export(model: MaskedModel, folder: Path, figures: dict[str, object]) -> Path:
    """Write an adapter folder from the model as it stands, in bfloat16; returns the folder.

    Args:
        model: base and adapter; its options name the base and enter the provenance.
        folder: where to; an adapter that is there is replaced.
        figures: further provenance, for example losses and tokens per forward.
    """
    config, dtype = model.options, torch.bfloat16
    versions = {package.__name__: package.__version__ for package in (torch, transformers, peft)}
    options = config.model_dump(mode="json", exclude={"base", "base_name", "data", "output", "eval_data"})
    adapter = AdapterConfig(
        num_mask_tokens=config.mask_tokens,
        base=base_facts(config.base, config.base_name),
        sampler=SamplerConfig(residual=config.sampler_residual) if config.sampler else None,
        training={"options": options, "versions": versions, **figures},
    )
    sampler = copy.deepcopy(model.sampler).to(dtype) if model.sampler is not None else None
    write_adapter(folder, adapter, lora_weights(model, dtype), model.mask_embeddings.to(dtype), sampler)
    return folder
