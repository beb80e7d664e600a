"""Acceptance by confidence: how much of the target's greedy text is left, against tokens per forward, by threshold.

    python -m benchmarks.confidence --output confidence.json --plot confidence.png

Two rules at each tau, on the same engine and prompts, greedy, in float32 so that no rounding is taken for a difference:

- **verified** (this package's): a draft below tau is verified, and the run goes on if it is the target's best token;
- **truncated** (ConfAdapt, arXiv 2602.06019): the run ends at the first draft below tau, and nothing is verified. Here the drafts
  from there on are not handed to the engine at all; the token behind the run is the target's own, as in the other rule.

Agreement with the greedy text is given three times: outputs that are the same; tokens before an output's first difference; and
output tokens that are the target's best for the text before them, whatever that text is. The last is what each token costs, the
first two are what that grows to over an output. **Tokens per forward** is that of `benchmarks.acceptance`.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the truncated rule is put into the engine's worker, in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm_mtp import demo
from vllm_mtp.cli.engine_worker import generate
from vllm_mtp.cli.measure import machine
from vllm_mtp.outputs import Output, figures

RULES = ("verified", "truncated")
CONCURRENCY = 16


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def agreement(outputs: Sequence[Output], greedy: Sequence[Output], unmatched: int) -> dict[str, float]:
    """What is left of the greedy texts.

    Args:
        outputs, greedy: of the same prompts.
        unmatched: tokens of `outputs` that are not the target's best for the text before them.
    """
    tokens = sum(len(output.tokens) for output in outputs)
    return {
        "same_outputs": sum(a.tokens == b.tokens for a, b in zip(outputs, greedy, strict=True)) / len(outputs),
        "tokens_before_the_first_difference": sum(common_prefix(a.tokens, b.tokens) for a, b in zip(outputs, greedy, strict=True))
        / tokens,
        "best_tokens": 1 - unmatched / tokens,
    }


@contextmanager
def truncating(proposer: Any) -> Iterator[None]:
    """While it lasts, a request is given drafts up to its first one below tau only."""
    propose = proposer.propose

    def truncated(*args: Any, **kwargs: Any) -> list[list[int]]:
        drafts = propose(*args, **kwargs)
        for i, request in enumerate(proposer.runner.input_batch.req_ids):
            if drafts[i]:
                sure = proposer.drafted[request].confident(drafts[i])
                drafts[i] = drafts[i][: (*sure, False).index(False)]
        return drafts

    proposer.propose = truncated
    try:
        yield
    finally:
        del proposer.propose  # the method again


def run(llm: Any, prompts: Sequence[str], max_tokens: int, extra: dict[str, Any]) -> tuple[list[Output], int]:
    """Greedy outputs under a request's options, and how many of their tokens were taken against the target's best."""
    counters = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter.planner.counters
    before = counters.unmatched
    sampling = {"temperature": 0.0, "max_tokens": max_tokens, "extra_args": extra}
    found = generate(llm, {"prompts": list(prompts), "concurrency": CONCURRENCY, "sampling": sampling})
    return [Output(**output) for output in found["outputs"]], counters.unmatched - before


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| rule | tau | tokens a forward | novel | same outputs | tokens before the first difference | best tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts, found = row["figures"], row["agreement"]
        per_forward = f"{parts['all']['tokens_per_forward']:.2f} | {parts['novel']['tokens_per_forward']:.2f}"
        shares = " | ".join(f"{100 * found[name]:.0f} %" for name in ("same_outputs", "tokens_before_the_first_difference"))
        tau = "-" if row["tau"] is None else f"{row['tau']:g}"
        lines.append(f"| {row['rule']} | {tau} | {per_forward} | {shares} | {100 * found['best_tokens']:.1f} % |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Agreement over tokens per forward, a line a rule."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    for axis, (name, title) in zip(
        axes,
        (
            ("best_tokens", "tokens that are the target's best"),
            ("tokens_before_the_first_difference", "tokens before the first difference"),
        ),
        strict=True,
    ):
        for rule, style in zip(RULES, ("o-", "s--"), strict=True):
            chosen = [row for row in rows if row["rule"] == rule]
            per_forward = [row["figures"]["all"]["tokens_per_forward"] for row in chosen]
            axis.plot(per_forward, [100 * row["agreement"][name] for row in chosen], style, label=rule)
            for x, row in zip(per_forward, chosen, strict=True):
                axis.annotate(
                    f"{row['tau']:g}", (x, 100 * row["agreement"][name]), fontsize=7, xytext=(3, 3), textcoords="offset points"
                )
        lossless = next(row for row in rows if row["rule"] == "lossless")["figures"]["all"]["tokens_per_forward"]
        axis.axvline(lossless, color="grey", linewidth=0.8, label="lossless")
        axis.set_xlabel("tokens per forward")
        axis.set_ylabel(f"% {title}")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo.BASE)
    parser.add_argument("--adapter", type=Path, default=demo.ADAPTER)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--taus", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()

    from vllm import LLM

    llm = LLM(
        model=str(options.model),
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=CONCURRENCY,
        enable_prefix_caching=False,
        speculative_config={
            "method": "mtp",
            "model": str(options.adapter),
            "num_speculative_tokens": options.k,
            "layout": "quadratic",
            "acceptance": "confidence",
            "tau": 2,
        },
    )
    proposer = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter
    prompts = demo.prompts()[: options.prompts]
    greedy, _ = run(llm, prompts, options.max_tokens, {})
    rows = [{"rule": "lossless", "tau": None, "figures": figures(greedy), "agreement": agreement(greedy, greedy, 0)}]
    for rule in RULES:
        for tau in options.taus:
            if rule == "truncated":
                with truncating(proposer):
                    outputs, unmatched = run(llm, prompts, options.max_tokens, {"mtp_tau": tau})
            else:
                outputs, unmatched = run(llm, prompts, options.max_tokens, {"mtp_tau": tau})
            found = agreement(outputs, greedy, unmatched)
            rows.append({"rule": rule, "tau": tau, "figures": figures(outputs), "agreement": found})
            print(table(rows).splitlines()[-1], file=sys.stderr, flush=True)
    report = {
        "command": f"python -m benchmarks.confidence --k {options.k} --prompts {len(prompts)} --max-tokens {options.max_tokens} "
        f"--taus {' '.join(f'{tau:g}' for tau in options.taus)}",
        "machine": machine(),
        "k": options.k,
        "num_prompts": len(prompts),
        "max_tokens": options.max_tokens,
        "rows": rows,
    }
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    if options.plot is not None:
        plot(rows, options.plot)
    print(table(rows))


if __name__ == "__main__":
    main()
