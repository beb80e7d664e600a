"""What a step costs by method, drafts and clients, for a model of any shape: random weights, so that none has to be at hand.

    python -m benchmarks.step_cost --output runs/step_cost --results step_cost.json --plot step_cost.png

The shape is Llama 3.1 8B's, and `--shape` changes it. Base and drafters have vLLM's dummy weights; the adapter's, of `--rank`, are
random. Their drafts are worth nothing; what is measured is milliseconds a step, over plain vLLM's of the same round. With
`--acceptance`, tokens a forward that the methods' trained drafters of another model have at as many drafts, divided by that cost:
the speed-up if the drafters were as good here. Made for a GPU; a small `--shape` runs anywhere. Has not run on a GPU yet.
Finished runs are not repeated.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.baselines.train import METHODS
from vllm_mtp import demo
from vllm_mtp.adapter import LoRAWeights, base_facts, linear_shapes, write_adapter
from vllm_mtp.bench.config import PLAIN, BenchConfig
from vllm_mtp.bench.report import write_report
from vllm_mtp.bench.run import BenchError, Benchmark, Setting, say_plainly
from vllm_mtp.cli.engine import EngineError
from vllm_mtp.config import AdapterConfig
from vllm_mtp.machine import machine
from vllm_mtp.sampler_head import SamplerHead
from vllm_mtp.whole_files import write_figures, write_whole

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
"""Of Llama 3.1 8B."""
ENGINE = {"dtype": "bfloat16", "max_model_len": 1024, "gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 6 << 30}
"""Four engines share a GPU, each with 16 GB of weights. A size of the KV cache that is given is not found by profiling, which
engines that start side by side would disturb."""
OURS, OTHERS = "mtp", ("eagle", "medusa")


def write_base(folder: Path, shape: dict[str, Any]) -> LlamaConfig:
    """A model folder without weights, with the demo's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo.BASE / name, folder / name)
    config = LlamaConfig(**{**SHAPE, **shape}, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    return config


def write_random_adapter(base: Path, folder: Path, k: int, rank: int) -> Path:
    """An adapter of random weights for `base`, of which only config.json is read."""
    shapes, facts = linear_shapes(base), base_facts(base)
    assert shapes is not None
    lora = {name: LoRAWeights(torch.randn(rank, i) / rank, torch.randn(o, rank) / rank, 1.0) for name, (o, i) in shapes.items()}
    config = AdapterConfig(num_mask_tokens=k, base=facts)
    write_adapter(folder, config, lora, torch.randn(k, facts.hidden_size), SamplerHead(facts.hidden_size))
    return folder


def methods_of(family: str, base: Path, config: LlamaConfig, drafts: Collection[int], rank: int, folder: Path) -> dict[str, Any]:
    """The methods of one benchmark, one for each number of drafts, by name; what they load is written into `folder`."""
    if family == OURS:
        adapter = write_random_adapter(base, folder / OURS, max(drafts), rank)
        fixed = {"method": OURS, "model": str(adapter), "layout": "quadratic", "lookup": False, "max_mask_rows": 16384}
        return {f"{OURS} {k}": {"speculative": {**fixed, "num_speculative_tokens": k}} for k in drafts}
    with torch.device("meta"):
        drafter = METHODS[family](AutoModelForCausalLM.from_config(config))
    made = folder / family
    made.mkdir(parents=True, exist_ok=True)
    write_whole(made / "config.json", json.dumps(drafter.folder_config(), indent=2) + "\n")
    return {f"{family} {k}": {"speculative": drafter.speculative_config(made, k)} for k in drafts}


def costs(benchmark: Benchmark) -> list[dict[str, Any]]:
    """Of every method at every number of clients: milliseconds a step, and its cost over plain vLLM's in each round."""
    found = []
    for _, clients, method, setting, runs in benchmark.compared():
        plain, mine = runs[Setting(PLAIN).key], runs[setting.key]
        step, plain_step = ({i: 1e3 * run.seconds / run.num_forwards for i, run in of.items()} for of in (mine, plain))
        over = [step[i] / plain_step[i] for i in sorted(plain.keys() & mine.keys())]
        family, _, k = method.partition(" ")
        row = {"method": family, "k": int(k)} if method != PLAIN else {"method": PLAIN, "k": 0}
        row |= {"clients": clients, "ms_a_step": statistics.median(step.values())}
        found.append({**row, "over_plain": statistics.median(over), "over_plain_range": [min(over), max(over)]})
    return found


def acceptance(file: Path) -> Callable[[str, int], float | None]:
    """(method, k) -> tokens a forward, from what `benchmarks.baselines.evaluate` wrote; an adapter's folder is this package's."""
    report = json.loads(file.read_text(encoding="utf-8"))
    known: dict[tuple[str, int], float] = {}
    for entry in report["drafters"]:
        parts = Path(entry["drafter"]).parts
        family = next((name for name in OTHERS if name in parts), OURS)
        known |= {(family, int(k)): figures["tokens_per_forward"] for k, figures in entry.items() if k.isdigit()}
    return lambda method, k: known.get((method, k))


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: cost over plain vLLM's step by clients, and the speed-up it would leave."""
    clients = sorted({row["clients"] for row in rows})
    columns = ["method", "drafts", *(f"{n} client{'s' if n > 1 else ''}" for n in clients)]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for method, k in dict.fromkeys((row["method"], row["k"]) for row in rows):
        cells = []
        for n in clients:
            (row,) = (row for row in rows if (row["method"], row["k"], row["clients"]) == (method, k, n))
            cost = f"{row['over_plain']:.2f}" if k else f"{row['ms_a_step']:.2f} ms"
            cells.append(cost + (f", speed-up {row['speed_up']:.2f}" if row.get("speed_up") else ""))
        lines.append(f"| {method} | {k or '-'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Cost of a step over plain vLLM's by clients, a line for each method and number of drafts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for method, k in dict.fromkeys((row["method"], row["k"]) for row in rows if row["k"]):
        mine = sorted((row["clients"], row["over_plain"]) for row in rows if (row["method"], row["k"]) == (method, k))
        axes.plot(*zip(*mine, strict=True), marker="o", label=f"{method}, {k} drafts")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="clients", ylabel="a step over plain vLLM's", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for models and runs; finished runs are not repeated")
    parser.add_argument("--shape", type=json.loads, default={}, help="JSON of transformers' LlamaConfig that differs from an 8B's")
    parser.add_argument("--methods", nargs="+", choices=(OURS, *OTHERS), default=[OURS, *OTHERS])
    parser.add_argument("-k", type=int, nargs="+", default=[2, 4, 8], help="drafts a step (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=128, help="of the adapter (default: %(default)s)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of further arguments of vllm.LLM")
    parser.add_argument(
        "--acceptance", type=Path, help="JSON of benchmarks.baselines.evaluate, for the speed-up that would be left"
    )
    parser.add_argument("--results", type=Path, help="JSON of all methods")
    parser.add_argument("--plot", type=Path, help="PNG")
    options = parser.parse_args()
    if max(options.k) > 8:
        parser.error("-k: at most 8, as many heads as Medusa has here")
    rows: list[dict[str, Any]] = []
    try:
        length = acceptance(options.acceptance) if options.acceptance else lambda _method, _k: None
        base = options.output / "base"
        config = write_base(base, options.shape)
        for family in options.methods:
            given = {"model": str(base), "engine": {**ENGINE, "load_format": "dummy", **options.engine}}
            given |= {"methods": methods_of(family, base, config, options.k, options.rank, options.output)}
            given |= {name: getattr(options, name) for name in ("clients", "rounds", "max_tokens")}
            benchmark = Benchmark(BenchConfig.model_validate(given), options.output / f"{family}-runs", say_plainly)
            benchmark.run()
            write_report(benchmark)
            for row in costs(benchmark):
                tokens = length(row["method"], row["k"])
                rows.append({**row, "of": family, "speed_up": tokens and tokens / row["over_plain"]})
    except (ValueError, OSError, BenchError, EngineError) as error:
        sys.exit(f"error: {error}")
    shown = [row for row in rows if row["method"] != PLAIN or row["of"] == options.methods[0]]
    if options.results:
        facts = {"command": sys.argv, "machine": machine(), "shape": {**SHAPE, **options.shape}, "rank": options.rank}
        whole = {**facts, "engine": {**ENGINE, **options.engine}, "results": rows}
        write_figures(options.results, whole)
    if options.plot:
        plot(shown, options.plot)
    print(table(shown))


if __name__ == "__main__":
    main()
