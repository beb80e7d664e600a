"""Every fault of `python -m tests.faults` and `python -m tests.faults.disk_full` as a test."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.scenarios import SCENARIOS, Plain

pytestmark = [pytest.mark.engine, pytest.mark.full]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def plain(logs: Path) -> Plain:
    return Plain(logs)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_fault_ends_as_documented(name: str, logs: Path, plain: Plain) -> None:
    outcome = SCENARIOS[name](logs, plain)
    print(json.dumps(outcome.row()))
    assert outcome.sent > 0
    assert outcome.as_documented, outcome.row()


def test_a_full_disk(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    command = [sys.executable, "-m", "tests.faults.disk_full", "--output", str(tmp_path / "disk.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
