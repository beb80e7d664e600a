"""Starts the tests of the V2 model runner in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

V2 = Path(__file__).parent / "v2"


@pytest.mark.engine
def test_v2_runner_under_the_interpreter(pytestconfig: pytest.Config) -> None:
    pytest.importorskip("triton", reason="Triton is not installed, so vLLM has no V2 runner")
    path = os.pathsep.join([str(V2 / "interpreter"), *filter(None, [os.environ.get("PYTHONPATH")])])
    chosen = ["-m", pytestconfig.option.markexpr]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--durations=0", *chosen, str(V2)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    run = subprocess.run(command, cwd=V2.parents[2], env=environment, capture_output=True, text=True, check=False)
    print(run.stdout[-4000:])
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
