"""`vllm-mtp doctor`: the shipped model passes, and each thing that can be wrong is found, named and in the exit status."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_mtp import demo, selection
from vllm_mtp.cli.main import app

NAMES = ["environment", "vLLM", "hooks", "adapter", "options", "memory", "decoding"]


def doctor(tmp_path: Path, *arguments: str, status: int) -> dict[str, Any]:
    """The report of a run that ends with this exit status; checks by name."""
    file = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["doctor", *arguments, "--json", str(file)])
    assert result.exit_code == status, result.output
    report = json.loads(file.read_text())
    assert [check["name"] for check in report["checks"]] == NAMES
    assert report["ok"] == (status == 0)
    lines = result.output.splitlines()
    for check, line in zip(report["checks"], lines, strict=True):
        assert line.startswith(check["status"])
        assert check["found"] in line
        assert check["remedy"] in line
    return {**report, "checks": {check["name"]: check for check in report["checks"]}}


def statuses(report: dict[str, Any]) -> list[str]:
    return [check["status"] for check in report["checks"].values()]


@pytest.mark.full
@pytest.mark.engine
def test_the_shipped_model_passes_every_check(tmp_path: Path) -> None:
    report = doctor(tmp_path, str(demo.BASE), "--adapter", str(demo.ADAPTER), "-k", "4", "--layout", "quadratic", status=0)
    assert statuses(report) == ["ok"] * 7, report["checks"]
    assert {"versions", "processor"} <= set(report["machine"])
    memory, decoding = (report["checks"][name]["figures"] for name in ("memory", "decoding"))
    assert decoding["identical"] == decoding["prompts"] == 4
    # 16 requests, 5 groups each, 2 blocks a group; none where our kernel reads the cache in place.
    assert memory["blocks"] == decoding["scratch_blocks"]
    assert memory["blocks"] in (0, 160)
    # K and V of 4 layers, 2 heads of 64, in float32, 128 tokens a block.
    assert memory["bytes"] == memory["blocks"] * 4 * 2 * 2 * 64 * 4 * 128
    assert decoding["tokens_per_forward"] > 1


def test_a_folder_that_is_no_adapter_fails(tmp_path: Path) -> None:
    report = doctor(tmp_path, str(demo.BASE), "--adapter", str(demo.BASE), status=1)
    assert statuses(report) == ["ok", "ok", "ok", "failed", "skipped", "skipped", "skipped"]
    assert "it is no adapter; name an adapter's folder" in report["checks"]["adapter"]["found"]


def test_an_adapter_for_another_base_fails(tmp_path: Path, adapter_folder: Path) -> None:
    report = doctor(tmp_path, str(demo.BASE), "--adapter", str(adapter_folder), status=1)
    assert "hidden_size is 384 here and 16 in the adapter's" in report["checks"]["adapter"]["found"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-k", "9", "--layout", "quadratic"), "trained with 8 mask tokens"),
        (("--layout", "cubic"), "layout"),
        (("-k", "4", "--layout", "4,4,4"), "needs 5"),
    ],
)
def test_an_option_that_cannot_be_served_fails(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    report = doctor(tmp_path, *arguments, status=1)
    assert statuses(report) == ["ok"] * 4 + ["failed", "skipped", "skipped"]
    assert words in report["checks"]["options"]["found"]


def test_no_engine_starts_unless_one_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_mtp.cli.doctor.EngineProcess", None)
    report = doctor(tmp_path, "--no-decode", "--layout", "8,8,0,0,0,0,0,0,0", status=0)
    assert statuses(report) == ["ok"] * 6 + ["skipped"]
    assert report["checks"]["options"]["figures"]["layout"] == [8, 8, 0, 0, 0, 0, 0, 0, 0]


def test_answers_that_differ_from_plains_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"  # each process answers with its own number
    output = '{"tokens": [\'$$\'], "steps": [1], "pieces": ["x"]}'
    generation = f'{{"seconds": 1, "num_forwards": 1, "outputs": [{", ".join([output] * 4)}]}}'
    program.write_text(f"#!/bin/sh\necho '{{\"ready\": true}}'\necho '{generation}'\ncat > /dev/null\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    report = doctor(tmp_path, status=1)
    assert statuses(report) == ["ok"] * 6 + ["failed"]
    assert "0 of 4 greedy answers" in report["checks"]["decoding"]["found"]


def test_an_engine_that_does_not_start_fails_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    report = doctor(tmp_path, status=1)
    assert "exit status 3; its log is" in report["checks"]["decoding"]["found"]


def test_an_old_vllm_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "vllm_version", lambda: "0.10.0")
    report = doctor(tmp_path, status=1)
    assert statuses(report) == ["ok", "ok", "failed", "ok", "skipped", "skipped", "skipped"]
    assert "this is 0.10.0" in report["checks"]["hooks"]["found"]


def test_a_vllm_that_was_never_tested_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "vllm_version", lambda: "0.99.0")
    report = doctor(tmp_path, "--no-decode", status=0)
    assert statuses(report) == ["ok", "ok", "warning", "ok", "ok", "ok", "skipped"]


def test_a_plugin_that_vllm_is_told_to_leave_out_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "VLLM_PLUGINS", "lora_filesystem_resolver")
    report = doctor(tmp_path, status=1)
    assert report["checks"]["environment"]["remedy"] == "add mtp to VLLM_PLUGINS, or unset it"
    assert statuses(report) == ["failed"] + ["skipped"] * 6


@pytest.mark.parametrize("arguments", [("some/base",), ("--adapter", "somewhere"), ("-k", "0"), ("--layuot", "linear")])
def test_wrong_usage_has_a_status_of_its_own(arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(app, ["doctor", *arguments]).exit_code == 2


def test_the_report_on_standard_output_is_all_that_is_there() -> None:
    result = CliRunner().invoke(app, ["doctor", "--no-decode", "--json", "-"])
    assert json.loads(result.stdout)["ok"]
    assert "ok       memory" in result.stderr
