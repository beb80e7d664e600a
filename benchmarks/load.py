"""What `auto` does with the load: against plain vLLM by number of clients, and against fixed layouts while that number changes.

    python -m benchmarks.load --output load.json --plot load.png

Greedy, bfloat16, the demo model. Three parts:

- **clients**: pairs of runs with plain vLLM, in turns, at 1 to 32 clients; lossless, and by confidence from 0.9 on;
- **ramp**: the number of clients goes from 1 to 32 and back, prompts short and long in turns; plain vLLM, `auto` and fixed
  layouts, in turns over the same prompts;
- **forecast**: while the ramp runs on `auto` once more, the layout of every step; then longer prompts too, and for each layout,
  number of requests and length of context the median step time against what was forecast for it before the step.

A run that was stopped goes on where it was: finished parts are taken from the output file.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm_mtp import demo
from vllm_mtp.cli.engine import EngineProcess
from vllm_mtp.cli.measure import compare, in_turns
from vllm_mtp.forecast import Batch
from vllm_mtp.machine import machine
from vllm_mtp.metrics import layout_name
from vllm_mtp.whole_files import below_here, write_whole

K = 8
LONGEST = 4096
CLIENTS = (1, 2, 4, 8, 16, 32)
AUTO: dict[str, Any] = {"num_speculative_tokens": K}
BY_CONFIDENCE = {**AUTO, "acceptance": "confidence", "tau": 0.9}
FIXED: dict[str, Any] = {
    "linear 1": {"num_speculative_tokens": 1, "layout": "linear"},
    "linear 4": {"num_speculative_tokens": 4, "layout": "linear"},
    "comb of 2": {"num_speculative_tokens": 2, "layout": "quadratic"},
    "comb of 4": {"num_speculative_tokens": 4, "layout": "quadratic"},
}

OFF = {"median": "median_error", "at most": "largest_error", "single steps": "median_error_of_a_step"}


def arguments(speculative: dict[str, Any] | None) -> dict[str, Any]:
    """Of an engine that drafts so, plain without."""
    return {
        "model": str(demo.BASE),
        "dtype": "bfloat16",
        "max_num_seqs": max(CLIENTS),
        "enable_prefix_caching": False,  # or every run after the first would skip its prompts
        "disable_log_stats": True,
        **({} if speculative is None else {"speculative_config": {"method": "mtp", "model": str(demo.ADAPTER), **speculative}}),
    }


def ramp() -> tuple[list[str], list[int]]:
    """Prompts, and how many may be in flight when each starts: from 1 to 32 and back, three rounds of clients at each number."""
    counts = [*CLIENTS, *CLIENTS[-2::-1]]
    limits = [count for count in counts for _ in range(3 * count)]
    held_out = demo.mixed_prompts()
    prompts = [held_out[i % len(held_out)] for i in range(len(limits))]
    # Every other one with two more in front of it: three times as long.
    return [text if i % 2 else "\n".join([*held_out[i % 7 : i % 7 + 2], text]) for i, text in enumerate(prompts)], limits


def long_prompts() -> tuple[list[str], list[int]]:
    """Prompts of some 900 and 3,600 tokens, 1 to 16 at a time."""
    held_out, prompts, limits = demo.mixed_prompts(), [], []
    for clients in (1, 4, 16):
        for times in (8, 30):
            for i in range(clients):
                first = (7 * i + times) % len(held_out)
                prompts.append("\n".join((held_out * 3)[first : first + times])[-4 * 120 * times :])
                limits.append(clients)
    return prompts, limits


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def by_clients(plain: EngineProcess, ours: EngineProcess, options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for clients in CLIENTS:
        prompts = demo.mixed_prompts()[: max(16, 4 * clients)]
        comparison = compare(
            plain, ours, prompts, concurrency=clients, max_tokens=options.max_tokens, rounds=options.rounds, progress=say
        )
        found.append(comparison.figures())
    return found


def over_the_ramp(engines: dict[str, EngineProcess], options: argparse.Namespace) -> list[dict[str, Any]]:
    prompts, limits = ramp()
    runs = in_turns(
        engines,
        prompts,
        concurrency=limits,
        max_tokens=options.max_tokens // 2,
        rounds=options.rounds,
        progress=lambda round_: say(f"ramp: {round_}"),
    )
    counted = {name: [run.seconds for run in of_engine] for name, of_engine in runs.items()}
    return [
        {
            "layout": name,
            "seconds": statistics.median(seconds),
            "range": [min(seconds), max(seconds)],
            "over_auto": statistics.median(s / a for s, a in zip(seconds, counted["auto"], strict=True)),
            "tokens": runs[name][0].num_tokens,
        }
        for name, seconds in counted.items()
    ]


def forecast(options: argparse.Namespace) -> dict[str, Any]:
    """The ramp and longer prompts on `auto` in this process, after a first time: what ran, and what had been forecast."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    from vllm_mtp.cli.engine_worker import generate

    llm = LLM(**arguments(AUTO), hf_overrides={"max_position_embeddings": LONGEST}, max_model_len=LONGEST)
    executor: Any = llm.llm_engine.model_executor
    runner = executor.driver_worker.worker.model_runner
    control = runner.drafter.control
    observe, steps = control.observe, []

    def watched(tokens: list[int], rows: int, seconds: float, without: int, prompt_rows: int) -> None:
        context = float(runner.input_batch.num_tokens_no_spec[: len(tokens)].mean())
        if not control.cost.is_mostly_prompts(Batch(len(tokens), rows, context, prompt_rows)):
            expected = control.expected(len(tokens), rows, prompt_rows)
            steps.append((time.perf_counter(), len(tokens), control.running, context, seconds, expected))
        observe(tokens, rows, seconds, without, prompt_rows)

    def run(prompts: list[str], limits: list[int]) -> None:
        sampling = {"temperature": 0.0, "max_tokens": options.max_tokens // 2}
        generate(llm, {"prompts": prompts, "concurrency": limits, "sampling": sampling})

    say("forecast: a first time")
    for prompts in (ramp, long_prompts):
        run(*prompts())
    control.observe = watched
    start = time.perf_counter()
    say("forecast: the ramp")
    run(*ramp())
    in_ramp = len(steps)
    say("forecast: longer prompts")
    run(*long_prompts())

    cells: dict[tuple[int, int, tuple[int, ...]], list[tuple[float, float]]] = defaultdict(list)
    for _, requests, lengths, context, seconds, expected in steps:
        cells[(requests - 1).bit_length(), int(context // 256).bit_length(), lengths].append((seconds, expected))
    grid = [
        {
            "requests_up_to": 2**bucket,
            "context_up_to": 256 * 2**length,
            "layout": list(lengths),
            "steps": len(times),
            "measured_ms": 1e3 * statistics.median(seconds for seconds, _ in times),
            "forecast_ms": 1e3 * statistics.median(expected for _, expected in times),
        }
        for (bucket, length, lengths), times in sorted(cells.items())
        if len(times) >= 20
    ]
    errors = [abs(cell["forecast_ms"] / cell["measured_ms"] - 1) for cell in grid]
    return {
        "grid": grid,
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
        "median_error_of_a_step": statistics.median(abs(expected / seconds - 1) for *_, seconds, expected in steps),
        "steps": [[at - start, requests, list(lengths)] for at, requests, lengths, *_ in steps[:in_ramp]],
    }


def plot(report: dict[str, Any], path: Path) -> None:
    """The ratio by clients, the seconds of the ramp, and what ran while `auto` went through it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    clients = [cell["concurrency"] for cell in report["clients"]]
    for part, label in (("clients", "lossless"), ("by_confidence", "tau 0.9")):
        ratios = [cell["ratio"] for cell in report[part]]
        spread = [
            [ratio - cell["ratio_range"][0] for ratio, cell in zip(ratios, report[part], strict=True)],
            [cell["ratio_range"][1] - ratio for ratio, cell in zip(ratios, report[part], strict=True)],
        ]
        left.errorbar(clients, ratios, spread, marker="o", capsize=3, label=label)
    left.legend()
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(
        xscale="log",
        xticks=clients,
        xticklabels=clients,
        xlabel="clients",
        ylabel="tokens a second, auto over plain",
        ylim=(0, None),
    )
    rows = sorted(report["ramp"], key=lambda row: row["seconds"])
    middle.barh(
        [row["layout"] for row in rows],
        [row["seconds"] for row in rows],
        color=["C0" if row["layout"] == "auto" else "C7" for row in rows],
    )
    middle.set(xlabel="seconds for the ramp, median")
    steps = report["forecast"]["steps"]
    for number, lengths in enumerate(sorted({tuple(lengths) for *_, lengths in steps}, key=lambda of: (sum(of), of))):
        mine = [(at, requests) for at, requests, of in steps if tuple(of) == lengths]
        right.scatter(*zip(*mine, strict=True), s=6, color=f"C{number}", label=layout_name(lengths))
    right.set(xlabel="seconds", ylabel="requests in the step", yscale="log", yticks=clients, yticklabels=clients)
    right.legend(title="layout", fontsize=7, markerscale=2)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON; parts that are in it already are not run again")
    parser.add_argument("--plot", type=Path, help="PNG")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=128, help="of the clients' requests; half of it in the ramp")
    options = parser.parse_args()

    report: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    settings = {"rounds": options.rounds, "max_tokens": options.max_tokens, "k": K}
    if report.get("settings", settings) != settings:
        parser.error(f"{options.output} was begun with other settings, {report['settings']}: give those, or another file")
    report |= {"command": ["python", "-m", "benchmarks.load", *sys.argv[1:]], "machine": machine(), "settings": settings}

    def keep(part: str, found: Any) -> None:
        report[part] = found
        write_whole(options.output, json.dumps(below_here(report)) + "\n")

    if not {"clients", "by_confidence", "ramp"} <= report.keys():
        logs = Path(tempfile.mkdtemp(prefix="vllm-mtp-load-"))
        layouts = {"plain": None, "auto": AUTO, "tau 0.9": BY_CONFIDENCE, **({} if "ramp" in report else FIXED)}
        say(f"starting {len(layouts)} engines; their logs are in {logs}")
        with ExitStack() as stack:
            engines = {
                name: stack.enter_context(EngineProcess(arguments(layout), logs / f"{name.replace(' ', '-')}.log"))
                for name, layout in layouts.items()
            }
            for engine in engines.values():
                engine.wait_until_ready()
            if "clients" not in report:
                keep("clients", by_clients(engines["plain"], engines["auto"], options))
            if "by_confidence" not in report:
                keep("by_confidence", by_clients(engines["plain"], engines["tau 0.9"], options))
            engines.pop("tau 0.9")
            if "ramp" not in report:
                keep("ramp", over_the_ramp(engines, options))
    if "forecast" not in report:
        keep("forecast", forecast(options))

    for part in ("clients", "by_confidence"):
        print(f"| {part} | plain | auto | ratio | tokens a forward |\n|---|---|---|---|---|")
        for cell in report[part]:
            speed, (low, high) = cell["tokens_per_second"], cell["ratio_range"]
            cells = f"{speed['plain']:.0f} | {speed['ours']:.0f} | {cell['ratio']:.2f} ({low:.2f} to {high:.2f})"
            print(f"| {cell['concurrency']} | {cells} | {cell['tokens_per_forward']['ours']:.2f} |")
    print("\n| over the ramp | seconds | over auto |\n|---|---|---|")
    for row in sorted(report["ramp"], key=lambda row: row["seconds"]):
        print(
            f"| {row['layout']} | {row['seconds']:.2f} ({row['range'][0]:.2f} to {row['range'][1]:.2f}) | {row['over_auto']:.2f} |"
        )
    found = report["forecast"]
    off = " ".join(f"{name} {100 * found[key]:.0f} %" for name, key in OFF.items())
    print(f"\nforecast of step times, {len(found['grid'])} cells of requests, context and layout, off by: {off}")
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()
