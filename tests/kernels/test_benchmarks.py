"""The benchmark's command: it runs, continues where it stopped, and says so where it cannot measure."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import DEVICE, ROOT


def run(*options: str | Path, module: str = "benchmarks.kernels") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_smoke_times_every_kernel_and_continues(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    first = run("--output", output, "--smoke", "--only", "gated_lora")
    assert first.returncode == 0, first.stderr
    measured = json.loads(output.read_text())["cells"]
    assert {cell["variant"] for cell in measured.values()} == {"gemm", "torch", "punica", "fused", "add"}

    second = run("--output", output, "--smoke")
    assert second.returncode == 0, second.stderr
    cells = json.loads(output.read_text())["cells"]
    assert {cell["operation"] for cell in cells.values()} == {"gated_lora", "comb_attention", "step"}
    assert {key: cells[key] for key in measured} == measured
    again = [line for line in second.stdout.splitlines() if line.startswith("gated_lora/")]
    assert all("/punica: ImportError" in line for line in again)  # what failed is tried again
    for cell in cells.values():
        assert cell.get("median_us", 0) > 0 or cell["variant"] == "punica"  # vLLM's, where it is installed and finds a GPU
        assert cell["bytes"] > 0
        assert cell["flops"] > 0
        assert cell["floor_us"] > 0
    with (tmp_path / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(cells)
    assert all(float(row["ratio"]) > 0 for row in rows if row["variant"] != "punica")
    assert (tmp_path / "kernels_step.png").stat().st_size > 0


def test_smoke_tunes_and_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "tune.json"
    first = run("--output", output, "--smoke", "--minutes", "0", module="benchmarks.kernels.tune")
    assert first.returncode == 0, first.stderr
    assert "time is up" in first.stdout
    second = run("--output", output, "--smoke", module="benchmarks.kernels.tune")
    assert second.returncode == 0, second.stderr
    cells = json.loads(output.read_text())["cells"]
    assert len(cells) == 3
    for cell in cells.values():
        assert sum(entry["chosen"] for entry in cell["tried"]) == 1
        assert len(cell["tried"]) > 1
        assert all(entry["median_us"] > 0 for entry in cell["tried"])
    again = run("--output", output, "--smoke", module="benchmarks.kernels.tune")
    assert again.stdout == ""


def test_smoke_of_all_that_a_gpu_is_asked(tmp_path: Path) -> None:
    done = run("--output", tmp_path, "--smoke", "--minutes", "3", module="benchmarks.kernels.on_gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    ended = json.loads((tmp_path / "on_gpu.json").read_text())
    assert [step["ended"] for step in ended.values()] == [0] * 5
    assert " passed" in ended["tests"]["last_line"]
    assert {cell["operation"] for cell in json.loads((tmp_path / "kernels.json").read_text())["cells"].values()} >= {"step"}


def test_a_failed_test_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNEL_EXAMPLES", "no number")
    steps = ["--steps", "memcheck"]
    done = run("--output", tmp_path, "--smoke", *steps, module="benchmarks.kernels.on_gpu")
    assert done.returncode == 0  # the step's own environment comes after the caller's
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    done = run("--output", tmp_path, "--smoke", *steps, module="benchmarks.kernels.on_gpu")
    assert done.returncode != 0
    assert "not passed: memcheck" in done.stderr


def test_a_file_of_another_machine_is_not_continued(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    output.write_text(json.dumps({"facts": {"device": "another"}, "cells": {}}))
    refused = run("--output", output, "--smoke")
    assert refused.returncode != 0
    assert "give another --output" in refused.stderr


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path: Path) -> None:
    refused = run("--output", tmp_path / "kernels.json")
    assert refused.returncode != 0
    assert refused.stderr.strip().count("\n") == 0
    assert "No CUDA GPU" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_neither_kernels_nor_benchmarks_import_vllm_or_load_triton_early() -> None:
    code = (
        "import sys, benchmarks.kernels, vllm_mtp.kernels.gated_lora, vllm_mtp.kernels.comb_attention\n"
        "assert not {'vllm', 'vllm_mtp.kernels.dot'} & sys.modules.keys()\n"
        "import benchmarks.kernels.__main__, benchmarks.kernels.step, benchmarks.kernels.comb_attention\n"
        "assert not {'vllm', 'vllm_mtp.kernels.dot'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
