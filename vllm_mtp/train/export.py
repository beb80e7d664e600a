"""From a model in training to an adapter folder, and back; or to a full checkpoint, a model that drafts for itself."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from vllm_mtp.adapter import Adapter, LoRAWeights, base_facts, check_base, read_adapter, write_adapter
from vllm_mtp.config import MAX_MASK_TOKENS, AdapterConfig, SamplerConfig, ServingDefaults
from vllm_mtp.foreign import TRAINING_FILE, check_checkpoint
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.model import MaskedModel
from vllm_mtp.train.self_distill import FullStudent
from vllm_mtp.whole_files import whole_folder


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
    adapter = AdapterConfig(
        num_mask_tokens=config.mask_tokens,
        base=base_facts(config.base, config.base_name),
        sampler=SamplerConfig(residual=config.sampler_residual) if config.sampler else None,
        # Mask rows have learned to look back so far. A server's longest request may be many times that.
        serving=ServingDefaults(mask_window=max(MAX_MASK_TOKENS, config.length)),
        training=_provenance(config, figures),
    )
    sampler = copy.deepcopy(model.sampler).to(dtype) if model.sampler is not None else None
    write_adapter(folder, adapter, lora_weights(model, dtype), model.mask_embeddings.to(dtype), sampler)
    return folder


def _provenance(config: TrainConfig, figures: dict[str, object]) -> dict[str, object]:
    options = config.model_dump(mode="json", exclude={"base", "base_name", "data", "output", "eval_data"})
    versions = {package.__name__: package.__version__ for package in (torch, transformers, peft)}
    return {"options": options, "versions": versions, **figures}


def export_checkpoint(model: FullStudent, tokenizer: PreTrainedTokenizerBase, folder: Path, figures: dict[str, object]) -> Path:
    """Write the folder of a model that was trained whole, in the dtype of its base, as `foreign.read_foreign` reads it.

    Beside the model stands `foreign.TRAINING_FILE`, which says what its other files do not: the mask token and how it was trained.

    Args:
        model: as it stands.
        tokenizer: the base's.
        folder: where to; a folder that was written so is replaced.
        figures: as `export`'s.

    Raises:
        FileExistsError: the folder holds something else.
        OSError: it cannot be written; nothing is left behind.
    """
    if folder.exists() and not (folder / TRAINING_FILE).is_file() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and was not written by training: choose another folder.")
    config = model.options
    trained = {
        "mask_token_id": model.mask_token_id,
        "num_mask_tokens": config.mask_tokens,
        "base": base_facts(config.base, config.base_name).model_dump(),
        "training": _provenance(config, figures),
    }
    dtype = AutoConfig.from_pretrained(config.base).dtype or torch.bfloat16
    with whole_folder(folder) as part:
        whole: Any = copy.deepcopy(model.base)
        whole.to(dtype).save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / TRAINING_FILE).write_text(json.dumps(trained, indent=2) + "\n", encoding="utf-8")
        check_checkpoint(part)
    return folder


@torch.no_grad()
def from_adapter(base: Path, folder: Path) -> MaskedModel:
    """The model in training as an adapter folder left it, in float32; AdapterError where the base is another one."""
    adapter = read_adapter(folder)
    check_base(adapter.config, base)
    rank = max(weights.a.shape[0] for weights in adapter.lora.values())
    config = TrainConfig(
        base=base,
        data=(folder,),
        output=folder,
        mask_tokens=adapter.config.num_mask_tokens,
        rank=rank,
        alpha=rank,  # the scale goes into B
        sampler=adapter.sampler is not None,
        sampler_residual=adapter.config.sampler is None or adapter.config.sampler.residual,
    )
    model = MaskedModel(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    load_adapter(model, adapter)
    return model


@torch.no_grad()
def load_adapter(model: MaskedModel, adapter: Adapter) -> None:
    """Sets what is trained to an adapter's weights; where a tensor of the model is larger, zeros stand behind them.

    Raises:
        ValueError: the adapter has other modules, more mask tokens or larger tensors than the model.
    """
    own = {name: torch.zeros_like(tensor) for name, tensor in model.trainable().items()}
    prefix = "student.base_model.model."
    scales = {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        for name, layer in model.student.named_modules()
        if isinstance(layer, LoraLayer)
    }
    given = {"mask_embeddings": adapter.mask_embeddings}
    for name, weights in adapter.lora.items():
        b = weights.b * (weights.scale / scales.get(name, 1.0))
        given |= {f"{prefix}{name}.lora_{x}.default.weight": tensor for x, tensor in (("A", weights.a), ("B", b))}
    if adapter.sampler is not None:
        given |= {f"sampler.{name}": tensor for name, tensor in adapter.sampler.state_dict().items()}
    for name, tensor in given.items():
        if name not in own or any(had > has for had, has in zip(tensor.shape, own[name].shape, strict=True)):
            raise ValueError(f"the adapter to start from does not fit: {name} is {tuple(tensor.shape)} there")
        own[name][tuple(map(slice, tensor.shape))] = tensor.to(own[name].dtype)
    model.load_trainable(own)
