"""Every fault on real servers, one after the other, and the table of what became of the requests.

    python -m tests.faults --output faults.json
    python -m tests.faults --only worker_killed --only kernel_fails --output two.json

A quarter of an hour on one core. Logs are kept beside the JSON file, which is written anew after every fault. Exit status 0, or 1
when something was not as documented (docs/ops-faults.md), or 2 for wrong usage.
"""

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.faults.load import Outcome
from tests.faults.scenarios import SCENARIOS, Plain
from vllm_mtp.machine import machine

COLUMNS = ("sent", "answered", "left", "failed", "lost", "restarts", "blocks_leaked", "requests_leaked")


EPILOG = """Examples:

    python -m tests.faults --output faults.json

    python -m tests.faults --only worker_killed --only kernel_fails --output two.json
"""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=EPILOG)
def main(
    output: Annotated[Path, typer.Option(help="JSON file for every figure; logs go into a folder beside it.")],
    only: Annotated[list[str] | None, typer.Option(help="Name of a fault; repeatable. All of them when left out.")] = None,
) -> None:
    """Faults while requests run: what fails, what goes on, what is left behind."""
    names = only or list(SCENARIOS)
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(SCENARIOS)}")
    logs = output.with_suffix(".logs")
    logs.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"command": ["python", "-m", "tests.faults", *sys.argv[1:]], "machine": machine(), "faults": {}}
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("plain vLLM's answers", total=len(names))
        plain = Plain(logs)
        for name in names:
            progress.update(bar, description=name)
            report["faults"][name] = _run(name, logs, plain)
            output.write_text(json.dumps(report, indent=2) + "\n")
            progress.advance(bar)
    total = {column: sum(row[column] for row in report["faults"].values()) for column in COLUMNS}
    report["total"] = total
    output.write_text(json.dumps(report, indent=2) + "\n")
    _print({**report["faults"], "all": total})
    raise typer.Exit(0 if all(row["as_documented"] for row in report["faults"].values()) else 1)


def _run(name: str, logs: Path, plain: Plain) -> dict[str, Any]:
    begin = time.monotonic()
    try:
        outcome = SCENARIOS[name](logs, plain)
    except Exception as error:
        outcome = Outcome(missed=[f"{type(error).__name__}: {error}"], facts={"traceback": traceback.format_exc()})
    return {"what": SCENARIOS[name].__doc__, **outcome.row(), "wall_seconds": round(time.monotonic() - begin, 1)}


def _print(rows: dict[str, dict[str, Any]]) -> None:
    table = Table("fault", *(column.replace("_", " ") for column in COLUMNS), "as documented")
    for name, row in rows.items():
        table.add_row(name.replace("_", " "), *(str(row[column]) for column in COLUMNS), str(row.get("as_documented", "")))
    Console(width=140).print(table)
    for name, row in rows.items():
        for missed in row.get("missed", []):
            print(f"{name}: {missed}")


if __name__ == "__main__":
    app()
