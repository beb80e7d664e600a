"""`vllm-mtp demo`: plain vLLM and vLLM with the plugin side by side on prompts that the model has not seen."""

import math
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_mtp.cli.engine import EngineError, EngineProcess
from vllm_mtp.cli.measure import Comparison, compare, num_identical
from vllm_mtp.cli.show import print_completion, print_error, print_table
from vllm_mtp.demo import mixed_prompts
from vllm_mtp.machine import machine
from vllm_mtp.outputs import tokens_per_forward
from vllm_mtp.whole_files import write_figures

CONCURRENCIES = (1, 16)
PROMPTS_BY_CONCURRENCY = {1: 24, 16: 64}
NUM_FLOAT32_PROMPTS = 16
ROUNDS, SECONDS = 5, 120.0
"""Pairs of runs at each concurrency where the command line does not say, and how long they may take together: nobody waits half an
hour for a demo, however slow the machine."""


@dataclass(frozen=True)
class DemoOptions:
    """What the command line asked for; `vllm-mtp demo --help` says what each is."""

    model: str
    adapter: str
    num_prompts: int
    max_tokens: int
    num_speculative_tokens: int | None
    layout: str | None
    lookup: bool | None
    rounds: int | None
    enforce_eager: bool
    json_file: Path | None


class Progress:
    """Lines on standard error, so that standard output holds results only."""

    def __init__(self) -> None:
        self._console, self._start = Console(stderr=True, highlight=False), time.monotonic()

    def __call__(self, line: str) -> None:
        self._console.print(f"{time.monotonic() - self._start:5.0f} s  {line}", markup=False, soft_wrap=True)


def speculative_config(options: DemoOptions) -> dict[str, Any]:
    """The one JSON that selects the plugin."""
    given = {name: getattr(options, name) for name in ("num_speculative_tokens", "layout", "lookup")}
    return {"method": "mtp", "model": options.adapter, **{name: value for name, value in given.items() if value is not None}}


def engine_args(options: DemoOptions, *, dtype: str, enforce_eager: bool, speculative: bool) -> dict[str, Any]:
    """Arguments of `vllm.LLM`. Prefix caching is off, or every run after the first would skip its prompts."""
    arguments: dict[str, Any] = {
        "model": options.model,
        "dtype": dtype,
        "enforce_eager": enforce_eager,
        "max_num_seqs": max(CONCURRENCIES),
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    if speculative:
        arguments["speculative_config"] = speculative_config(options)
    return arguments


def _start(
    options: DemoOptions, stack: ExitStack, folder: Path, dtype: str, enforce_eager: bool, say: Progress
) -> list[EngineProcess]:
    """Plain vLLM and vLLM with the plugin, loaded at the same time."""
    engines = []
    for name, speculative in (("plain", False), ("mtp", True)):
        arguments = engine_args(options, dtype=dtype, enforce_eager=enforce_eager, speculative=speculative)
        engines.append(stack.enter_context(EngineProcess(arguments, folder / f"{name}-{dtype}.log")))
    # Ours first: if something is wrong with the adapter or an option, it is there.
    for name, engine in reversed(list(zip(("plain vLLM", "vLLM with vllm-mtp"), engines, strict=True))):
        engine.wait_until_ready()
        say(f"{name} is ready ({dtype}{', eager' if enforce_eager else ', compiled'})")
    return engines


def run(options: DemoOptions) -> int:
    """Run the demo; the exit status: 0, 1 when an engine failed, 2 when outputs in float32 differ."""
    from vllm_mtp.adapter import AdapterError, validate_folder

    out, say = Console(highlight=False), Progress()
    try:
        validate_folder(options.adapter, options.model)
        folder = Path(tempfile.mkdtemp(prefix="vllm-mtp-demo-"))
        say(f"starting two engines; their logs are in {folder}")
        report = _run(options, folder, out, say)
    except (AdapterError, EngineError) as error:
        print_error(error)
        return 1
    if options.json_file is not None:
        try:
            write_figures(options.json_file, report)
        except OSError as error:
            print_error(error)
            return 1
    return 0 if report["float32"]["identical"] == report["float32"]["num_prompts"] else 2


def _run(options: DemoOptions, folder: Path, out: Console, say: Progress) -> dict[str, Any]:
    prompts = mixed_prompts()
    shown = prompts[: options.num_prompts]
    with ExitStack() as stack:
        plain, ours = _start(options, stack, folder, "bfloat16", options.enforce_eager, say)
        completions = ours.generate(shown, max_tokens=options.max_tokens)
        for prompt, output in zip(shown, completions.outputs, strict=True):
            out.rule(f"{tokens_per_forward([output]):.2f} tokens a forward", align="left")
            print_completion(out, prompt, output)
        out.rule(align="left")
        comparisons = [
            compare(
                plain,
                ours,
                prompts[: PROMPTS_BY_CONCURRENCY[concurrency]],
                concurrency=concurrency,
                max_tokens=options.max_tokens,
                rounds=options.rounds or ROUNDS,
                progress=say,
                limit=math.inf if options.rounds else SECONDS,
            )
            for concurrency in CONCURRENCIES
        ]
    checked = prompts[: max(NUM_FLOAT32_PROMPTS, options.num_prompts)]
    with ExitStack() as stack:
        plain, ours = _start(options, stack, folder, "float32", True, say)
        exact = [engine.generate(checked, max_tokens=options.max_tokens) for engine in (plain, ours)]
    float32 = {"num_prompts": len(checked), "identical": num_identical(exact[0].outputs, exact[1].outputs)}
    _print_figures(out, comparisons, float32)
    return {
        "command": sys.argv,
        "speculative_config": speculative_config(options),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()},
        "machine": machine(),
        "comparisons": [comparison.figures() for comparison in comparisons],
        "domains": {name: part.figures() for name, part in comparisons[0].by_domain().items()},
        "float32": float32,
        "shown": [{"prompt": prompt, **asdict(output)} for prompt, output in zip(shown, completions.outputs, strict=True)],
    }


def _print_figures(out: Console, comparisons: list[Comparison], float32: dict[str, int]) -> None:
    rows = []
    parts = {f"1 client, {name}": part for name, part in comparisons[0].by_domain().items()}
    wholes = {"1 client" if one.concurrency == 1 else f"{one.concurrency} clients": one for one in comparisons}
    for clients, comparison in {**parts, **wholes}.items():
        figures = comparison.figures()
        low, high = figures["ratio_range"]
        for key, digits, ratio in (
            ("tokens per forward", 2, ""),
            ("tokens per second", 0, f"{figures['ratio']:.2f} ({low:.2f} to {high:.2f})"),
        ):
            values = (f"{figures[key.replace(' ', '_')][name]:.{digits}f}" for name in ("plain", "ours"))
            rows.append([clients, key, *values, ratio])
        rows.append([clients, "same output", "", f"{figures['identical']} of {figures['num_prompts']}", ""])
    rows.append(["float32", "same output", "", f"{float32['identical']} of {float32['num_prompts']}", ""])
    pairs = " and ".join(dict.fromkeys(str(len(one.plain)) for one in comparisons))
    title = f"Medians of {pairs} pairs of runs in bfloat16, in turns (ratio: lowest to highest)"
    print_table(out, title, ["", "", "plain vLLM", "with vllm-mtp", "ratio"], rows)
    if float32["identical"] == float32["num_prompts"]:
        out.print("Greedy outputs are identical where rounding cannot decide (float32).", soft_wrap=True)
    else:
        out.print("Greedy outputs DIFFER in float32: this is a fault.", soft_wrap=True)
    out.print(
        "In bfloat16 sums round differently when a batch has another shape, so a near-tie may fall the other way; plain vLLM at"
        " another concurrency does the same.",
        soft_wrap=True,
    )
