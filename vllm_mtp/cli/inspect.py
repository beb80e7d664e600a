"""`vllm-mtp inspect`: what an adapter folder holds, from its headers; no tensor but a model's norms is loaded."""

import json
import math
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_mtp.adapter import MTP_FILE, SAMPLER_PREFIX, AdapterError, validate_folder
from vllm_mtp.base_model import base_facts
from vllm_mtp.cli.show import print_error
from vllm_mtp.config import AdapterConfig
from vllm_mtp.foreign import FULL, NOISE, TRAINING_FILE, check_checkpoint, check_noise_lora, kind_of
from vllm_mtp.peft_format import CONFIG_FILE, WEIGHTS_FILE, LoRASpec, modules_in, read_lora_specs
from vllm_mtp.safe_files import printable, read_header, read_json_object


def _parts(folder: Path) -> dict[str, int]:
    """Parameters of the LoRA, the mask embeddings and the sampler head."""
    counts = {"LoRA": sum(math.prod(header.shape) for header in read_header(folder / WEIGHTS_FILE).values())}
    for name, header in read_header(folder / MTP_FILE).items():
        part = "sampler head" if name.startswith(SAMPLER_PREFIX) else "mask embeddings"
        counts[part] = counts.get(part, 0) + math.prod(header.shape)
    return counts


def _ranks(specs: dict[str, LoRASpec]) -> str:
    """Ranks and scales with the layers' names that have them, layer numbers left out."""
    names: dict[LoRASpec, Counter[str]] = {}
    for module, spec in specs.items():
        names.setdefault(spec, Counter())[module.rsplit(".", 1)[1]] += 1
    return "\n".join(
        f"rank {spec.rank}, scale {spec.scale:g}: {', '.join(f'{name} x {n}' for name, n in counts.items())}"
        for spec, counts in names.items()
    )


def _text(value: object) -> str:
    """A value of the provenance; an object as one line for each of its keys."""
    return "\n".join(f"{key}: {part}" for key, part in value.items()) if isinstance(value, dict) else str(value)


def _rows(folder: Path, config: AdapterConfig) -> list[tuple[str, str]]:
    base, parts, lora = config.base, _parts(folder), folder / WEIGHTS_FILE
    facts = f"{base.model_type}, {base.num_hidden_layers} layers of width {base.hidden_size}, {base.vocab_size} tokens"
    sampler = "none" if config.sampler is None else "with a residual" if config.sampler.residual else "without a residual"
    serving = config.serving.model_dump(exclude_none=True) if config.serving else {}
    rows = [
        ("kind", f"{config.kind}, format {config.format_version}"),
        ("base model", f"{base.name_or_path}\n{facts}\nfingerprint {base.fingerprint or 'none'}"),
        ("mask tokens", f"{config.num_mask_tokens} (the most drafts it can give)"),
        ("sampler head", sampler),
        ("LoRA", _ranks(read_lora_specs(folder, modules_in(lora, read_header(lora), base.num_hidden_layers)))),
        ("parameters", "\n".join(f"{count:,} {name}" for name, count in [*parts.items(), ("together", sum(parts.values()))])),
        ("serving", ", ".join(f"{key} {value}" for key, value in serving.items()) or "the plugin's defaults"),
    ]
    return rows + [(f"training: {key}", _text(value)) for key, value in config.training.items()]


def _foreign_rows(folder: Path, base: Path | None) -> list[tuple[str, str]]:
    """Of weights that other projects trained: what they are, and what must be said to serve them."""
    if kind_of(folder) == NOISE:
        specs, _ = check_noise_lora(folder, base)
        named = read_json_object(folder / CONFIG_FILE).get("base_model_name_or_path")
        count = sum(math.prod(header.shape) for header in read_header(folder / WEIGHTS_FILE).values())
        return [
            ("kind", f"{NOISE} (UNO), as PEFT writes it; any other LoRA looks the same, and would draft badly"),
            ("base model", f"{named or 'not said'}"),
            (
                "mask tokens",
                "drawn from the vocabulary, 1 to mask_token_id - 1; not said where that ends, nor how many were trained",
            ),
            ("sampler head", "none"),
            ("LoRA", _ranks(specs)),
            ("parameters", f"{count:,} LoRA"),
            ("serving", f'{{"method": "mtp", "model": "{folder}", "mask_token_id": .., "num_speculative_tokens": ..}}'),
        ]
    check_checkpoint(folder)
    facts = base_facts(folder)
    sizes = f"{facts.model_type}, {facts.num_hidden_layers} layers of width {facts.hidden_size}, {facts.vocab_size} tokens"
    model = ("model", f"{sizes}\nfingerprint {facts.fingerprint or 'none'}")
    if (folder / TRAINING_FILE).is_file():
        trained = read_json_object(folder / TRAINING_FILE)
        token, k, training = trained.get("mask_token_id"), trained.get("num_mask_tokens"), trained.get("training")
        base_of, options = trained.get("base"), {"method": "mtp", "mask_token_id": token, "num_speculative_tokens": k}
        rows = [
            ("kind", f"{FULL}: a model that was trained to draft for itself, and no adapter; its text is its own, not its base's"),
            model,
            ("trained from", f"{base_of.get('name_or_path') if isinstance(base_of, dict) else base_of}"),
            ("mask tokens", f"{k}, all of them token {token} of the vocabulary"),
            ("sampler head", "none"),
            ("LoRA", "none"),
            ("serving", f"as the model, with {json.dumps(options)}"),
        ]
        return rows + [
            (f"training: {key}", _text(value)) for key, value in (training if isinstance(training, dict) else {}).items()
        ]
    return [
        (
            "kind",
            f"{FULL}: a model, and no adapter. It drafts for itself if it was trained to (mtp-lm), which its files do not say",
        ),
        model,
        ("mask tokens", "one token of the vocabulary for all mask rows, mask_token_id; not said which, nor how many were trained"),
        ("sampler head", "none"),
        ("LoRA", "none"),
        ("serving", 'as the model, with {"method": "mtp", "mask_token_id": .., "num_speculative_tokens": ..}'),
    ]


def run(folder: Path, base: Path | None) -> int:
    """Print the adapter's table; the exit status: 1 when the folder is not a sound adapter, or not one for `base`."""
    console = Console(highlight=False)
    try:
        own = kind_of(folder) is None
        rows = _rows(folder, validate_folder(folder, base)) if own else _foreign_rows(folder, base)
    except AdapterError as error:
        print_error(error)
        return 1
    table = Table(show_header=False, title=str(folder), title_justify="left")
    for name, value in rows:
        table.add_row(Text(printable(name)), Text("\n".join(printable(line) for line in value.split("\n"))))
    console.print(table)
    return 0
