"""Drafters for the demo's base, each trained from nothing for the same time on the same sequences: what `make bench` compares.

    python -m benchmarks.baselines.demo --output runs/baselines

The adapter comes first: its run makes the sequences, and the others end after `--minutes`, which is what its steps take on one core
of the machine that the shipped figures are from. What is finished is not trained again, and a killed run goes on.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.demo_model.train_adapter import MIXTURE
from vllm_mtp import demo

STEPS, MINUTES = 500, 10.0
METHODS = ("eagle", "medusa", "draft")
ADAPTER_OPTIONS = {"groups": 40, "on_policy": 0.75, "on_policy_greedy": 0.75}


def run(module: str, *words: object) -> None:
    """A training of its own process, on one thread."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run([sys.executable, "-m", module, *map(str, words)], check=True, env=environment)


def train(output: Path, base: Path, steps: int, minutes: float, methods: tuple[str, ...]) -> None:
    """The adapter in OUTPUT/mtp, and each method in OUTPUT/METHOD; those that are there are left as they are."""
    adapter = output / "mtp"
    if not (adapter / "adapter" / "config.json").exists():
        options = json.dumps(ADAPTER_OPTIONS)
        given = ("--steps", steps, "--mixture", json.dumps(MIXTURE), "--options", options)
        run("benchmarks.demo_model.train_adapter", "--base", base, "--output", adapter, *given)
    for method in methods:
        folder = output / method
        if not (folder / method / "training.json").exists():
            limit = ("--data", adapter, "--minutes", minutes, "--compile")
            run("benchmarks.baselines.train", method, "--base", base, "--output", folder, *limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--base", type=Path, default=demo.BASE)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the adapter")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of each other method")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS, help="beside the adapter")
    options = parser.parse_args()
    try:
        train(options.output, options.base, options.steps, options.minutes, tuple(options.methods))
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {' '.join(error.cmd[1:4])} ended with status {error.returncode}")


if __name__ == "__main__":
    main()
