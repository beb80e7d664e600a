"""Acceptance by confidence: how much of the target's greedy text is left, against tokens per forward, by threshold.

    python -m benchmarks.confidence --output confidence.json --plot confidence.png
    python -m benchmarks.confidence --domain arithmetic --output arithmetic.json --plot arithmetic.png
    python -m benchmarks.confidence --domain arithmetic --dtype bfloat16 --compiled --layout auto --clients 1 --output speed.json

Three rules, the first two at each tau, on the same engine and prompts, greedy, in float32 so that no rounding is taken for a
difference:

- **verified** (this package's): a draft below tau is verified, and the run goes on if it is the target's best token;
- **truncated** (ConfAdapt, arXiv 2602.06019): the run ends at the first draft below tau, and nothing is verified. Here the drafts
  from there on are not handed to the engine at all; the token behind the run is the target's own, as in the other rule;
- **static**: a number of drafts is taken in each step as they come.

Agreement with the greedy text is given three times: outputs that are the same; tokens before an output's first difference; and
output tokens that are the target's best for the text before them, whatever that text is. The last is what each token costs, the
first two are what that grows to over an output. **Tokens per forward** is that of `benchmarks.acceptance`. Arithmetic problems also
have an **accuracy**: the share of right answers.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the truncated rule is put into the engine's worker, in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from benchmarks.demo_model import arithmetic
from vllm_mtp import demo
from vllm_mtp.cli.engine_worker import generate
from vllm_mtp.machine import machine
from vllm_mtp.outputs import Output, agreement, figures
from vllm_mtp.whole_files import write_figures

RULES = ("verified", "truncated")
STATIC = "static"


@contextmanager
def truncating(proposer: Any) -> Iterator[None]:
    """While it lasts, a request is given drafts up to its first one below tau only."""
    propose = proposer.propose

    def truncated(*args: Any, **kwargs: Any) -> list[list[int]]:
        drafts = propose(*args, **kwargs)
        for i, request in enumerate(proposer.runner.input_batch.req_ids):
            if drafts[i]:
                sure = proposer.given.drafted[request].confident(drafts[i])
                drafts[i] = drafts[i][: (*sure, False).index(False)]
        return drafts

    proposer.propose = truncated
    try:
        yield
    finally:
        del proposer.propose  # the method again


class Run(NamedTuple):
    """Greedy outputs, how many of their tokens were taken against the target's best, and the seconds of all."""

    outputs: list[Output]
    unmatched: int
    seconds: float


def run(llm: Any, prompts: Sequence[str], options: argparse.Namespace, extra: dict[str, Any]) -> Run:
    """All prompts under a request's options."""
    counters = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter.planner.counters
    before = counters.unmatched
    sampling = {"temperature": 0.0, "max_tokens": options.max_tokens, "extra_args": extra}
    found = generate(llm, {"prompts": list(prompts), "concurrency": options.clients, "sampling": sampling})
    outputs = [Output(**output) for output in found["outputs"]]
    return Run(outputs, counters.unmatched - before, found["seconds"])


def row(rule: dict[str, Any], found: Run, greedy: Sequence[Output], answers: Sequence[int] | None) -> dict[str, Any]:
    """A row of the table: a rule, at a threshold or with a number of drafts."""
    outputs, unmatched, seconds = found
    figured = {
        **rule,
        "figures": figures(outputs),
        "agreement": {**agreement(outputs, greedy), "best_tokens": 1 - unmatched / sum(len(output.tokens) for output in outputs)},
        "tokens_per_second": sum(len(output.tokens) for output in outputs) / seconds,
    }
    if answers is not None:
        given = [arithmetic.answer("".join(output.pieces)) for output in outputs]
        figured["accuracy"] = sum(a == b for a, b in zip(given, answers, strict=True)) / len(answers)
    return figured


def label(row: dict[str, Any]) -> str:
    """Its threshold or number of drafts."""
    return next((f"{row[name]:g}" for name in ("tau", "drafts") if row.get(name) is not None), "-")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| rule | tau or drafts | tokens a forward | novel | same outputs | before a difference | best tokens | right | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts, found = row["figures"], row["agreement"]
        per_forward = f"{parts['all']['tokens_per_forward']:.2f} | {parts['novel']['tokens_per_forward']:.2f}"
        shares = " | ".join(f"{100 * found[name]:.0f} %" for name in ("same_outputs", "tokens_before_the_first_difference"))
        accuracy = f"{100 * row['accuracy']:.1f} %" if "accuracy" in row else "-"
        cells = [row["rule"], label(row), per_forward, shares, f"{100 * found['best_tokens']:.1f} %", accuracy]
        lines.append(f"| {' | '.join(cells)} | {row['tokens_per_second']:.0f} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path, *, timed: bool) -> None:
    """Agreement over tokens per forward, and over tokens a second if that is as it would be served; a line a rule, whose points say
    the threshold or the number of drafts."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    kinds = {
        "best_tokens": "tokens that are the target's best",
        "tokens_before_the_first_difference": "tokens before the first difference",
        **({"accuracy": "right answers"} if "accuracy" in rows[0] else {}),
    }

    def value(row: dict[str, Any], name: str) -> float:
        return 100 * (row["accuracy"] if name == "accuracy" else row["agreement"][name])

    speeds: dict[str, Callable[[dict[str, Any]], float]] = {
        "tokens per forward": lambda row: float(row["figures"]["all"]["tokens_per_forward"]),
        **({"tokens a second": lambda row: float(row["tokens_per_second"])} if timed else {}),
    }
    figure, grid = plt.subplots(len(speeds), len(kinds), figsize=(5 * len(kinds), 4 * len(speeds)), sharex="row", squeeze=False)
    for (name, title), (speed, of) in itertools.product(kinds.items(), speeds.items()):
        axis = grid[list(speeds).index(speed), list(kinds).index(name)]
        for rule, style in zip((*RULES, STATIC), ("o-", "s--", "^:"), strict=True):
            chosen = [row for row in rows if row["rule"] == rule]
            axis.plot([of(row) for row in chosen], [value(row, name) for row in chosen], style, label=rule)
            for row in chosen:
                axis.annotate(label(row), (of(row), value(row, name)), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.axvline(of(next(row for row in rows if row["rule"] == "lossless")), color="grey", linewidth=0.8, label="lossless")
        axis.set(xlabel=speed, ylabel=f"% {title}")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo.BASE)
    parser.add_argument("--adapter", type=Path, default=demo.ADAPTER)
    parser.add_argument("--mask-token-id", type=int, help="of a model that drafts for itself: --model and --adapter are its folder")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--domain", choices=demo.DOMAINS, default="code")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compiled", action="store_true", help="as it would be served: for tokens a second")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--layout", choices=["quadratic", "auto"], default="quadratic")
    parser.add_argument("--clients", type=int, default=16, help="requests at a time")
    parser.add_argument("--taus", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--static", type=int, nargs="*", default=[1, 2, 4, 8], help="numbers of drafts that are taken as they come")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()

    from vllm import LLM

    llm = LLM(
        model=str(options.model),
        dtype=options.dtype,
        enforce_eager=not options.compiled,
        max_num_seqs=options.clients,
        enable_prefix_caching=False,
        speculative_config={
            "method": "mtp",
            "model": str(options.adapter),
            "num_speculative_tokens": options.k,
            "layout": options.layout,
            "lookup": False,
            "acceptance": "confidence",
            "tau": 2,
            **({} if options.mask_token_id is None else {"mask_token_id": options.mask_token_id}),
        },
    )
    proposer = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter
    prompts, answers = demo.prompts(options.domain)[: options.prompts], None
    if options.domain == "arithmetic":
        answers = demo.answers()[: options.prompts]
    run(llm, prompts[: options.clients], options, {})  # warm
    lossless = run(llm, prompts, options, {})
    greedy = lossless.outputs
    rows = [row({"rule": "lossless", "tau": None}, lossless, greedy, answers)]
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        *(({"rule": rule, "tau": tau}, {"mtp_tau": tau}) for rule in RULES for tau in options.taus),
        *(({"rule": STATIC, "drafts": count}, {"mtp_tau": 0, "mtp_drafts": count}) for count in options.static),
    ]
    for rule, extra in asked:
        with truncating(proposer) if rule["rule"] == "truncated" else nullcontext():
            found = run(llm, prompts, options, extra)
        rows.append(row(rule, found, greedy, answers))
        print(table(rows).splitlines()[-1], file=sys.stderr, flush=True)
    report = {
        "command": ["python", "-m", "benchmarks.confidence", *sys.argv[1:]],
        "machine": machine(),
        "domain": options.domain,
        "dtype": options.dtype,
        "compiled": options.compiled,
        "k": options.k,
        "layout": options.layout,
        "clients": options.clients,
        "num_prompts": len(prompts),
        "max_tokens": options.max_tokens,
        "rows": rows,
    }
    write_figures(options.output, report)
    if options.plot is not None:
        plot(rows, options.plot, timed=options.compiled)
    print(table(rows))


if __name__ == "__main__":
    main()
