"""PEFT's LoRA folder: the options that can be honoured, and the names, ranks and scales that follow from them.

Read without PEFT, so that a server does not need it. Follows `peft/tuners/lora` of PEFT 0.19 to 0.21.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_mtp.safe_files import AdapterError, Shape, read_json_object

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_TENSOR = re.compile(r"(.+)\.lora_[AB]\.weight")
_MODULE = re.compile(r"((?:[A-Za-z_]\w*\.)+)(\d+)((?:\.[A-Za-z_]\w*)+)")
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "bias",
}
# Said of training or of PEFT's own loading; no effect on y = W x + scale B A x.
_WITHOUT_EFFECT = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
}
# These change the base's weights at the start of training, so that A and B alone do not give the trained model.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MAX_RANK = 4096
_MAX_KINDS = 64  # of modules in a layer; a stranger's list must not make us allocate without end


@dataclass(frozen=True)
class LoRASpec:
    """Rank and scale of one module's LoRA, as `adapter_config.json` sets them."""

    rank: int
    scale: float


def lora_names(module: str, prefix: str = PREFIX) -> tuple[str, str]:
    """PEFT's names of A and B of the module at this path."""
    return f"{prefix}{module}.lora_A.weight", f"{prefix}{module}.lora_B.weight"


def prefix_of(names: Iterable[str]) -> str:
    """What stands before module paths in the names of a file's tensors: PEFT's prefix, or nothing where someone took it off."""
    return PREFIX if any(name.startswith(PREFIX) for name in names) else ""


def _number(path: Path, key: str, value: object, *, whole: bool) -> float:
    kind = int if whole else int | float
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value <= (_MAX_RANK if whole else 1e6):
        what = f"a whole number from 1 to {_MAX_RANK}" if whole else "a positive number"
        raise AdapterError(f"{path}: {key} is {value!r}, expected {what}: write the adapter again.")
    return value


def _pattern(path: Path, key: str, value: object) -> dict[str, object]:
    """A rank or alpha pattern with plain names as keys; PEFT reads them as regular expressions."""
    pattern = {} if value is None else value
    if not isinstance(pattern, dict) or not all(re.fullmatch(r"[\w.]+", name) for name in pattern):
        raise AdapterError(
            f"{path}: {key} is {value!r}, expected an object with module names as keys: write regular expressions out."
        )
    return pattern


def _names(module: str) -> list[str]:
    """What a module can be called: its path, and the path's ends that begin after a dot."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _entries(pattern: dict[str, object], modules: list[str], default: object) -> dict[str, object]:
    """Module -> the value of the first name in `pattern` that fits it. Looked up, not searched: strangers write long patterns."""
    place = {name: i for i, name in enumerate(pattern)}
    entries = {}
    for module in modules:
        fitting = [name for name in _names(module) if name in place]
        entries[module] = pattern[min(fitting, key=place.__getitem__)] if fitting else default
    return entries


def modules_in(path: Path, names: Iterable[str], num_layers: int) -> list[str]:
    """Modules that an adapter may be for, as its own tensors name them: each kind of module that some layer has, in every layer.

    Args:
        path: of the file, for messages.
        names: of its tensors.
        num_layers: decoder layers of the base model.

    Raises:
        AdapterError: the names are those of no adapter.
    """
    kinds: dict[tuple[str, str], None] = {}
    for name in names:
        tensor = _TENSOR.fullmatch(name.removeprefix(PREFIX))
        module = tensor and _MODULE.fullmatch(tensor[1])
        if module:
            kinds[module[1], module[3]] = None
    if len(kinds) > _MAX_KINDS:
        raise AdapterError(
            f"{path} names {len(kinds)} kinds of modules, at most {_MAX_KINDS} are expected: it is no LoRA of a model."
        )
    return [f"{before}{i}{after}" for i in range(num_layers) for before, after in kinds]


def read_lora_specs(folder: Path, modules: list[str]) -> dict[str, LoRASpec]:
    """Module path -> rank and scale, for every module that the folder's `adapter_config.json` adapts.

    Args:
        folder: the adapter's folder.
        modules: paths of the modules that it may adapt: the base's linear layers, or `modules_in` its own tensors.

    Raises:
        AdapterError: an option that is on and would make the served model differ from the trained one, or a bad value.
    """
    path = folder / CONFIG_FILE
    config = read_json_object(path)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA': train a LoRA adapter.")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias is {config['bias']!r}, expected 'none': train the adapter without biases.")
    for key, value in config.items():
        if key not in _READ | _WITHOUT_EFFECT and value not in (None, False, "", [], {}):
            raise AdapterError(f"{path}: {key} is {value!r}, which cannot be served: train the adapter with it switched off.")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            f"{path}: init_lora_weights is {init!r}, which changes the base's weights: convert the adapter with PEFT's"
            " path_initial_model_for_weight_conversion."
        )
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise AdapterError(
            f"{path}: target_modules is {targets!r}, expected a list of module names: write regular expressions out."
        )
    known, wanted = {name for module in modules for name in _names(module)}, set(targets)
    for target in targets:
        if target not in known:
            kinds = dict.fromkeys(module.rpartition(".")[2] for module in modules)
            raise AdapterError(
                f"{path}: target_modules names {target!r}, expected modules among {', '.join(kinds) or 'none'}, which the"
                f" base model's layers or {WEIGHTS_FILE} have: train the adapter on those only."
            )
    rank_stabilized = config.get("use_rslora")
    if not isinstance(rank_stabilized, bool | None):
        raise AdapterError(f"{path}: use_rslora is {rank_stabilized!r}, expected true or false: write the adapter again.")
    modules = [module for module in modules if not wanted.isdisjoint(_names(module))]
    ranks = _entries(_pattern(path, "rank_pattern", config.get("rank_pattern")), modules, config.get("r"))
    alphas = _entries(_pattern(path, "alpha_pattern", config.get("alpha_pattern")), modules, config.get("lora_alpha"))
    specs = {}
    for module in modules:
        rank = _number(path, "the rank", ranks[module], whole=True)
        alpha = _number(path, "lora_alpha", alphas[module], whole=False)
        specs[module] = LoRASpec(int(rank), alpha / (rank**0.5 if rank_stabilized else rank))
    return specs


def lora_tensor_shapes(
    specs: dict[str, LoRASpec], linears: dict[str, tuple[int, int]] | None, prefix: str = PREFIX
) -> dict[str, Shape]:
    """The names that `adapter_model.safetensors` must have, with their shapes.

    Args:
        specs: rank of every module.
        linears: weight shape (out, in) of the base's linear layers; None: only ranks are known.
        prefix: as `prefix_of` the names has it.
    """
    shapes: dict[str, Shape] = {}
    for module, spec in specs.items():
        name_a, name_b = lora_names(module, prefix)
        out_features, in_features = None, None
        if linears is not None:
            if module not in linears:
                raise AdapterError(f"{CONFIG_FILE} adapts {module}, which this base model does not have: load it beside its own.")
            out_features, in_features = linears[module]
        shapes[name_a], shapes[name_b] = (spec.rank, in_features), (out_features, spec.rank)
    return shapes


def peft_config(specs: dict[str, LoRASpec], base_name: str) -> dict[str, object]:
    """An `adapter_config.json` that PEFT and `read_lora_specs` read as `specs`."""
    first = next(iter(specs.values()))
    parts = [_MODULE.fullmatch(module) for module in specs]
    layers = {part[2] for part in parts if part}
    kinds = Counter((part[1], part[3]) for part in parts if part)
    # Where layers differ, short names would stand for modules of other layers too.
    alike = all(parts) and set(kinds.values()) == {len(layers)}
    targets = sorted({module.rpartition(".")[2] for module in specs} if alike else specs)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.scale * first.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "rank_pattern": {module: spec.rank for module, spec in specs.items() if spec.rank != first.rank},
        "alpha_pattern": {module: spec.scale * spec.rank for module, spec in specs.items() if spec != first},
    }
