"""Methods side by side on one build of vLLM: plain decoding, vLLM's n-gram lookup and this plugin, in turns over the same prompts.

    python -m benchmarks.methods --json methods.json

Greedy, bfloat16. A ratio is of a run and the plain one of the same round; the first round is not counted.
"""

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm_mtp import demo
from vllm_mtp.cli.engine import EngineProcess
from vllm_mtp.cli.measure import Comparison, in_turns, machine

PLAIN = "plain vLLM"


def methods(adapter: str, k: int, layout: str) -> dict[str, dict[str, Any] | None]:
    """The speculative configuration of each method, all with k drafts."""
    return {
        PLAIN: None,
        "n-gram": {"method": "ngram", "num_speculative_tokens": k, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
        "vllm-mtp": {"method": "mtp", "model": adapter, "num_speculative_tokens": k, "layout": layout},
    }


def measure(
    engines: dict[str, EngineProcess], prompts: list[str], concurrency: int, options: argparse.Namespace
) -> dict[str, Comparison]:
    """Each method but plain decoding against that, over `options.rounds` rounds in which all run in turns."""

    def say(round_: str) -> None:
        print(f"{concurrency} clients: {round_}", file=sys.stderr, flush=True)

    runs = in_turns(engines, prompts, concurrency=concurrency, max_tokens=options.max_tokens, rounds=options.rounds, progress=say)
    return {name: Comparison(concurrency, runs[PLAIN], runs[name]) for name in engines if name != PLAIN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo.BASE))
    parser.add_argument("--adapter", default=str(demo.ADAPTER))
    parser.add_argument("-k", type=int, default=4, help="drafts a step, of every method")
    parser.add_argument("--layout", default="auto", help="of the plugin")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompts", type=int, default=32, help="of the demo's held-out ones")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile: starts sooner, runs slower")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()

    configs = methods(options.adapter, options.k, options.layout)
    prompts, logs = demo.prompts()[: options.prompts], Path(tempfile.mkdtemp(prefix="vllm-mtp-methods-"))
    print(f"starting {len(configs)} engines; their logs are in {logs}", file=sys.stderr, flush=True)
    with ExitStack() as stack:
        engines = {}
        for name, speculative in configs.items():
            arguments = {
                "model": options.model,
                "dtype": "bfloat16",
                "enforce_eager": options.enforce_eager,
                "max_num_seqs": max(options.concurrency),
                "enable_prefix_caching": False,  # or every run after the first would skip its prompts
                "disable_log_stats": True,
                **({"speculative_config": speculative} if speculative else {}),
            }
            engines[name] = stack.enter_context(EngineProcess(arguments, logs / f"{name.replace(' ', '-')}.log"))
        for engine in engines.values():
            engine.wait_until_ready()
        comparisons = [measure(engines, prompts, concurrency, options) for concurrency in options.concurrency]

    report: list[dict[str, Any]] = [
        {"method": name, "speculative_config": configs[name], **comparison.figures()}
        for of_methods in comparisons
        for name, comparison in of_methods.items()
    ]
    if options.json:
        facts = {"command": sys.argv, "machine": machine(), "max_tokens": options.max_tokens, "rounds": options.rounds}
        options.json.write_text(json.dumps({**facts, "methods": report}, indent=2).replace(f'"{Path.cwd()}/', '"') + "\n")
    print(f"k = {options.k}, greedy, medians of {options.rounds} rounds (ratio: lowest to highest)\n")
    print("| clients | method | tokens a forward | tokens a second | plain | ratio | same output |\n|---|---|---|---|---|---|---|")
    for row in report:
        (low, high), second = row["ratio_range"], row["tokens_per_second"]
        cells = [str(row["concurrency"]), row["method"], f"{row['tokens_per_forward']['ours']:.2f}", f"{second['ours']:.0f}"]
        cells += [f"{second['plain']:.0f}", f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"]
        print(f"| {' | '.join(cells)} | {row['identical']} of {row['num_prompts']} |")


if __name__ == "__main__":
    main()
