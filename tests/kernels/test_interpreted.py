"""The kernel tests on machines without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, RUNS_TRITON


@pytest.mark.skipif(RUNS_TRITON, reason="the tests of this folder run in this process")
def test_kernels_equal_their_references_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; the kernels cannot run, the references stand in")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
