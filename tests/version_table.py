"""The table of vLLM's releases in docs/support.md, made from what `tests.compat` has found; `python -m docs.generate` writes it."""

from pathlib import Path
from typing import Any

from tests.compat import RELEASES, TESTS, is_green, is_met
from tests.environments import ROOT
from vllm_mtp.contract import OPTIONS

RESULTS = ROOT / "benchmarks" / "results" / "compat.json"


def contract_cell(violations: dict[str, list[str]]) -> str:
    """Whether a release meets the contract, and what is refused on it."""
    unmet = [f"{'refused' if group in OPTIONS else 'not met'}: {group}" for group in violations]
    return "; ".join(["met", *unmet] if is_met(violations) else unmet)


def engine_cell(result: dict[str, Any]) -> str:
    """What was run on a release, by file, and what was not."""
    files = [
        f"`{Path(name).stem}` {file['passed']}" + (f" ({file['failed']} failed)" if file["failed"] else "")
        for name, file in sorted(result["files"].items())
    ]
    left = sorted({Path(test.split("::")[0]).stem for test in TESTS} - {Path(name).stem for name in result["files"]})
    cells = [f"{'green' if is_green(result) else '**red**'}: {', '.join(files)}"] if files else []
    return "; ".join([*cells, *([f"not run: {', '.join(f'`{name}`' for name in left)}"] if left else [])])


def table(report: dict[str, Any]) -> str:
    """The releases as Markdown, and what the engines were run with.

    Raises:
        ValueError: the releases were not run with one wheel.
    """
    engines, sources = report.get("engines", {}), report["sources"]
    wheels = {result["wheel"] for result in engines.values()}
    if len(wheels) > 1:
        raise ValueError(f"the releases were run with different wheels: run python -m tests.compat run --json {RESULTS}")
    lines = ["| vLLM | contract | engine tests passed |", "|---|---|---|"]
    for release in sorted({*engines, *sources}, key=lambda name: [*map(int, name.split("."))]):
        result = engines.get(release, {"contract": sources.get(release, {}), "files": {}})
        ran = engine_cell(result) if release in RELEASES or release in engines else "none; source read"
        lines.append(f"| {release} | {contract_cell(result['contract'])} | {ran} |")
    for result in list(engines.values())[:1]:
        machine = result["machine"]
        versions = f"Python {machine['python']}, torch {machine['versions']['torch']}, {machine['processor']}, no GPU"
        lines += ["", f"The wheel is the same on all (`{result['wheel']}`); {versions}."]
    return "\n".join(lines)
