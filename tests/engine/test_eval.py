"""`vllm-mtp eval --engine vllm` counts what the reference decoder counts."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_mtp import demo
from vllm_mtp.cli.main import app

pytestmark = [pytest.mark.engine, pytest.mark.full]


def test_figures_in_vllm_are_those_of_the_reference_decoder(tmp_path: Path) -> None:
    reports = []
    for engine in ("reference", "vllm"):
        file = tmp_path / f"{engine}.json"
        words = [
            "eval",
            demo.ADAPTER,
            "--base",
            demo.BASE,
            "--data",
            demo.PROMPTS / "code.jsonl",
            "--prompts",
            8,
            "--max-tokens",
            48,
        ]
        words += ["-k", 4, "--layout", "quadratic", "--engine", engine, "--dtype", "float32", "--json", file]
        if engine == "vllm":
            words += ["--tau", 1.5, "--tau", 0.3, "--plot", tmp_path / "eval.png"]
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        report = json.loads(file.read_text())
        (row, *_) = report["domains"]["code"]
        assert (row["layout"], row["head"], row["k"]) == ("quadratic", "sampler", 4)
        reports.append(row["figures"])
    wanted, found = reports
    assert found["all"]["output_tokens"] == wanted["all"]["output_tokens"]
    assert found["looping"]["outputs"] == wanted["looping"]["outputs"]
    assert found["all"]["acceptance_length"] == pytest.approx(wanted["all"]["acceptance_length"], rel=0.02)
    assert wanted["all"]["acceptance_length"] > 1.5
    lossless, low, high = report["thresholds"]["code"]
    assert [row["tau"] for row in (lossless, low, high)] == [None, 0.3, 1.5]
    assert lossless["figures"]["all"] == high["figures"]["all"] == found["all"]
    assert high["agreement"] == {"same_outputs": 1, "tokens_before_the_first_difference": 1}
    assert low["figures"]["all"]["acceptance_length"] > 1.1 * lossless["figures"]["all"]["acceptance_length"]
    assert low["agreement"]["same_outputs"] < 1
    assert "Accepted by confidence" in " ".join(result.output.split())
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
