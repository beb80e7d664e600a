"""The figures of the documentation, as SVG: how a step is laid out, by the code that lays it out, and what was measured."""

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from vllm_mtp.cli.eval import tokens_per_forward
from vllm_mtp.layout import Groups, group_lengths, plan_groups, shapes_of
from vllm_mtp.shaping import Shaper, Verified

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
REAL, MASK, ACCEPTED, REJECTED, QUIET = "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#777777"
PREFIX = ("def", " add", "(a", ", b", "):")
ROWS, SAMPLED, DRAFTS = ("return", " a", " -"), " +", (" b", "\\n")


def groups_of(lengths: tuple[int, ...], drafts: int) -> Groups:
    """The groups of one request that verifies `drafts` drafts."""
    k = len(lengths) - 1
    groups = plan_groups((1 + drafts,), shapes_of(lengths, (drafts,)), k, k * (k + 1), k + 1, 1, torch.device("cpu"))
    assert groups is not None
    return groups


def _box(axes: Axes, x: float, y: float, text: str, colour: str, *, face: str | None = None) -> None:
    axes.add_patch(FancyBboxPatch((x, y), 0.86, 0.62, boxstyle="round,pad=0.02,rounding_size=0.08", ec=colour, fc=face or "white"))
    axes.text(x + 0.43, y + 0.31, text, ha="center", va="center", fontsize=9, family="monospace")


def _arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=9, color=colour))


def step() -> Figure:
    """One step of one request: rows that vLLM schedules, and the group of mask rows behind each."""
    k = len(DRAFTS)
    groups = groups_of(group_lengths("quadratic", k), k)
    figure = Figure(figsize=(9.2, 4.1))
    axes = figure.subplots()
    axes.set_axis_off()
    for i, token in enumerate(PREFIX):
        _box(axes, i * 0.95, 3, token, QUIET, face="#eeeeee")
    axes.text(0, 3.85, "prefix, in the KV cache", color=QUIET, fontsize=9)
    left = len(PREFIX) * 0.95 + 0.2
    verdicts = (("last token", REAL), ("draft, accepted", ACCEPTED), ("draft, rejected", REJECTED))
    for row, (token, (verdict, colour)) in enumerate(zip(ROWS, verdicts, strict=True)):
        x = left + row * 2.15
        _box(axes, x, 3, token, colour)
        axes.text(x + 0.43, 3.85, verdict, color=colour, fontsize=9, ha="center")
    used = groups.after[0][1]
    for group, (row, length) in enumerate(zip(groups.row.tolist(), groups.lengths, strict=True)):
        x = left + row * 2.15
        for i in range(length):
            _box(axes, x + i * 0.95, 1.85, f"<m{i + 1}>", MASK, face="#fbe9dd" if group == used else None)
        _arrow(axes, (x + 0.43, 2.95), (x + 0.43, 2.55), MASK)
        if group == used:
            _box(axes, x - 0.95, 0.35, SAMPLED, ACCEPTED)
            _arrow(axes, (x + 0.02, 2.95), (x - 0.5, 1.05), ACCEPTED)
            for i, draft in enumerate(DRAFTS[:length]):
                _box(axes, x + i * 0.95, 0.35, draft, REAL)
                _arrow(axes, (x + i * 0.95 + 0.43, 1.8), (x + i * 0.95 + 0.43, 1.05), REAL)
            axes.text(x - 1.05, 0.66, "sampled, as ever", fontsize=9, color=ACCEPTED, ha="right", va="center")
            axes.text(x, -0.05, "next drafts: from the group behind the row accepted last", fontsize=9, color=REAL)
    axes.text(0, 2.1, "mask rows: the same forward,\nwith a LoRA on these rows only", color=MASK, fontsize=9, va="center")
    axes.set_xlim(-0.1, left + 3 * 2.15)
    axes.set_ylim(-0.2, 4.2)
    return figure


def attention() -> Figure:
    """Which columns each row of that step attends to."""
    k, prefix = len(DRAFTS), len(PREFIX)
    groups = groups_of(group_lengths("quadratic", k), k)
    real = prefix + groups.num_real
    seen = np.zeros((groups.num_real + groups.num_rows, real + groups.num_rows), int)
    for row in range(groups.num_real):
        seen[row, : prefix + row + 1] = 1
    for mask, (group, i) in enumerate(zip(groups.group_of_row.tolist(), groups.mask_index.tolist(), strict=True)):
        line, first = groups.num_real + mask, real + groups.starts[group]
        seen[line, : prefix + int(groups.row[group]) + 1] = 2
        seen[line, first : first + i + 1] = 2
    figure = Figure(figsize=(7.4, 4.6))
    axes = figure.subplots()
    axes.imshow(seen, cmap=ListedColormap(["#ffffff", REAL, MASK]), vmin=0, vmax=2)
    behind = [ROWS[row].strip() for row in groups.row[groups.group_of_row].tolist()]
    masks = [f"<m{i + 1}> behind {token}" for i, token in zip(groups.mask_index.tolist(), behind, strict=True)]
    axes.set_yticks(range(len(seen)), [*(token.strip() for token in ROWS), *masks], fontsize=8)
    columns = [*(token.strip() for token in (*PREFIX, *ROWS)), *(mask.partition(" ")[0] for mask in masks)]
    axes.set_xticks(range(len(columns)), columns, fontsize=8, rotation=60)
    axes.xaxis.tick_top()
    axes.set_xticks(np.arange(-0.5, len(columns)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(seen)), minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("attended to: prefix, rows of the step, mask rows", fontsize=9)
    return figure


def layouts(k: int = 4) -> Figure:
    """Mask rows behind each row of a request, by layout, and under `auto` by how sure its drafts are."""
    shaper = Shaper(k, price=0.06)
    sure, doubtful = shaper.shapes([Verified("sure", [0.99, 0.98, 0.97, 0.95]), Verified("doubtful", [0.6, 0.4])], k * (k + 1))
    shown = {
        "quadratic": group_lengths("quadratic", k),
        "[4, 3, 2, 1, 0]": (4, 3, 2, 1, 0),
        "linear": group_lengths("linear", k),
        "auto, sure": sure,
        "auto, doubtful": doubtful,
    }
    figure = Figure(figsize=(13, 2.5))
    for axes, (name, lengths) in zip(figure.subplots(1, len(shown), sharey=True), shown.items(), strict=True):
        for row, length in enumerate(lengths):
            axes.bar(range(row * (k + 2), row * (k + 2) + 1), 1, color=REAL)
            axes.bar(range(row * (k + 2) + 1, row * (k + 2) + 1 + length), 1, color=MASK)
        axes.set_title(f"{name}: {len(lengths)} + {sum(lengths)} rows", fontsize=10)
        axes.set_xticks([row * (k + 2) for row in range(len(lengths))], range(len(lengths)), fontsize=8)
        axes.set(xlim=(-1, (k + 1) * (k + 2)))
        axes.set_xlabel("drafts accepted", fontsize=9)
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_visible(False)
    return figure


def acceptance(report: dict[str, Any]) -> Figure:
    """Tokens a forward by k, a plot for each domain."""
    ways = (
        ("quadratic", "sampler", "all", "quadratic, sampler head", REAL, "-o"),
        ("quadratic", "sampler", "novel", "the same, novel text only", REAL, "--o"),
        ("quadratic", "plain", "all", "quadratic, plain head", ACCEPTED, "-s"),
        ("linear", "sampler", "all", "linear, sampler head", MASK, "-^"),
    )
    budgets = [1, 2, 4, 8]
    figure = Figure(figsize=(9.2, 3.2))
    every = figure.subplots(1, len(report["domains"]), sharey=True)
    for axes, domain in zip(every, report["domains"], strict=True):
        for layout, head, part, label, colour, line in ways:
            values = [tokens_per_forward(report, domain, layout, head, k, part) or math.nan for k in budgets]
            axes.plot(budgets, values, line, color=colour, label=label)
        axes.axhline(1, color=QUIET, linewidth=1, label="plain decoding")
        axes.set_title(domain, fontsize=10)
        axes.set_xticks(budgets)
        axes.set_ylim(0.9)
        axes.set_xlabel("k, drafts a step")
    every[0].set_ylabel("tokens a forward")
    every[-1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def speed(report: dict[str, Any]) -> Figure:
    """Tokens a second against plain vLLM's, by clients, every pair of runs a point."""
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    clients = {one["concurrency"]: one for one in report["comparisons"]}
    parts = {f"1 client, {name}": part for name, part in report["domains"].items()}
    shown = {**parts, **{"1 client" if n == 1 else f"{n} clients": one for n, one in clients.items()}}
    for row, comparison in enumerate(shown.values()):
        axes.plot(comparison["runs"]["ratios"], [row] * len(comparison["runs"]["ratios"]), "o", color=REAL, alpha=0.5)
        axes.plot(comparison["ratio"], row, "|", color=REAL, markersize=22, markeredgewidth=2)
    axes.axvline(1, color=QUIET, linewidth=1)
    axes.set_yticks(range(len(shown)), list(shown))
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel("tokens a second over plain vLLM's: each pair of runs, and their median")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "step.svg": step,
    "attention.svg": attention,
    "layouts.svg": layouts,
    "acceptance.svg": lambda: acceptance(json.loads((RESULTS / "eval.json").read_text())),
    "speed.svg": lambda: speed(json.loads((RESULTS / "demo.json").read_text())),
}


def svg(figure: Figure) -> str:
    """A figure as SVG with its words as text, the same each time it is drawn."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vllm-mtp"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight", facecolor="white")
    return re.sub(r"[ \t]+$", "", file.getvalue(), flags=re.MULTILINE)


def drawn() -> dict[str, str]:
    """Every figure's file name and content."""
    return {name: svg(draw()) for name, draw in FIGURES.items()}


def words(picture: str) -> list[str]:
    """What is written in an SVG, in its order: what changes when a figure's facts do, whatever draws it."""
    return re.findall(r"<text[^>]*>([^<]*)<", picture)
