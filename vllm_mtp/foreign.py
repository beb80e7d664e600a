"""Weights that other projects trained to draft for themselves, read as adapters.

full checkpoint
    *Multi-Token Prediction via Self-Distillation* (arXiv 2602.06019): the target itself was fine-tuned. There is no LoRA, no
    sampler head and no file beside the model; every mask row is one token of the vocabulary, `mask_token_id`.
LoRA for noise rows
    UNO: a PEFT folder, `adapter_config.json` and `adapter_model.safetensors`, of a LoRA that acts on the rows behind the last
    token. Those rows are tokens drawn uniformly from 1 .. mask_token_id - 1, and there is no sampler head. They are drawn once
    here.

Both predict in the place that mask rows of ours do: the row at position p says token p + 1, and the first token comes from the last
real row. The files do not say which token it is, so whoever serves them does. Full checkpoints that were trained here have the
file `TRAINING_FILE` besides, for people to read: `inspect` shows it.
"""

import os
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_mtp.adapter import Adapter, AdapterError, base_facts, is_adapter, linear_shapes, load_lora, read_adapter, read_config
from vllm_mtp.base_model import weight_files
from vllm_mtp.config import MAX_MASK_TOKENS, AdapterConfig, ServingOptions
from vllm_mtp.peft_format import CONFIG_FILE as PEFT_CONFIG_FILE
from vllm_mtp.peft_format import WEIGHTS_FILE as PEFT_WEIGHTS_FILE
from vllm_mtp.peft_format import LoRASpec, lora_tensor_shapes, modules_in, prefix_of, read_lora_specs
from vllm_mtp.safe_files import check_folder, check_tensors, read_header, read_json_object

Kind = Literal["full checkpoint", "LoRA for noise rows"]
FULL: Kind = "full checkpoint"
NOISE: Kind = "LoRA for noise rows"
TRAINING_FILE = "mtp_training.json"
"""Of a full checkpoint trained here: `mask_token_id`, `num_mask_tokens`, facts of its `base`, `training` as adapters have it."""


def kind_of(path: str | Path) -> Kind | None:
    """What kind of foreign weights a folder holds, by the files that it has; None: it is an adapter of ours, or no such folder.
    Never raises."""
    folder = Path(path)
    try:
        if is_adapter(folder):
            return None
        if os.path.lexists(folder / PEFT_CONFIG_FILE):
            return NOISE
        return FULL if (folder / "config.json").is_file() else None
    except (OSError, ValueError):  # a name with a null byte
        return None


def noise_tokens(mask_token_id: int) -> tuple[int, ...]:
    """The tokens of noise rows 1, 2, ..: the same ones in every step and on every rank."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(1, mask_token_id, (MAX_MASK_TOKENS,), generator=generator).tolist())


def check_checkpoint(folder: Path) -> None:
    """Refuse a full checkpoint that could not be read without running code of its own.

    Raises:
        AdapterError: it has pickled weights, links that lead out, or damaged or no safetensors.
    """
    check_folder(folder)
    files = weight_files(folder)
    if not files:
        raise AdapterError(f"{folder} has no safetensors: convert its weights to safetensors.")
    if "quantization_config" not in read_json_object(folder / "config.json"):  # those have other dtypes
        for file in files:
            read_header(file)


def check_noise_lora(folder: Path, base: Any) -> tuple[dict[str, LoRASpec], str]:
    """Rank and scale of every module of a LoRA for noise rows, and what stands before the modules' names in its file.

    Args:
        folder: its folder.
        base: the base model, as `linear_shapes` takes it; None: modules are those that the file names.

    Raises:
        AdapterError: the folder cannot be used.
    """
    check_folder(folder)
    path = folder / PEFT_WEIGHTS_FILE
    header = read_header(path)
    shapes = linear_shapes(base) if base is not None else None
    if shapes is not None:
        modules = list(shapes)
    else:
        layers = [int(part) for name in header for part in name.split(".") if part.isdecimal() and len(part) < 4]
        modules = modules_in(path, header, max(layers, default=0) + 1)
    specs, prefix = read_lora_specs(folder, modules), prefix_of(header)
    remedy = f"{PEFT_CONFIG_FILE} and the base model decide what must be there; download the adapter again"
    check_tensors(path, header, lora_tensor_shapes(specs, shapes, prefix), remedy)
    return specs, prefix


def check_mask_token(kind: Kind, mask_token_id: int, vocab_size: int) -> None:
    """Raise AdapterError when rows cannot be embedded as `mask_token_id` says."""
    low, high = (0, vocab_size - 1) if kind == FULL else (2, vocab_size)
    if not low <= mask_token_id <= high:
        raise AdapterError(
            f"mask_token_id is {mask_token_id}, and for a {kind} it is a number from {low} to {high} of the base's {vocab_size} "
            "tokens: give the one that the weights were trained with."
        )


def check_foreign(path: str | Path, base: Any, k: int, mask_token_id: int) -> AdapterConfig:
    """Every check of foreign weights but the one for NaN; what a configuration of ours would say of them.

    Args:
        path: the folder; a full checkpoint's may be a name on the hub, and then vLLM reads it.
        base: the target: a folder, a transformers configuration, or its dictionary.
        k: mask tokens.
        mask_token_id: as `ServingOptions` has it.

    Raises:
        AdapterError: they cannot be used.
    """
    kind = kind_of(path) or FULL
    if kind == NOISE:
        check_noise_lora(Path(path), base)
    elif Path(path).is_dir():
        check_checkpoint(Path(path))
    facts = base_facts(base)
    check_mask_token(kind, mask_token_id, facts.vocab_size)
    return AdapterConfig(num_mask_tokens=k, base=facts, sampler=None)


def read_foreign(path: str | Path, base: Any, k: int, mask_token_id: int) -> Adapter:
    """Check and load foreign weights; arguments and errors as `check_foreign`'s."""
    config = check_foreign(path, base, k, mask_token_id)
    no_embeddings = torch.empty(0, config.base.hidden_size)
    if kind_of(path) != NOISE:
        return Adapter(config, {}, no_embeddings, None, (mask_token_id,) * k)
    specs, prefix = check_noise_lora(Path(path), base)
    return Adapter(config, load_lora(Path(path), specs, prefix), no_embeddings, None, noise_tokens(mask_token_id)[:k])


def longest_group(options: ServingOptions) -> int:
    """Mask tokens of a group at most: as many as the adapter has, where more drafts than those may be looked up."""
    k = options.num_speculative_tokens
    return k if options.mask_token_id is not None else min(k, read_config(options.adapter).num_mask_tokens)


def read_served(options: ServingOptions, base: Any) -> Adapter:
    """The adapter, of whatever kind, that a server was started with.

    Args:
        options: the operator's, checked.
        base: the target's configuration of transformers.
    """
    if options.mask_token_id is None:
        return read_adapter(options.adapter)
    return read_foreign(options.adapter, base, options.num_speculative_tokens, options.mask_token_id)
