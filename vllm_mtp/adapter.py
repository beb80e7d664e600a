"""Read, check and write an adapter folder; weights of other projects are read in `foreign`.

    config.json                 AdapterConfig: base model, k, sampler, provenance; and `speculators_format`
    adapter_config.json         as PEFT writes them
    adapter_model.safetensors
    mtp.safetensors             mask_embeddings [k, d]; the sampler head's parameters under `sampler.`

Names, shapes, dtypes and file sizes are checked on headers; tensors are loaded after that, and nothing is ever unpickled.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from vllm_mtp.base_model import base_facts, check_facts, fingerprint_folder, fingerprint_tensors, linear_shapes
from vllm_mtp.config import AdapterConfig
from vllm_mtp.peft_format import CONFIG_FILE as PEFT_CONFIG_FILE
from vllm_mtp.peft_format import PREFIX, LoRASpec, lora_names, lora_tensor_shapes, modules_in, peft_config, read_lora_specs
from vllm_mtp.peft_format import WEIGHTS_FILE as PEFT_WEIGHTS_FILE
from vllm_mtp.safe_files import AdapterError, Shape, check_folder, check_tensors, load_tensors, read_header, read_json_object
from vllm_mtp.sampler_head import SamplerHead
from vllm_mtp.whole_files import whole_folder

__all__ = [
    "Adapter",
    "AdapterError",
    "LoRAWeights",
    "base_facts",
    "check_base",
    "fingerprint_folder",
    "fingerprint_tensors",
    "is_adapter",
    "linear_shapes",
    "load_lora",
    "read_adapter",
    "read_config",
    "validate_folder",
    "write_adapter",
]

CONFIG_FILE, MTP_FILE = "config.json", "mtp.safetensors"
METHOD = "mtp"
"""The speculative method that an adapter is served with."""
SAMPLER_PREFIX = "sampler."
SPECULATORS_KEYS = ("speculators_model_type", "speculators_config", "transformer_layer_config")


@dataclass(frozen=True)
class LoRAWeights:
    """One module's LoRA: y += scale * (x @ a.T) @ b.T, with a [r, in] and b [out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter; tensors are on the CPU, in the dtypes of their files.

    Attributes:
        config: what it says of itself.
        lora: by module path, for example `model.layers.0.self_attn.q_proj`.
        mask_embeddings: [k, d]; [0, d] where mask rows are embedded as tokens of the base's vocabulary.
        sampler: the sampler head, if there is one.
        mask_token_ids: those k tokens.
    """

    config: AdapterConfig
    lora: dict[str, LoRAWeights]
    mask_embeddings: torch.Tensor
    sampler: SamplerHead | None
    mask_token_ids: tuple[int, ...] = ()

    def embeddings(self, embed: Callable[[torch.Tensor], torch.Tensor], k: int, device: torch.device) -> torch.Tensor:
        """What mask rows 1 .. k enter the first layer with, [k, d].

        Args:
            embed: the base's embedding, [n] -> [n, d].
            k: at most the adapter's number of mask tokens.
            device: of the base.
        """
        if self.mask_token_ids:
            return embed(torch.tensor(self.mask_token_ids[:k], device=device)).detach()
        return self.mask_embeddings[:k].to(device)


def is_adapter(path: str | Path) -> bool:
    """Whether `path` is a folder whose config.json has our model type, or has a file of ours beside one that cannot be read, which
    reading the adapter says more about. Never raises."""
    try:
        return read_json_object(Path(path) / CONFIG_FILE).get("model_type") == "vllm_mtp"
    except (AdapterError, ValueError):  # a name with a null byte is a ValueError
        return os.path.lexists(Path(path) / MTP_FILE)


def speculators_format(config: AdapterConfig, drafts: int | None = None) -> dict[str, Any]:
    """What stands in config.json besides, by which `vllm serve ADAPTER` finds the base model and our method (vLLM:
    transformers_utils/config.py, maybe_override_with_speculators).

    Args:
        config: the adapter's.
        drafts: that it is served with then; None: as many as it says for its users, else as it has mask tokens.
    """
    if drafts is None and config.serving is not None:
        drafts = config.serving.num_speculative_tokens
    return {
        "speculators_model_type": METHOD,
        "speculators_config": {
            "algorithm": METHOD,
            "proposal_methods": [{"proposal_type": METHOD, "speculative_tokens": drafts or config.num_mask_tokens}],
            "verifier": {"name_or_path": config.base.name_or_path, "architectures": []},
        },
        "transformer_layer_config": {},
    }


def read_config(path: str | Path) -> AdapterConfig:
    """The folder's config.json; AdapterError names the first key that is unknown or wrong."""
    file = Path(path) / CONFIG_FILE
    values = read_json_object(file)
    if values.get("model_type") != "vllm_mtp":
        found = values.get("model_type")
        raise AdapterError(f"{file}: model_type is {found!r}, expected 'vllm_mtp': it is no adapter; name an adapter's folder.")
    said = {key: values.pop(key) for key in SPECULATORS_KEYS if key in values}
    try:
        config = AdapterConfig.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the object"
        found = "" if first["type"] in ("missing", "extra_forbidden") else f", found {first['input']!r}"
        remedy = "update vllm-mtp if the adapter is newer, or write the adapter again"
        raise AdapterError(f"{file}: {key}: {first['msg']}{found}; {remedy}.") from None
    if said and said != (expected := speculators_format(config, _drafts_of(said, config.num_mask_tokens))):
        key = next(key for key in SPECULATORS_KEYS if said.get(key) != expected[key])
        raise AdapterError(
            f"{file}: {key} is {said.get(key)!r}, and the rest of the file says {expected[key]!r}: write the adapter again, or "
            f"remove {', '.join(SPECULATORS_KEYS)}."
        )
    return config


def _drafts_of(said: dict[str, Any], most: int) -> int | None:
    """How many drafts keys in the speculators format ask for, None if that is no number from 1 to `most`."""
    try:
        drafts = said["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    except (KeyError, IndexError, TypeError):
        return None
    return drafts if type(drafts) is int and 1 <= drafts <= most else None


def check_base(config: AdapterConfig, base: Any, fingerprint: str | None = None) -> None:
    """Raise AdapterError, naming both values, when `base` is not the base model that the adapter was trained on.

    Args:
        config: the adapter's configuration.
        base: a model folder, a transformers configuration, or its dictionary.
        fingerprint: `fingerprint_tensors` of the loaded base, where `base` is not a folder; None leaves that check out.
    """
    found = base_facts(base)
    if found.fingerprint is None and fingerprint is not None:
        found = found.model_copy(update={"fingerprint": fingerprint})
    check_facts(config.base, found)


def _mtp_shapes(config: AdapterConfig) -> dict[str, Shape]:
    """The tensors that mtp.safetensors must have."""
    shapes: dict[str, Shape] = {"mask_embeddings": (config.num_mask_tokens, config.base.hidden_size)}
    if config.sampler is not None:
        with torch.device("meta"):
            head = SamplerHead(config.base.hidden_size, config.sampler.residual)
        shapes |= {SAMPLER_PREFIX + name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    return shapes


def _check_files(folder: Path, expected_shapes: dict[str, tuple[int, int]] | None) -> tuple[AdapterConfig, dict[str, LoRASpec]]:
    """Everything that can be checked without loading a tensor."""
    config = read_config(folder)
    check_folder(folder)
    path = folder / PEFT_WEIGHTS_FILE
    header = read_header(path)
    modules = list(expected_shapes) if expected_shapes is not None else modules_in(path, header, config.base.num_hidden_layers)
    specs = read_lora_specs(folder, modules)
    remedy = f"{PEFT_CONFIG_FILE} and the base model decide what must be there; write the adapter again"
    check_tensors(path, header, lora_tensor_shapes(specs, expected_shapes), remedy)
    path = folder / MTP_FILE
    remedy = f"{CONFIG_FILE} decides what must be there; write the adapter again"
    check_tensors(path, read_header(path), _mtp_shapes(config), remedy)
    return config, specs


def validate_folder(path: str | Path, base: Any = None) -> AdapterConfig:
    """Every check but the one for NaN, without loading an adapter tensor: quick enough for configuration time.

    Args:
        path: the adapter's folder.
        base: the base model, checked against the adapter: a transformers configuration, or a folder where it is a local one.
    """
    if isinstance(base, str | Path) and not (Path(base) / "config.json").is_file():
        base = None
    if base is not None:
        check_base(read_config(path), base)
    return _check_files(Path(path), linear_shapes(base) if base is not None else None)[0]


def read_adapter(path: str | Path, expected_shapes: dict[str, tuple[int, int]] | None = None) -> Adapter:
    """Check and load an adapter folder.

    Args:
        path: the folder.
        expected_shapes: module path -> weight shape (out, in) of the base's linear layers, as `linear_shapes` gives them.
            None: only the ranks are checked.

    Raises:
        AdapterError: the folder cannot be used; the message says why and what to do.
    """
    folder = Path(path)
    config, specs = _check_files(folder, expected_shapes)
    lora = load_lora(folder, specs)
    mtp = load_tensors(folder / MTP_FILE, _mtp_shapes(config))
    sampler = None
    if config.sampler is not None:
        with torch.device("meta"):
            sampler = SamplerHead(config.base.hidden_size, config.sampler.residual)
        state = {name.removeprefix(SAMPLER_PREFIX): tensor for name, tensor in mtp.items() if name.startswith(SAMPLER_PREFIX)}
        sampler.load_state_dict(state, assign=True)
        sampler.requires_grad_(False)
    return Adapter(config, lora, mtp["mask_embeddings"], sampler)


def load_lora(folder: Path, specs: dict[str, LoRASpec], prefix: str = PREFIX) -> dict[str, LoRAWeights]:
    """The LoRA of a folder whose headers have been checked; AdapterError on NaN and infinity."""
    weights = load_tensors(folder / PEFT_WEIGHTS_FILE, [name for module in specs for name in lora_names(module, prefix)])
    lora = {}
    for module, spec in specs.items():
        name_a, name_b = lora_names(module, prefix)
        lora[module] = LoRAWeights(weights[name_a], weights[name_b], spec.scale)
    return lora


def write_adapter(
    folder: str | Path,
    config: AdapterConfig,
    lora: Any,
    mask_embeddings: torch.Tensor,
    sampler: SamplerHead | None,
) -> None:
    """Write an adapter folder so that a killed writer never leaves half of one: a checked temporary folder is renamed.

    Args:
        folder: where to; an adapter that is there is replaced, any other non-empty folder is an error.
        config: its configuration.
        lora: a PEFT model with one LoRA adapter named `default`, or module path -> LoRAWeights.
        mask_embeddings: [k, d].
        sampler: the sampler head, where `config.sampler` says that there is one.

    Raises:
        AdapterError: what was to be written could not be read again; nothing is left behind.
        FileExistsError: the folder holds something else.
        OSError: it cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    if folder.exists() and not is_adapter(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an adapter: choose another folder.")
    with whole_folder(folder) as part:
        _write_lora(part, lora, config.base.name_or_path)
        tensors = {"mask_embeddings": mask_embeddings}
        if sampler is not None:
            tensors |= {SAMPLER_PREFIX + name: tensor for name, tensor in sampler.state_dict().items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, part / MTP_FILE, {"format": "pt"})
        values = {**json.loads(config.model_dump_json()), **speculators_format(config)}
        (part / CONFIG_FILE).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        read_adapter(part)


def _write_lora(folder: Path, lora: Any, base_name: str) -> None:
    """PEFT's two files; the base is named as users find it, not by the path it was trained from."""
    if isinstance(lora, Mapping):
        tensors, specs = {}, {}
        for module, weights in lora.items():
            name_a, name_b = lora_names(module)
            tensors[name_a], tensors[name_b] = weights.a.detach().cpu().contiguous(), weights.b.detach().cpu().contiguous()
            specs[module] = LoRASpec(weights.a.shape[0], weights.scale)
        if not specs:
            raise AdapterError("An adapter without a LoRA module cannot be written: give at least one.")
        save_file(tensors, folder / PEFT_WEIGHTS_FILE, {"format": "pt"})
        settings = peft_config(specs, base_name)
    else:
        lora.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        settings = {**read_json_object(folder / PEFT_CONFIG_FILE), "base_model_name_or_path": base_name}
        targets = settings["target_modules"]
        if isinstance(targets, list):
            settings["target_modules"] = sorted(targets)  # PEFT's set has another order in every run
    (folder / PEFT_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
