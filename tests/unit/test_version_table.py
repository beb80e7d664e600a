"""The table of vLLM's releases is what `tests.compat` has found."""

from copy import deepcopy
from typing import Any

import pytest

from tests.version_table import engine_cell, table

REPORT: dict[str, Any] = {
    "engines": {
        "0.31.0": {
            "wheel": "one",
            "machine": {"processor": "p", "python": "3.11", "versions": {"torch": "2.13"}},
            "contract": {},
            "files": {"tests/engine/test_features.py": {"green": True, "passed": 39, "failed": 0, "skipped": 0}},
        },
    },
    "sources": {"0.26.0": {"request LoRA adapters": ["x is missing"]}, "0.30.0": {}, "0.33.0": {"V1 runner": ["y is missing"]}},
}


def test_what_was_not_run_is_told() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(REPORT).splitlines()[2:6]]
    assert [row[:2] for row in rows] == [
        ["0.26.0", "met; refused: request LoRA adapters"],
        ["0.30.0", "met"],
        ["0.31.0", "met"],
        ["0.33.0", "not met: V1 runner"],
    ]
    assert [row[2] for row in rows[::3]] == ["none; source read"] * 2
    assert rows[1][2].startswith("not run: `test_features`, ")
    assert rows[2][2].startswith("green: `test_features` 39; not run: `test_lossless_greedy`, ")


def test_a_failure_and_a_second_wheel_are_told() -> None:
    report = deepcopy(REPORT)
    result = report["engines"]["0.31.0"]
    report["engines"]["0.32.0"] = deepcopy(result)
    result["files"]["tests/engine/test_features.py"].update(green=False, failed=2)
    assert engine_cell(result).startswith("**red**: `test_features` 39 (2 failed)")
    result["wheel"] = "another"
    with pytest.raises(ValueError, match="different wheels"):
        table(report)
