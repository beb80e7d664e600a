"""Facts about a base model, read from its folder without loading it: sizes, shapes of its linear layers, and a fingerprint."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from vllm_mtp.causal_lm import linears
from vllm_mtp.config import BaseFacts
from vllm_mtp.safe_files import AdapterError, read_json_object

_FINGERPRINTED = re.compile(r"model\.norm\.weight|model\.layers\.\d+\.(input|post_attention)_layernorm\.weight")

_BESIDE_SIZES = frozenset({"_name_or_path", "auto_map", "quantization_config", "transformers_version", "dtype", "torch_dtype"})
"""Keys of a configuration that say nothing of its layers' shapes."""


def _config_dict(base: Any) -> dict[str, Any]:
    """The base's configuration as a flat dictionary; of a multi-modal model the text part, under the whole model's type."""
    if isinstance(base, str | Path):
        config: dict[str, Any] = read_json_object(Path(base) / "config.json", any_link=True)
    elif isinstance(base, Mapping):
        config = dict(base)
    else:
        config = base.to_dict()
    text = config.get("text_config")
    return {**config, **text, "model_type": config.get("model_type")} if isinstance(text, dict) else config


def base_facts(base: Any, name: str | None = None) -> BaseFacts:
    """What an adapter must remember of its base.

    Args:
        base: a model folder, a transformers configuration, or its dictionary. Only a folder has a fingerprint.
        name: how users find the base, for example `Qwen/Qwen3-8B`; the folder's own path when it is left out.

    Raises:
        AdapterError: the configuration lacks a size that an adapter depends on.
    """
    config = _config_dict(base)
    folder = Path(base) if isinstance(base, str | Path) else None
    missing = [key for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size") if not config.get(key)]
    if missing:
        raise AdapterError(f"config.json of base model {base} has no {missing[0]}: only causal language models can be a base.")
    try:
        return BaseFacts(
            name_or_path=name or (str(base) if folder else str(config.get("_name_or_path") or "unknown")),
            model_type=config["model_type"],
            hidden_size=config["hidden_size"],
            num_hidden_layers=config["num_hidden_layers"],
            vocab_size=config["vocab_size"],
            fingerprint=fingerprint_folder(folder) if folder else None,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise AdapterError(
            f"config.json of base model {base}: {first['loc'][0]}: {first['msg']}, found {first['input']!r}: "
            "download the base again."
        ) from None


def linear_shapes(base: Any) -> dict[str, tuple[int, int]] | None:
    """Module path -> weight shape (out, in) of the linear layers that a LoRA can sit on, of every decoder layer
    (`causal_lm.linears`).

    The model is built without weights. None where transformers does not know it, and for multimodal models.

    Args:
        base: a model folder, a transformers configuration, or its dictionary.
    """
    config = _config_dict(base)
    sizes = {key: value for key, value in config.items() if key not in _BESIDE_SIZES}
    shapes = None if "text_config" in config else _linear_shapes(json.dumps(sizes, sort_keys=True, default=str))
    return shapes and dict(shapes)


@lru_cache(maxsize=8)
def _linear_shapes(config: str) -> dict[str, tuple[int, int]] | None:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = json.loads(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
        return {name: (layer.out_features, layer.in_features) for name, layer in linears(model).items()}
    except Exception:  # whatever a constructor of transformers makes of a configuration that is not for it
        return None


def is_fingerprinted(name: str) -> bool:
    """Whether the parameter of this name enters the fingerprint: the final norm and the two norms of every layer."""
    return _FINGERPRINTED.fullmatch(name) is not None


def fingerprint_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """SHA-256 over names and bfloat16 bytes of the norm weights among `named`, in order of name; None when there is none.

    Norm weights are small, never quantized and never split over devices, and every training moves them. Loading a base in
    bfloat16 or float32 does not change the result; float16 can, where it rounds a float32 checkpoint a second time.
    """
    tensors = {name: tensor for name, tensor in named if is_fingerprinted(name)}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        raw = tensors[name].detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
        digest.update(name.encode() + b"\0" + bytes(raw.tolist()))
    return digest.hexdigest() if tensors else None


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: those its index names, else all. AdapterError when the index names one elsewhere."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        names = [Path(name) for name in sorted(set(index["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return sorted(folder.glob("*.safetensors"))
    for name in names:
        if name.is_absolute() or ".." in name.parts:
            raise AdapterError(f"{folder} has an index that names {name}, a file outside of the folder: download the base again.")
    return [folder / name for name in names]


def fingerprint_folder(folder: str | Path) -> str | None:
    """`fingerprint_tensors` of a model folder; only the norms are read. None when it has no safetensors, or no such norms."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(Path(folder)):
        try:
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys() if is_fingerprinted(name)}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{path} of the base model cannot be read ({error}): download the base again.") from None
    return fingerprint_tensors(tensors.items())


def check_facts(expected: BaseFacts, found: BaseFacts) -> None:
    """Raise AdapterError naming both values at the first fact in which the base model found differs from the one trained on."""
    remedy = f"load the adapter beside {expected.name_or_path}, or train one for {found.name_or_path}"
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "fingerprint"):
        want, have = getattr(expected, key), getattr(found, key)
        if key == "fingerprint" and None in (want, have):
            continue
        if want != have:
            raise AdapterError(
                f"The adapter is for another base model: {key} is {have} here and {want} in the adapter's config.json; {remedy}."
            )
