"""Methods of speculation while contexts grow: those of `make bench`, on prompts of 1,000 to 8,000 tokens.

    python -m benchmarks.long_context benchmarks/suite.yaml --output runs/long --results long_context.json --plot long_context.png

Prompts are held-out modules of Python's standard library, one after the other up to a length, for each request others. The demo's
model learned from sequences of 512 tokens; beyond, its rotary positions are stretched (YaRN, arXiv 2309.00071, without training),
and those of drafters that attend. Settings are those of the file, without a search. Each length is a benchmark of `vllm-mtp bench`
in its own folder, with a report. Finished runs are not repeated.
"""

import argparse
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.demo_model import corpus
from vllm_mtp.bench.config import BenchConfig
from vllm_mtp.bench.report import OURS, write_report
from vllm_mtp.bench.run import BenchError, Benchmark, say_plainly
from vllm_mtp.cli.engine import EngineError
from vllm_mtp.cli.options_file import read_options
from vllm_mtp.machine import machine
from vllm_mtp.whole_files import write_figures, write_whole

LENGTHS = (1024, 2048, 4096, 7936)
LEARNED, LONGEST = 512, 8192
STRETCHED = {
    "max_position_embeddings": LONGEST,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": LONGEST / LEARNED,
        "original_max_position_embeddings": LEARNED,
    },
}
PROMPTS = 4
KEPT = ("clients", "method", "ratio", "ratio_range", "tokens_per_second", "tokens_per_forward", "tokens_per_forward_novel")


def prompts(base: str, length: int, count: int) -> list[str]:
    """`count` texts of about `length` tokens: held-out code from its beginning on, another piece for each."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    characters = 8 * length * count  # more than tokens have
    ids = itertools.chain.from_iterable(tokenizer(text)["input_ids"] for text in corpus.documents("code", True, characters))
    return [str(tokenizer.decode(list(itertools.islice(ids, length)))) for _ in range(count)]


def stretched(drafter: Path, folder: Path) -> Path:
    """A drafter of another method that reaches as far as the base: itself if it knows no positions, else a copy in `folder`."""
    config = json.loads((drafter / "config.json").read_text())
    inner = config.get("model", config)
    if "max_position_embeddings" not in inner:
        return drafter
    inner |= STRETCHED
    copy = shutil.copytree(drafter, folder / drafter.name, dirs_exist_ok=True)
    write_whole(copy / "config.json", json.dumps(config, indent=2) + "\n")
    return copy


def config_of(options: dict[str, Any], length: int, folder: Path) -> BenchConfig:
    """The benchmark of one length; its prompts are written into `folder`."""
    config = BenchConfig.model_validate(options)
    file = folder / f"prompts-{length}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    texts = prompts(config.base, length, PROMPTS)
    write_whole(file, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    methods = {}
    for name, method in config.methods.items():
        speculative = dict(method.speculative)
        if "model" in speculative and speculative["method"] != OURS:
            speculative["model"] = str(stretched(Path(speculative["model"]), folder / "drafters"))
        methods[name] = method.model_copy(update={"speculative": speculative, "search": {}})
    engine = {**config.engine, "hf_overrides": STRETCHED, "max_model_len": LONGEST}
    return config.model_copy(update={"prompts": (file,), "engine": engine, "methods": methods})


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: tokens a forward and tokens a second over plain vLLM's, by method and length."""
    lengths = sorted({row["prompt_tokens"] for row in rows})
    columns = ["clients", "method", *(f"{length} tokens" for length in lengths)]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for clients, method in dict.fromkeys((row["clients"], row["method"]) for row in rows):
        of = {row["prompt_tokens"]: row for row in rows if (row["clients"], row["method"]) == (clients, method)}
        cells = [f"{of[n]['tokens_per_forward']:.2f}, {of[n]['ratio']:.2f}" if n in of else "-" for n in lengths]
        lines.append(f"| {clients} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens a forward, and tokens a second over plain vLLM's, by length, at the fewest clients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fewest = min(row["clients"] for row in rows)
    rows = [row for row in rows if row["clients"] == fewest]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    shown = {"tokens_per_forward": "tokens a forward", "ratio": "tokens a second over plain"}
    for axis, (value, label) in zip(axes, shown.items(), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = sorted((row["prompt_tokens"], row[value]) for row in rows if row["method"] == method)
            axis.plot(*zip(*mine, strict=True), marker="o", label=method)
        axis.set(xscale="log", xlabel="tokens of a prompt", ylabel=label, ylim=(0, None), xticks=LENGTHS, xticklabels=LENGTHS)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML, as `vllm-mtp bench` takes it")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs; finished ones are not repeated")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of the prompts, in tokens (default: %(default)s)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path, help="JSON of all lengths")
    parser.add_argument("--plot", type=Path, help="PNG")
    options = parser.parse_args()
    if max(options.lengths) + 128 > LONGEST:
        parser.error(f"--lengths: prompt and output have room for {LONGEST} tokens")
    rows: list[dict[str, Any]] = []
    try:
        given = read_options(options.config) | {"clients": options.clients, "rounds": options.rounds}
        given |= {"prompts_per_run": PROMPTS, "search_prompts_per_run": PROMPTS, "max_tokens": 128}
        for length in options.lengths:
            benchmark = Benchmark(config_of(given, length, options.output), options.output / str(length), say_plainly)
            benchmark.run()
            found = write_report(benchmark)["results"]
            rows += [{"prompt_tokens": length, **{name: row[name] for name in KEPT}} for row in found]
    except (ValueError, OSError, BenchError, EngineError) as error:
        sys.exit(f"error: {error}")
    if options.results:
        whole = {"command": sys.argv, "machine": machine(), "stretched": STRETCHED, "results": rows}
        write_figures(options.results, whole)
    if options.plot:
        plot(rows, options.plot)
    print(table(rows))


if __name__ == "__main__":
    main()
