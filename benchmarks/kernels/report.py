"""The output files: JSON that a later run continues, CSV of the same, plots of the ratios."""

import csv
import json
from pathlib import Path
from typing import Any

RATIO_TO = {"gated_lora": "gemm", "comb_attention": "decode", "step": "plain"}


def load(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The run to continue, or a new one.

    Raises:
        SystemExit: if the file is of another device or other versions.
    """
    if not path.exists():
        return {"facts": facts, "cells": {}}
    run = json.loads(path.read_text())
    if run["facts"] != facts:
        raise SystemExit(f"{path} was measured on {run['facts']}, this is {facts}; give another --output")
    return dict(run)


def save(path: Path, run: dict[str, Any]) -> None:
    """Writes the run so that an interruption leaves the former file or the new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(run, indent=2) + "\n")
    part.replace(path)


def baseline(run: dict[str, Any], cell: dict[str, Any]) -> float | None:
    """Median of the cell's baseline at the same shape, rows and k apart where they are what differs."""
    free = {"rows"} if cell["operation"] == "comb_attention" else {"rows", "k"} if cell["operation"] == "step" else set()
    wanted = {name: value for name, value in cell["shape"].items() if name not in free}
    for other in run["cells"].values():
        shape = {name: value for name, value in other["shape"].items() if name not in free}
        if other["operation"] == cell["operation"] and other["variant"] == RATIO_TO[cell["operation"]] and shape == wanted:
            return other.get("median_us")
    return None


def write_tables(path: Path, run: dict[str, Any]) -> list[Path]:
    """CSV and one plot an operation, beside the JSON."""
    rows = []
    for key, cell in run["cells"].items():
        base, took = baseline(run, cell), cell.get("median_us")
        ratio = took / base if base and took else None
        shape = " ".join(f"{name}={value}" for name, value in cell["shape"].items())
        rows.append({"cell": key, **{k: v for k, v in cell.items() if k != "shape"}, "shape": shape, "ratio": ratio})
    if not rows:
        return []
    table = path.with_suffix(".csv")
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return [table, *_plots(path, rows, run["facts"]["device"])]


def _plots(path: Path, rows: list[dict[str, Any]], device: str) -> list[Path]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    made = []
    for operation, base in RATIO_TO.items():
        mine = [row for row in rows if row["operation"] == operation and row["ratio"] and row["variant"] != base]
        if not mine:
            continue
        figure, axes = pyplot.subplots(figsize=(8, 1 + 0.22 * len(mine)))
        axes.barh([f"{row['shape']} {row['variant']}" for row in mine], [row["ratio"] for row in mine])
        axes.axvline(1, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.set_xlabel(f"time / time of {base}, {device}")
        axes.set_title(operation)
        figure.savefig(path.with_name(f"{path.stem}_{operation}.png"), bbox_inches="tight", dpi=120)
        pyplot.close(figure)
        made.append(path.with_name(f"{path.stem}_{operation}.png"))
    return made
