"""What a run leaves to look at: its history as JSON, and a picture of losses and tokens per forward."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vllm_mtp.config import MAX_MASK_TOKENS
from vllm_mtp.whole_files import whole, write_whole

LOSSES = ("loss", "plain", "sampler", "consistency")
EVALUATED = "eval_"
"""What transformers writes before the name of an evaluation's figure."""


def write_history(history: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Writes `history.json` and `curves.png`.

    Args:
        history: entries of the Trainer's log, each with its `step`.
        folder: where to; what is there is replaced.

    Raises:
        OSError: they cannot be written.
    """
    write_whole(folder / "history.json", json.dumps(list(history), indent=1) + "\n")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot(left, history, LOSSES)
    left.set(title="Losses", xlabel="step")
    head = "sampler" if series(history, f"{EVALUATED}quadratic.sampler.1")[0] else "plain"
    budgets = [k for k in range(1, MAX_MASK_TOKENS + 1) if series(history, f"{EVALUATED}quadratic.{head}.{k}")[0]]
    _plot(right, history, [f"{EVALUATED}quadratic.{head}.{k}" for k in budgets])
    right.set(title=f"Tokens per forward, held out, quadratic, {head} head", xlabel="step")
    with whole(folder / "curves.png") as part:
        figure.savefig(part, format="png", dpi=120)


def series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps at which a figure was logged, and its values."""
    entries = [entry for entry in history if name in entry]
    return [entry["step"] for entry in entries], [entry[name] for entry in entries]


def _plot(axes: Axes, history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    for name in names:
        steps, values = series(history, name)
        if steps:
            label = f"k = {name.rpartition('.')[2]}" if name.startswith(EVALUATED) else name
            axes.plot(steps, values, label=label, marker="o" if len(steps) < 20 else "", markersize=3)
    if axes.lines:
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)
