"""Tokens per forward of an adapter in vLLM, over the held-out prompts: by k, layout, sampler head, kind of drafts, looping and
temperature.

    python -m benchmarks.acceptance --output acceptance.json

**Tokens per forward** is output tokens over the forwards that gave a request some, counted from the tokens that every engine step
adds to every request. The forward that ends the prompt is counted; it gives one token, so plain decoding has exactly 1. Outputs end
at the end of the text or at --max-tokens, and tokens past that end are not counted. The JSON also has the same without that first
forward, which is what vLLM's own counters call the acceptance length: 1 + accepted drafts / verifications.

An output **loops** when some 8 tokens in a row occur three times in it, and is **novel** up to where 8 tokens in a row occur
for the second time. Small models loop when greedy, and loops are easy to draft.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_mtp import demo
from vllm_mtp.adapter import read_adapter, write_adapter
from vllm_mtp.cli.engine import EngineError, EngineProcess
from vllm_mtp.machine import machine
from vllm_mtp.outputs import figures
from vllm_mtp.whole_files import write_whole

PARTS = ("all", "novel", "looping", "not_looping")
CONCURRENCY = 16


def without_sampler(adapter: Path, folder: Path) -> Path:
    """A copy of `adapter` in `folder` whose drafts are the plain head's argmax."""
    loaded = read_adapter(adapter)
    config = loaded.config.model_copy(update={"sampler": None})
    write_adapter(folder, config, loaded.lora, loaded.mask_embeddings, None)
    return folder


def measure(options: argparse.Namespace, adapter: Path, k: int, layout: str, drafts: str, log: Path) -> dict[str, Any]:
    """One engine over all prompts, at every temperature. Sampled requests have the prompt's number as their seed."""
    arguments = {
        "model": str(options.model),
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_num_seqs": CONCURRENCY,
        "disable_log_stats": True,
        "speculative_config": {
            "method": "mtp",
            "model": str(adapter),
            "num_speculative_tokens": k,
            "layout": layout,
            "draft_sample_method": drafts,
        },
    }
    prompts = demo.prompts(options.domain)[: options.prompts]
    with EngineProcess(arguments, log) as engine:
        engine.wait_until_ready()
        return {
            f"temperature {temperature:g}": figures(
                engine.generate(
                    prompts, max_tokens=options.max_tokens, concurrency=CONCURRENCY, temperature=temperature, seed=0
                ).outputs
            )
            for temperature in options.temperatures
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The README's table, in Markdown."""
    first = rows[0]["figures"]
    columns = [(temperature, part) for temperature in first for part in PARTS]
    titles = [f"{temperature}, {part.replace('_', ' ')}" for temperature, part in columns]
    lines = ["| k | layout | sampler head | drafts | " + " | ".join(titles) + " |", "|---" * (4 + len(columns)) + "|"]
    for row in rows:
        parts = [row["figures"][temperature][part] for temperature, part in columns]
        cells = ["-" if part["outputs"] == 0 else f"{part['tokens_per_forward']:.2f} ({part['outputs']})" for part in parts]
        sampler = "yes" if row["sampler"] else "no"
        lines.append(f"| {row['k']} | {row['layout']} | {sampler} | {row['drafts']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo.BASE)
    parser.add_argument("--adapter", type=Path, default=demo.ADAPTER)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; written anew after every engine")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--layouts", nargs="+", default=["quadratic", "linear"])
    parser.add_argument("--samplers", nargs="+", choices=["yes", "no"], default=["yes", "no"])
    parser.add_argument("--drafts", nargs="+", choices=["greedy", "probabilistic"], default=["greedy"], help="draft_sample_method")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--domain", choices=demo.DOMAINS, default="code")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()
    try:
        _measure_all(options)
    except (OSError, EngineError) as error:
        sys.exit(f"error: {error}")


def _measure_all(options: argparse.Namespace) -> None:
    report: dict[str, Any] = {
        "command": sys.argv,
        "machine": machine(),
        "num_prompts": options.prompts,
        "max_tokens": options.max_tokens,
        "rows": [],
    }
    logs = options.output.with_suffix(".logs")
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for sampler, layout, k, drafts in itertools.product(options.samplers, options.layouts, options.k, options.drafts):
            adapter = options.adapter
            if sampler == "no":
                adapter = Path(folder) / "without-sampler"
                if not adapter.exists():
                    without_sampler(options.adapter, adapter)
            found = measure(options, adapter, k, layout, drafts, logs / f"{sampler}-{layout}-{k}-{drafts}.log")
            report["rows"].append({"k": k, "layout": layout, "sampler": sampler == "yes", "drafts": drafts, "figures": found})
            write_whole(options.output, json.dumps(report, indent=2) + "\n")
            print(table(report["rows"]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(report["rows"]))


if __name__ == "__main__":
    main()
