"""What a benchmark found: `report.json`, and one HTML page that holds everything that it shows."""

import html
import io
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from safetensors import safe_open

from vllm_mtp.bench.config import PLAIN
from vllm_mtp.bench.run import SEARCH, Benchmark, Setting, ratios
from vllm_mtp.cli.engine import Generation
from vllm_mtp.cli.measure import num_identical
from vllm_mtp.machine import machine
from vllm_mtp.outputs import acceptance_by_position, acceptance_length, novel, tokens_per_forward
from vllm_mtp.whole_files import below_here, write_whole

OURS = "mtp"
"""The speculative method of this package."""


def figures(benchmark: Benchmark) -> dict[str, Any]:
    """All figures, as `report.json` holds them."""
    config = benchmark.config
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": sys.argv,
        "commit": _commit(),
        "machine": machine(),
        "model": config.base,
        "config": json.loads(config.model_dump_json()),
        "training": {name: _training(method.training) for name, method in config.methods.items() if method.training is not None},
        "search": list(_searched(benchmark)),
        "results": list(_results(benchmark)),
    }


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return found.stdout.strip() or None


def _training(file: Path) -> dict[str, Any]:
    facts = dict(json.loads(file.read_text(encoding="utf-8")))
    if facts.get("model_type") == "vllm_mtp":
        options, seconds = facts["training"]["options"], facts["training"]["seconds_since_last_resume"]
        tokens = options["steps"] * options["batch_size"] * options["length"]
        found = {"tokens": tokens, "steps": options["steps"], "minutes": seconds / 60, "parameters": _num_parameters(file.parent)}
        return {**found, "before": options.get("init_adapter")}
    if isinstance(facts.get("parameters"), dict):
        facts["parameters"] = facts["parameters"]["trained"]
    return facts


def _num_parameters(adapter: Path) -> int:
    total = 0
    for path in adapter.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  not a dictionary
    return total


def _searched(benchmark: Benchmark) -> Iterable[dict[str, Any]]:
    for setting in itertools.chain.from_iterable(benchmark.searched().values()):
        names = list(benchmark.config.methods[setting.method].search)
        for clients in benchmark.config.clients:
            runs = benchmark.book.group(SEARCH, clients, benchmark.config.temperatures[0])
            mine = runs.get(setting.key, {})
            if mine:
                yield {
                    "method": setting.method,
                    "setting": {name: (setting.speculative or {})[name] for name in names},
                    "clients": clients,
                    "ratio": statistics.median(ratios(runs, setting)),
                    "tokens_per_forward": tokens_per_forward(next(iter(mine.values())).outputs),
                    "chosen": benchmark.best(setting.method, clients) == setting,
                }


def _results(benchmark: Benchmark) -> Iterable[dict[str, Any]]:
    for temperature, clients, method, setting, runs in benchmark.compared():
        plain, mine = runs.get(Setting(PLAIN).key, {}), runs.get(setting.key, {})
        if not mine:
            continue
        first = min(mine)
        outputs = mine[first].outputs
        found = ratios(runs, setting)
        yield {
            "temperature": temperature,
            "clients": clients,
            "method": method,
            "speculative_config": setting.speculative,
            "tokens_per_second": statistics.median(run.tokens_per_second for run in mine.values()),
            "ratio": statistics.median(found) if found else None,
            "ratio_range": [min(found), max(found)] if found else None,
            "ratio_interval": interval(found),
            "ratios": found,
            "milliseconds_per_forward": statistics.median(1e3 * run.seconds / run.num_forwards for run in mine.values()),
            "tokens_per_forward": tokens_per_forward(outputs),
            "tokens_per_forward_novel": tokens_per_forward([novel(output) for output in outputs]),
            "acceptance_length": acceptance_length(outputs),
            "acceptance_by_position": acceptance_by_position(outputs),
            "identical": _identical(plain.get(first), mine[first]) if temperature == 0 else None,
            "num_prompts": len(outputs),
        }


STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t for 95 % with 1, 2, .. degrees of freedom; beyond, that of the last."""


def interval(found: Sequence[float]) -> list[float] | None:
    """Where such a ratio is with 95 % confidence, if rounds differ by chance; around the geometric mean. None for a single one."""
    if len(found) < 2:
        return None
    logarithms = [math.log(ratio) for ratio in found]
    half = STUDENT[min(len(found) - 1, len(STUDENT)) - 1] * statistics.stdev(logarithms) / math.sqrt(len(found))
    middle = statistics.fmean(logarithms)
    return [math.exp(middle - half), math.exp(middle + half)]


def _identical(plain: Generation | None, ours: Generation) -> int | None:
    return None if plain is None else num_identical(plain.outputs, ours.outputs)


# -- plots -------------------------------------------------------------------------------------------------------------


def _svg(draw: Callable[[Axes], None], **labels: str) -> str:
    """A figure as SVG for the inside of a page."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "vllm-mtp", "font.size": 11}):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set(**labels)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _over_clients(axes: Axes, clients: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(clients, [str(number) for number in clients])
    axes.set_ylim(0)


def plots(report: dict[str, Any]) -> dict[str, str]:
    """Title -> SVG."""
    greedy = [row for row in report["results"] if row["temperature"] == min(report["config"]["temperatures"])]
    methods = [name for name in report["config"]["methods"] if any(row["method"] == name for row in greedy)]
    colours = {PLAIN: "grey", **{name: f"C{i}" for i, name in enumerate(methods)}}
    fewest = min((row["clients"] for row in greedy), default=1)

    def speed(axes: Axes) -> None:
        for method in methods:
            mine = [row for row in greedy if row["method"] == method and row["ratio"] is not None]
            clients, middle = [row["clients"] for row in mine], [row["ratio"] for row in mine]
            spread = [
                [row["ratio"] - row["ratio_range"][0] for row in mine],
                [row["ratio_range"][1] - row["ratio"] for row in mine],
            ]
            axes.errorbar(clients, middle, spread, marker="o", capsize=3, label=method, color=colours[method])
        axes.axhline(1, color="grey", linewidth=1)
        _over_clients(axes, report["config"]["clients"])

    def positions(axes: Axes) -> None:
        for row in greedy:
            if row["clients"] == fewest and row["acceptance_by_position"]:
                shares = row["acceptance_by_position"]
                name, numbers = row["method"], range(1, len(shares) + 1)
                axes.plot(numbers, [100 * share for share in shares], marker="o", label=name, color=colours[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, 100)

    def drafts(axes: Axes) -> None:
        for method in methods:
            found: dict[int, float] = {}
            for row in report["search"]:
                k = row["setting"].get("num_speculative_tokens")
                if row["method"] == method and row["clients"] == fewest and k is not None:
                    found[k] = max(found.get(k, 0), row["tokens_per_forward"])
            if found:
                axes.plot(sorted(found), [found[k] for k in sorted(found)], marker="o", label=method, color=colours[method])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    def cost(axes: Axes) -> None:
        for method in [PLAIN, *methods]:
            mine = [row for row in greedy if row["method"] == method]
            clients, times = [row["clients"] for row in mine], [row["milliseconds_per_forward"] for row in mine]
            axes.plot(clients, times, marker="o", label=method, color=colours[method])
        _over_clients(axes, report["config"]["clients"])

    found = {
        "Tokens a second over plain vLLM's": _svg(speed, xlabel="clients", ylabel="ratio"),
        f"Acceptance by position, {fewest} client{'s' if fewest > 1 else ''}": _svg(
            positions, xlabel="draft", ylabel="% of the forwards that accepted it"
        ),
        "What a step costs": _svg(cost, xlabel="clients", ylabel="ms a forward"),
    }
    if any("num_speculative_tokens" in row["setting"] for row in report["search"]):
        found["Tokens a forward by drafts"] = _svg(drafts, xlabel="drafts a step", ylabel="tokens a forward")
    return found


# -- page --------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.marked { font-weight: 600; }
figure { margin: 1rem 0; } figure svg { background: #fff; border-radius: 6px; height: auto; max-width: 100%; }
figcaption { font-weight: 600; } code { overflow-wrap: anywhere; white-space: normal; }
"""

MEANING = """<h2>What the figures are</h2>
<p><b>Tokens a forward</b>: output tokens over the forwards that gave a request some, the prompt's included; plain decoding has 1.
<b>Novel</b>: each output only up to where 8 tokens in a row occur for the second time, since loops are easy to draft.
<b>ms a forward</b>: seconds of a run over its engine steps, prompts included.
Every run with its prompts and tokens is in <code>runs</code>. Commit <code>{commit}</code>.</p>"""


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(name: str, columns: Sequence[str], rows: Sequence[tuple[Sequence[str], bool]]) -> str:
    """An HTML table; a row is its cells and whether it stands out."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    kinds = {True: ' class="marked"', False: ""}
    body = "".join(
        f"<tr{kinds[marked]}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>" for cells, marked in rows
    )
    return f'<div class="scroll"><table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _is_ours(report: dict[str, Any], method: str) -> bool:
    found = report["config"]["methods"].get(method)
    return found is not None and found["speculative"].get("method") == OURS


def result_cells(row: dict[str, Any]) -> list[str]:
    """A comparison as the page and the README show it."""
    low, high = row["ratio_range"] or (None, None)
    spread = "-" if low is None else f"{low:.2f} to {high:.2f}"
    sure = "-" if row["ratio_interval"] is None else "{:.2f} to {:.2f}".format(*row["ratio_interval"])
    same = "-" if row["identical"] is None else f"{row['identical']} of {row['num_prompts']}"
    return [
        row["method"],
        _number(row["ratio"], 2),
        spread,
        sure,
        _number(row["tokens_per_second"], 0),
        _number(row["tokens_per_forward"], 2),
        _number(row["tokens_per_forward_novel"], 2),
        _number(row["milliseconds_per_forward"], 2),
        same,
    ]


RESULT_COLUMNS = (
    "method",
    "over plain",
    "lowest to highest",
    "95 %",
    "tokens a second",
    "tokens a forward",
    "novel",
    "ms a forward",
    "same output",
)

TRAINING_COLUMNS = ("tokens", "steps", "minutes", "parameters", "began from")


def training_cells(facts: dict[str, Any]) -> list[str]:
    """How a method was trained, as the page and the README show it."""
    counts = ["-" if facts.get(name) is None else f"{facts[name]:,}" for name in ("tokens", "steps", "parameters")]
    minutes = "-" if facts.get("minutes") is None else f"{facts['minutes']:.0f}"
    return [*counts[:2], minutes, counts[2], "an earlier run" if facts.get("before") else "nothing"]


SEARCH_COLUMNS = ("method", "clients", "over plain", "setting", "tokens a forward", "")


def search_cells(row: dict[str, Any]) -> list[str]:
    """A setting that was tried as the page shows it."""
    return [
        row["method"],
        str(row["clients"]),
        _number(row["ratio"], 2),
        ", ".join(f"{name} {value}" for name, value in row["setting"].items()),
        _number(row["tokens_per_forward"], 2),
        "chosen" if row["chosen"] else "",
    ]


def page(report: dict[str, Any]) -> str:
    """The HTML page. It loads nothing from elsewhere."""
    facts, config = report["machine"], report["config"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    where = f"{report['date']}, {facts['processor']}, {facts['cores']} cores; {versions}; base model "
    how = (
        f". Medians of {config['rounds']} rounds in which all methods ran in turns on the same prompts; a ratio is of a run and "
        "plain vLLM's of the same round (lowest to highest, and where it is with 95 % confidence)."
    )
    parts = [
        "<h1>Speculation on one build of vLLM</h1>",
        f"<p>{html.escape(where)}<code>{html.escape(report['model'])}</code>{html.escape(how)}</p>",
    ]
    for temperature in config["temperatures"]:
        for clients in config["clients"]:
            rows = [row for row in report["results"] if (row["temperature"], row["clients"]) == (temperature, clients)]
            if rows:
                kind = "greedy" if temperature == 0 else f"temperature {temperature:g}"
                parts.append(f"<h2>{clients} client{'s' if clients > 1 else ''}, {kind}</h2>")
                cells = [(result_cells(row), _is_ours(report, row["method"])) for row in rows]
                parts.append(_table(f"results-{temperature:g}-{clients}", RESULT_COLUMNS, cells))
    parts += [f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>" for title, svg in plots(report).items()]
    if report["training"]:
        cells = [([method, *training_cells(facts)], _is_ours(report, method)) for method, facts in report["training"].items()]
        parts += ["<h2>How they were trained</h2>", _table("training", ("method", *TRAINING_COLUMNS), cells)]
    if report["search"]:
        cells = [(search_cells(row), row["chosen"]) for row in report["search"]]
        parts += ["<h2>Settings that were tried</h2>", _table("search", SEARCH_COLUMNS, cells)]
    parts.append(MEANING.format(commit=html.escape(str(report["commit"]))))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Speculation on one build of vLLM</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def write_report(benchmark: Benchmark) -> dict[str, Any]:
    """Writes `report.json` and `report.html` into the benchmark's folder.

    Raises:
        OSError: they cannot be written.
    """
    report = below_here(figures(benchmark))
    write_whole(benchmark.folder / "report.json", json.dumps(report, indent=1) + "\n")
    write_whole(benchmark.folder / "report.html", page(report))
    return report
