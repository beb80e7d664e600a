"""Everything about the kernels that wants a GPU, in one command that ends in time: are they right there, do they touch memory that
is not theirs, which block sizes are best, how fast are they.

    python -m benchmarks.kernels.on_gpu --output out --minutes 9
    python -m benchmarks.kernels.on_gpu --output out --minutes 5 --steps kernels    # later, with other block sizes in the tables

Needs torch, Triton, pytest and hypothesis; no vLLM. The folder gets on_gpu.json (what ran, how it ended, how long it took), a log a
step, tune.json, kernels.json and its tables. Run again, tune.json and kernels.json go on where they stopped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = "tests/kernels"
FEW_SHAPES = "heads or row_tile or prefix_lengths_change"
FIRST = ("batch=1/", "context=32768")
"""Cells that are asked about first."""


@dataclass(frozen=True)
class Step:
    """One program.

    Attributes:
        name: of its log.
        command: as the shell has it.
        share: most of the time that is left when it begins.
        environment: beside the caller's.
    """

    name: str
    command: list[str]
    share: float
    environment: dict[str, str]


def steps(output: Path, smoke: bool) -> list[Step]:
    """All steps, in the order of their worth."""
    python, tiny = sys.executable, ["--smoke"] if smoke else []
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--confcutdir={TESTS}"]
    parallel = ["-n", "12"] if find_spec("xdist") and not smoke else []
    interpreter = {"TRITON_INTERPRET": "1", "KERNEL_EXAMPLES": "0.05"} if smoke else {}
    suite = [f"{TESTS}/test_gated_lora.py", f"{TESTS}/test_comb_attention.py", f"{TESTS}/test_references.py"]
    # Hundreds of launches a shape take the sanitizer too long: a few shapes, with whatever else their launches do.
    memcheck = [shutil.which("compute-sanitizer") or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    few = [*pytest, f"{TESTS}/test_gated_lora.py", f"{TESTS}/test_comb_attention.py", "-k", FEW_SHAPES]
    module, kernels = "benchmarks.kernels", str(output / "kernels.json")
    return [
        Step("tests", [*pytest, *parallel, *suite], 0.4, interpreter),
        Step("memcheck", few if smoke else [*memcheck, *few], 0.3, interpreter),
        Step("tune", [python, "-m", f"{module}.tune", "--output", str(output / "tune.json"), *tiny], 0.5, {}),
        Step("first", [python, "-m", module, "--output", kernels, "--only", *FIRST, *tiny], 0.9, {}),
        Step("kernels", [python, "-m", module, "--output", kernels, *tiny], 0.9, {}),
    ]


def run(step: Step, output: Path, seconds: float) -> dict[str, object]:
    """Runs a step for at most `seconds`; its output is in its log, and the end of it on the screen."""
    command = step.command
    if "--output" in command:
        command = [*command, "--minutes", f"{seconds / 60:.2f}"]
        seconds += 20  # a cell that has begun may end
    began, log = time.monotonic(), output / f"{step.name}.log"
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            )
            ended: object = done.returncode
        except subprocess.TimeoutExpired:
            ended = "ran out of its time"
        except FileNotFoundError:
            ended = f"{command[0]} is not installed"
    lines = log.read_text().splitlines()
    print(f"== {step.name}: {ended}, {time.monotonic() - began:.0f} s", *lines[-12:], sep="\n", flush=True)
    return {"ended": ended, "seconds": round(time.monotonic() - began), "last_line": lines[-1] if lines else ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--minutes", type=float, default=9, help="for all of it")
    parser.add_argument("--steps", nargs="+", default=[], help="of tests, memcheck, tune, first, kernels; all if left out")
    parser.add_argument("--smoke", action="store_true", help="tiny, on any machine: does it run?")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)

    import torch

    if not torch.cuda.is_available() and not options.smoke:
        raise SystemExit("No CUDA GPU: nothing here means anything without one; --smoke tries whether it runs.")
    results = {}
    for step in steps(options.output.resolve(), options.smoke):
        if options.steps and step.name not in options.steps:
            continue
        left = end - time.monotonic() - 20
        results[step.name] = run(step, options.output, step.share * left) if left > 0 else {"ended": "not begun: time was up"}
        (options.output / "on_gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    if wrong := [name for name in ("tests", "memcheck") if results.get(name, {}).get("ended", 0) != 0]:
        raise SystemExit(f"not passed: {', '.join(wrong)}; see the logs")


if __name__ == "__main__":
    main()
