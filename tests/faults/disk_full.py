"""A disk that is full while training, measuring and exporting: a clear error, a failing exit status, nothing half-written.

    python -m tests.faults.disk_full --output disk.json

The disk is a file system in memory of a few hundred kilobytes, mounted in a namespace of this process alone (unshare, Linux); no
privilege is needed where the kernel lets users have namespaces. Exit status 0, or 1 when something was not as documented.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_mtp.machine import machine

INSIDE = "VLLM_MTP_TEST_NAMESPACE"
TRAININGS = ((4, 2), (40, 2), (90, 2), (180, 2), (260, 2), (180, 6))
"""KiB, and steps between checkpoints, of 6. So the disk becomes full at the sequences that the base made, in the first checkpoint's
weights, in its optimizer, in those of the second one, in the export behind the only one."""
CLI = ("-c", "from vllm_mtp.cli.main import app; app()")


def enter_namespace() -> None:
    """Starts this command again where file systems may be mounted."""
    os.environ[INSIDE] = "1"
    os.execvp(
        "unshare",
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-m", "tests.faults.disk_full", *sys.argv[1:]],
    )


@contextmanager
def disk(folder: Path, kilobytes: int) -> Any:
    """A folder on a disk of that size."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize(folder: Path, kilobytes: int) -> None:
    """Makes the disk larger, as an operator who clears space."""
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(folder)], check=True)


def run(*command: str, **environment: str) -> dict[str, Any]:
    """A command's exit status, the last line that it printed, and whether it printed a traceback."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return {"status": done.returncode, "says": lines[-1] if lines else "", "traceback": "Traceback" in done.stderr}


def _failed_clearly(result: dict[str, Any]) -> list[str]:
    missed = []
    if result["status"] == 0:
        missed.append("the exit status is 0")
    if result["traceback"]:
        missed.append("a traceback in the place of a sentence")
    told = result["says"]
    names_it = "could not be written" in told or "(log: " in told  # what an engine's process met stands in its log
    if not told.startswith("error: ") or "space" not in told.lower() or not names_it:
        missed.append(f"the error does not say what is wrong: {told}")
    return missed


def training(scratch: Path, kilobytes: int, save_steps: int) -> dict[str, Any]:
    """Training on a disk that becomes full at some point; with space again, the same command goes on and ends."""
    from tests.unit.tiny_models import save_tiny_base
    from vllm_mtp.adapter import read_adapter
    from vllm_mtp.train.trainer import last_checkpoint

    base, data = scratch / "base", scratch / "data.jsonl"
    if not base.exists():
        save_tiny_base(base)
        data.write_text("".join(json.dumps({"text": f"line {i}: {i * i}\n" * 4}) + "\n" for i in range(20)))
    missed = []
    with disk(scratch / f"full-{kilobytes}-{save_steps}", kilobytes) as folder:
        output = folder / "run"
        options = ["--steps", "6", "--save-steps", str(save_steps), "--rank", "4", "--length", "32", "--batch-size", "2"]
        options += ["--groups", "4", "--mask-tokens", "2", "--on-policy-sequences", "6", "--on-policy-engine", "transformers"]
        command = [*CLI, "train", "--base", str(base), "--data", str(data), "--output", str(output), *options]
        first = run(*command)
        missed += _failed_clearly(first)
        left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        whole = last_checkpoint(output) if output.exists() else None
        kept = {str(path) for path in output.glob("checkpoint-*")}
        if kept - {whole} and not all(Path(path, "trainer_state.json").stat().st_size for path in kept):
            missed.append(f"a part of a checkpoint is left: {sorted(kept)}")
        if [name for name in left if name.endswith(".part")] or (output / "adapter").exists():
            missed.append(f"half-written files are left: {left}")
        resize(folder, 100_000)
        second = run(*command)
        if second["status"] != 0:
            missed.append(f"with space again: {second['says']}")
        else:
            read_adapter(output / "adapter")
    return {
        "first": first,
        "checkpoint": whole and Path(whole).name,
        "left": left,
        "with_space": {"status": second["status"]},
        "missed": missed,
    }


def _measurement(scratch: Path, name: str, command: list[str], option: str) -> dict[str, Any]:
    missed = []
    with disk(scratch / name, 64) as folder:
        file = folder / "figures.json"
        file.write_text("{}")
        with (folder / "filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass
        result = run(*command, option, str(file), OMP_NUM_THREADS="1")
        missed += _failed_clearly(result)
        if file.read_text() != "{}":
            missed.append("the file that was there is damaged")
        if {path.name for path in folder.iterdir()} - {"figures.json", "filler", "figures.logs"}:
            missed.append("half-written files are left")
    return {**result, "missed": missed}


def demo(scratch: Path) -> dict[str, Any]:
    """`vllm-mtp demo --json` on a full disk."""
    options = ["--prompts", "1", "--max-tokens", "8", "--rounds", "1", "--enforce-eager"]
    return _measurement(scratch, "demo", [*CLI, "demo", *options], "--json")


def doctor(scratch: Path) -> dict[str, Any]:
    """`vllm-mtp doctor --json` on a full disk."""
    return _measurement(scratch, "doctor", [*CLI, "doctor", "--no-decode"], "--json")


def acceptance(scratch: Path) -> dict[str, Any]:
    """`python -m benchmarks.acceptance --output` on a full disk; its engine's logs are beside the file, on the same disk."""
    options = ["--k", "1", "--layouts", "linear", "--samplers", "yes", "--temperatures", "0", "--prompts", "2", "--max-tokens", "4"]
    return _measurement(scratch, "acceptance", ["-m", "benchmarks.acceptance", *options], "--output")


EPILOG = """Example:

    python -m tests.faults.disk_full --quick --output disk.json
"""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=EPILOG)
def main(
    output: Annotated[Path, typer.Option(help="JSON file for what was found.")],
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what starts engines.")] = False,
) -> None:
    """A full disk while training and measuring."""
    if INSIDE not in os.environ:
        enter_namespace()
    scratch = Path(tempfile.mkdtemp(prefix="vllm-mtp-disk-"))
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        f"training, {kilobytes} KiB, a checkpoint every {every} steps": partial(training, scratch, kilobytes, every)
        for kilobytes, every in TRAININGS
    }
    cases["doctor"] = lambda: doctor(scratch)
    if not quick:
        cases |= {"demo": lambda: demo(scratch), "acceptance": lambda: acceptance(scratch)}
    found: dict[str, dict[str, Any]] = {}
    try:
        for name, case in cases.items():
            found[name] = case()
            print(f"{name}: {'as documented' if not found[name]['missed'] else found[name]['missed']}", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report = {"command": "python -m tests.faults.disk_full", "machine": machine(), "cases": found}
    output.write_text(json.dumps(report, indent=2).replace(f"{scratch}/", "") + "\n")
    raise typer.Exit(1 if any(result["missed"] for result in found.values()) else 0)


if __name__ == "__main__":
    app()
