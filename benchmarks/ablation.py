"""What each part of the recipe is worth: adapters trained with more and more of it, on the demo base, over several seeds.

    python -m benchmarks.ablation --output runs/ablation --steps 600

The stages are those of *Your LLM Knows the Future*, each on top of the one before: linear decoding, quadratic decoding, the sampler
head, the consistency loss; and then this trainer's defaults. Writes OUTPUT/ablation.json and OUTPUT/ablation.png anew after every
run. Killed, the same command goes on where it was.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.demo_model.train_adapter import write_split
from vllm_mtp import demo
from vllm_mtp.adapter import read_config
from vllm_mtp.cli.measure import machine
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.run import train
from vllm_mtp.whole_files import whole, write_whole

PAPER: dict[str, Any] = {
    "targets": "text",
    "on_policy": 0.0,
    "sampler_residual": False,
    "train_mask_embeddings": False,
    "loss": {"consistency": 0.0},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {**PAPER, "sampler": False},
    "sampler": PAPER,
    "consistency": {**PAPER, "loss": {"consistency": 1.0}},
    "default": {},
}
"""Options of training that differ from the trainer's defaults."""
STAGES = {
    "linear": ("plain", "linear.plain"),
    "quadratic": ("plain", "quadratic.plain"),
    "+ sampler head": ("sampler", "quadratic.sampler"),
    "+ consistency loss": ("consistency", "quadratic.sampler"),
    "the trainer's defaults": ("default", "quadratic.sampler"),
}
"""Variant, and the layout and head that it is measured with."""
PARTS = {"all": "", "novel": ".novel"}


def finished(config: TrainConfig) -> dict[str, float] | None:
    """Tokens per forward of a run that ended, as its adapter has them."""
    folder = config.output / "adapter"
    if not (folder / "config.json").exists():
        return None
    training: dict[str, Any] = read_config(folder).training
    return training["tokens_per_forward"] if training["options"]["steps"] == config.steps else None


def summary(runs: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Of each stage, part and k the values of all seeds so far, their mean and standard deviation."""
    stages: dict[str, Any] = {}
    for stage, (variant, way) in STAGES.items():
        for part, suffix in PARTS.items():
            found: dict[str, list[float]] = {}
            for figures in runs.get(variant, {}).values():
                for name, value in figures.items():
                    if name.rpartition(".")[0] == way + suffix:
                        found.setdefault(name.rpartition(".")[2], []).append(value)
            stages.setdefault(stage, {})[part] = {
                k: {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None, "seeds": values}
                for k, values in found.items()
            }
    return stages


def table(stages: dict[str, Any], budgets: Sequence[str]) -> str:
    """Markdown: mean and spread of tokens per forward, by stage and k."""
    lines = ["| stage | outputs | " + " | ".join(f"k = {k}" for k in budgets) + " |", "|---" * (2 + len(budgets)) + "|"]
    for stage, parts in stages.items():
        for part, by_k in parts.items():
            cells = [_cell(by_k[k]) if k in by_k else "-" for k in budgets]
            lines.append(f"| {stage} | {part} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(figure: dict[str, Any]) -> str:
    return f"{figure['mean']:.3f}" + ("" if figure["sd"] is None else f" ± {figure['sd']:.3f}")


def plot(stages: dict[str, Any], file: Path) -> None:
    """Tokens per forward over k for each stage: the mean, and a band from the lowest seed to the highest."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, part in zip(figure.subplots(1, 2), PARTS, strict=True):
        for stage, parts in stages.items():
            by_k = parts[part]
            if by_k:
                budgets = sorted(map(int, by_k))
                values = [by_k[str(k)] for k in budgets]
                (line,) = axes.plot(budgets, [value["mean"] for value in values], marker="o", markersize=3, label=stage)
                low, high = ([bound(value["seeds"]) for value in values] for bound in (min, max))
                axes.fill_between(budgets, low, high, color=line.get_color(), alpha=0.2)
        axes.set(title=f"Tokens per forward, held out, {part}", xlabel="k, drafts a group")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    with whole(file) as part_file:
        figure.savefig(part_file, format="png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=demo.BASE)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of options of TrainConfig for every run")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    data = options.output / "train.jsonl"
    if not data.exists():
        write_split(data)
    common = {
        "base": options.base,
        "data": [data],
        "eval_data": [demo.PROMPTS / "code.jsonl"],
        "steps": options.steps,
        "warmup_steps": options.steps // 20,
    }
    shape = {"length": 160, "groups": 24, "batch_size": 4, "rank": 16, "on_policy_sequences": 512, "save_steps": 50}
    runs: dict[str, dict[str, dict[str, float]]] = {}
    for seed in range(options.seeds):
        for variant in options.variants:
            folder = options.output / f"{variant}-{seed}"
            config = TrainConfig.model_validate(
                {**shape, **common, **VARIANTS[variant], **options.options, "seed": seed, "output": folder}
            )
            found = finished(config)
            if found is None:
                train(config)
                found = finished(config)
            assert found is not None
            runs.setdefault(variant, {})[str(seed)] = found
            stages = summary(runs)
            report = {
                "command": sys.argv,
                "machine": machine(),
                "shape": {**shape, **options.options},
                "runs": runs,
                "stages": stages,
            }
            write_whole(options.output / "ablation.json", json.dumps(report, indent=2) + "\n")
            plot(stages, options.output / "ablation.png")
    print(table(stages, [k for k in ("1", "2", "4", "8") if k in stages["linear"]["all"]] or ["8"]))


if __name__ == "__main__":
    main()
