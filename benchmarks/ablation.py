"""What each part of a recipe is worth: adapters trained by several recipes at equal steps, rank and data, over several seeds.

    python -m benchmarks.ablation --output runs/ablation --steps 600 --results benchmarks/results

First the stages of *Your LLM Knows the Future*, each on top of the one before: linear decoding, quadratic decoding, the sampler
head, and the consistency loss, which makes that paper's recipe. Then this trainer's defaults, and `self-distill` on gated LoRA,
hard and soft. All learn from the demo's three domains; tokens per forward are counted on what the base writes after held-out
prompts of each, in plain torch.

Writes ablation.json and ablation.png anew after every run. Killed, the same command goes on where it was; runs that ablation.json
holds of the same shape are not made again, wherever they were made.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo_model.train_adapter import MIXTURE, write_mixture
from vllm_mtp import demo
from vllm_mtp.adapter import fingerprint_folder
from vllm_mtp.machine import machine
from vllm_mtp.outputs import acceptance_length, novel
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.evaluate import decoded
from vllm_mtp.train.export import from_adapter
from vllm_mtp.train.on_policy import continue_prompts, end_tokens
from vllm_mtp.train.run import train
from vllm_mtp.whole_files import whole, write_figures, write_whole

PROMPT_TOKENS, NEW_TOKENS = 192, 128
PAPER: dict[str, Any] = {
    "targets": "text",
    "on_policy": 0.0,
    "sampler_residual": False,
    "train_mask_embeddings": False,
    "loss": {"consistency": 0.0},
}
BEST: dict[str, Any] = {
    "on_policy": 1.0,
    "on_policy_sequences": 2048,
    "learning_rate": 2e-3,
    "loss": {"position_decay": 0.85},
}
"""What was found for runs as short as these, one option after the other: more of the base's own text, twice the learning rate (four
times is less), first drafts before later ones."""
DISTIL: dict[str, Any] = {"recipe": "self-distill"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {**PAPER, "sampler": False},
    "sampler": PAPER,
    "consistency": {**PAPER, "loss": {"consistency": 1.0}},
    "default": {},
    "best": BEST,
    "tuned": {**PAPER, "loss": {"consistency": 1.0}, "learning_rate": BEST["learning_rate"]},
    "distil-hard": {**DISTIL, "targets": "argmax"},
    "distil-soft": {**DISTIL, "targets": "distribution"},
}
"""Options of training that differ from the trainer's defaults."""
PAPERS = "+ consistency loss"
STAGES = {
    "linear": ("plain", "linear.plain"),
    "quadratic": ("plain", "quadratic.plain"),
    "+ sampler head": ("sampler", "quadratic.sampler"),
    PAPERS: ("consistency", "quadratic.sampler"),
    "the paper's recipe at the best learning rate": ("tuned", "quadratic.sampler"),
    "the trainer's defaults": ("default", "quadratic.sampler"),
    "best": ("best", "quadratic.sampler"),
    "self-distill, hard": ("distil-hard", "quadratic.sampler"),
    "self-distill, soft": ("distil-soft", "quadratic.sampler"),
}
"""Variant, and the layout and head that it is measured with."""
AVERAGE = "average"
PARTS = {"all": "", "novel": ".novel"}
SHAPE = {"length": 160, "groups": 24, "batch_size": 4, "rank": 16, "on_policy_sequences": 512, "save_steps": 50}
REGIONS = 13
"""Groups of a sequence with `self-distill`: regions of 12 rows, as short as 8 mask tokens allow with a few tokens between them."""

Texts = dict[str, list[tuple[int, list[int]]]]
"""Of each domain the tokens of prompts and what the base wrote after them, with the number that are the prompt's."""
Figures = dict[str, dict[str, float]]
"""Of each domain and of their average: tokens per forward by layout, head, part and k, as in `quadratic.sampler.novel.4`."""
Runs = dict[str, dict[str, Figures]]
"""Of each variant and seed."""


def texts_of(base: Path, prompts: int, new_tokens: int, file: Path) -> Texts:
    """Held-out prompts of each domain with the base's greedy continuations; from `file` where it has those of this base."""
    made_for = [fingerprint_folder(base), prompts, new_tokens]
    if file.exists() and (kept := json.loads(file.read_text()))["made_for"] == made_for:
        return {domain: [(length, ids) for length, ids in some] for domain, some in kept["texts"].items()}
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    texts: Texts = {}
    for domain in demo.DOMAINS:
        encoded = tokenizer(demo.prompts(domain)[:prompts], add_special_tokens=False, truncation=True, max_length=PROMPT_TOKENS)
        ids = [torch.tensor(some) for some in encoded["input_ids"]]
        whole_texts = continue_prompts(model, ids, new_tokens, end_tokens(tokenizer, model.generation_config))
        texts[domain] = [(len(prompt), text.tolist()) for prompt, text in zip(ids, whole_texts, strict=True)]
    write_whole(file, json.dumps({"made_for": made_for, "texts": texts}) + "\n")
    return texts


def measured(base: Path, adapter: Path, texts: Texts) -> Figures:
    """An adapter's tokens per forward after the prompt's, by domain, and their average over the domains that have one."""
    model, figures = from_adapter(base, adapter), {}
    for domain, some in texts.items():
        lengths, ids = [length for length, _ in some], [torch.tensor(tokens) for _, tokens in some]
        found: dict[str, float] = {}
        for (layout, head, k), outputs in decoded(model, ids, lengths, range(1, model.options.mask_tokens + 1)).items():
            for suffix, part in zip(PARTS.values(), (outputs, [novel(output) for output in outputs]), strict=True):
                if (value := acceptance_length(part)) is not None:
                    found[f"{layout}.{head}{suffix}.{k}"] = round(value, 4)
        figures[domain] = found
    return {**figures, AVERAGE: average(figures)}


def average(figures: Figures) -> dict[str, float]:
    """The mean over domains of each figure that all of them have."""
    domains = list(figures.values())
    return {name: statistics.mean(some[name] for some in domains) for name in domains[0] if all(name in some for some in domains)}


def result_of(config: TrainConfig, base: Path, texts: Callable[[], Texts], beside: Sequence[Path]) -> Figures:
    """Figures of a run, from its folder where it has ended, else after training it.

    Args:
        config: of the run.
        base: its base.
        texts: what to count on.
        beside: folders of runs that may have let the base continue the same prompts.
    """
    file = config.output / "figures.json"
    if file.exists() and (kept := json.loads(file.read_text()))["steps"] == config.steps:
        figures: Figures = kept["figures"]
        return figures
    continued = config.output / "on_policy.safetensors"
    for other in (folder / continued.name for folder in beside):
        if config.on_policy and other.exists() and not continued.exists():
            config.output.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(other, continued)  # the trainer looks whether they are those that it would make
    figures = measured(base, train(config), texts())
    write_whole(file, json.dumps({"steps": config.steps, "figures": figures}) + "\n")
    return figures


def known_runs(file: Path, facts: dict[str, Any]) -> Runs:
    """The runs of a file that this command wrote.

    Raises:
        ValueError: they were made with other `facts`.
    """
    if not file.exists():
        return {}
    kept = json.loads(file.read_text())
    for name, value in facts.items():
        if kept[name] != json.loads(json.dumps(value)):
            raise ValueError(f"{file} holds runs with other {name}: give another folder, or the same {name}")
    runs: Runs = kept["runs"]
    return runs


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation, and the values of all seeds."""
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None, "seeds": list(values)}


def of_stage(figures: Figures, domain: str, way: str, part: str) -> dict[str, float]:
    """k -> tokens per forward of one run."""
    return {
        name.rpartition(".")[2]: value for name, value in figures[domain].items() if name.rpartition(".")[0] == way + PARTS[part]
    }


def summary(runs: Runs) -> dict[str, Any]:
    """Of each stage, domain, part and k the values of all seeds so far, their mean and standard deviation."""
    stages: dict[str, Any] = {stage: {} for stage in STAGES}
    for stage, (variant, way) in STAGES.items():
        for domain in (*demo.DOMAINS, AVERAGE):
            for part in PARTS:
                found: dict[str, list[float]] = {}
                for figures in runs.get(variant, {}).values():
                    for k, value in of_stage(figures, domain, way, part).items():
                        found.setdefault(k, []).append(value)
                stages[stage].setdefault(domain, {})[part] = {k: spread(values) for k, values in found.items()}
    return stages


def gains(runs: Runs) -> dict[str, Any]:
    """Of each stage after the paper's recipe, domain and k: tokens per forward over that recipe's, seed by seed."""
    found: dict[str, Any] = {}
    papers, papers_way = STAGES[PAPERS]
    for stage in list(STAGES)[list(STAGES).index(PAPERS) + 1 :]:
        variant, way = STAGES[stage]
        for domain in (*demo.DOMAINS, AVERAGE):
            ratios: dict[str, list[float]] = {}
            for seed, figures in runs.get(variant, {}).items():
                if seed in runs.get(papers, {}):
                    before = of_stage(runs[papers][seed], domain, papers_way, "all")
                    for k, value in of_stage(figures, domain, way, "all").items():
                        ratios.setdefault(k, []).append(value / before[k])
            found.setdefault(stage, {})[domain] = {k: spread(values) for k, values in ratios.items()}
    return found


def table(stages: dict[str, Any], budgets: Sequence[str]) -> str:
    """Markdown: mean and spread of tokens per forward, by stage and k: the domains together, all and novel, and each domain."""
    lines = ["| stage | outputs | " + " | ".join(f"k = {k}" for k in budgets) + " |", "|---" * (2 + len(budgets)) + "|"]
    for stage, domains in stages.items():
        if not domains[AVERAGE]["all"]:
            continue  # not run yet
        rows = [(part, domains[AVERAGE][part]) for part in PARTS] + [(domain, domains[domain]["all"]) for domain in demo.DOMAINS]
        lines += [f"| {stage} | {name} | " + " | ".join(_cells(by_k, budgets)) + " |" for name, by_k in rows]
    return "\n".join(lines)


def table_of_gains(found: dict[str, Any], budgets: Sequence[str]) -> str:
    """Markdown: tokens per forward over the paper's recipe's, the domains together."""
    lines = ["| over the paper's recipe | " + " | ".join(f"k = {k}" for k in budgets) + " |", "|---" * (1 + len(budgets)) + "|"]
    lines += [
        f"| {stage} | " + " | ".join(_cells(domains[AVERAGE], budgets)) + " |"
        for stage, domains in found.items()
        if domains[AVERAGE]
    ]
    return "\n".join(lines)


def _cells(by_k: dict[str, Any], budgets: Sequence[str]) -> Iterator[str]:
    for k in budgets:
        figure = by_k.get(k)
        yield "-" if figure is None else f"{figure['mean']:.3f}" + ("" if figure["sd"] is None else f" ± {figure['sd']:.3f}")


def plot(stages: dict[str, Any], file: Path) -> None:
    """Tokens per forward over k for each stage, together and by domain: the mean, and a band from lowest to highest seed."""
    panels = [(AVERAGE, "all"), (AVERAGE, "novel"), *((domain, "all") for domain in demo.DOMAINS)]
    figure = Figure(figsize=(4.2 * len(panels), 4.5), layout="constrained")
    for axes, (domain, part) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for stage, domains in stages.items():
            by_k = domains[domain][part]
            if by_k:
                budgets = sorted(map(int, by_k))
                values = [by_k[str(k)] for k in budgets]
                (line,) = axes.plot(budgets, [value["mean"] for value in values], marker="o", markersize=3, label=stage)
                low, high = ([bound(value["seeds"]) for value in values] for bound in (min, max))
                axes.fill_between(budgets, low, high, color=line.get_color(), alpha=0.2)
        axes.set(title=domain if part == "all" else f"{domain}, {part}", xlabel="k, drafts a group")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("tokens per forward, held out")
    if figure.axes[0].lines:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    with whole(file) as part_file:
        figure.savefig(part_file, format="png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder for ablation.json and ablation.png; that of the runs by default")
    parser.add_argument("--base", type=Path, default=demo.BASE)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts of each domain")
    parser.add_argument("--max-tokens", type=int, default=NEW_TOKENS, help="what the base writes after each of them, at most")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of options of TrainConfig for every run")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.results or options.output
    data = options.output / "train.jsonl"
    if not data.exists():
        with whole(data) as part:
            write_mixture(part, MIXTURE)
    facts = {
        "steps": options.steps,
        "prompts": options.prompts,
        "max_tokens": options.max_tokens,
        "mixture": MIXTURE,
        "shape": {**SHAPE, **options.options},
    }
    try:
        runs = known_runs(results / "ablation.json", facts)
    except ValueError as error:
        parser.error(str(error))
    for seed in range(options.seeds):
        for variant in options.variants:
            if str(seed) in runs.get(variant, {}):
                continue
            folder = options.output / f"{variant}-{seed}"
            given = {**SHAPE, **({"groups": REGIONS} if VARIANTS[variant].get("recipe") else {}), **VARIANTS[variant]}
            common = {"base": options.base, "data": [data], "steps": options.steps, "warmup_steps": options.steps // 20}
            config = TrainConfig.model_validate({**given, **common, **options.options, "seed": seed, "output": folder})
            runs.setdefault(variant, {})[str(seed)] = result_of(
                config,
                options.base,
                lambda: texts_of(options.base, options.prompts, options.max_tokens, options.output / "texts.json"),
                [options.output / f"{other}-{seed}" for other in VARIANTS if other != variant],
            )
            stages, found = summary(runs), gains(runs)
            report = {
                "command": sys.argv,
                "machine": machine(),
                **facts,
                "variants": {name: VARIANTS[name] for name in runs},
                "runs": runs,
                "stages": stages,
                "over the paper's recipe": found,
            }
            write_figures(results / "ablation.json", report)
            plot(stages, results / "ablation.png")
    stages, found = summary(runs), gains(runs)
    budgets = [k for k in ("1", "2", "4", "8") if any(k in domains[AVERAGE]["all"] for domains in stages.values())]
    print(table(stages, budgets), table_of_gains(found, budgets), sep="\n\n")


if __name__ == "__main__":
    main()
