"""The base's own continuations through vLLM: what an adapter is trained on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit.tiny_models import save_tiny_base, tiny_base, tiny_config
from vllm_mtp import demo
from vllm_mtp.train.data import Corpus
from vllm_mtp.train.on_policy import continuer, on_policy_sequences

from .conftest import Engines

pytestmark = pytest.mark.engine


def test_vllm_continues_every_prompt_within_the_length(engines: Engines) -> None:
    engines.close()  # one engine lives at a time
    config = tiny_config(
        base=demo.BASE, length=48, on_policy=1.0, on_policy_engine="vllm", on_policy_sequences=40, on_policy_greedy=0.5
    )
    stream, none = torch.randint(2, 2000, (400,)), torch.empty(0, dtype=torch.long)
    *progress, data = on_policy_sequences(tiny_base(), Corpus(stream, none, none.bool(), torch.zeros(1)), (1,), config)
    assert progress[-1] == 40
    assert isinstance(data, dict)
    for ids, length, prompt in zip(data["input_ids"], data["lengths"].tolist(), data["prompt_lengths"].tolist(), strict=True):
        assert any(torch.equal(ids[:prompt], window) for window in stream.unfold(0, prompt, 1))
        assert prompt + 2 <= length <= 48
        assert length == 48 or ids[length - 1] == 1
        assert 1 not in ids[prompt : length - 1]
    assert len(data["input_ids"]) == 40


def test_the_engine_ends_with_the_continuations() -> None:
    # A process of its own: there the engine has processes of its own, as in a training run.
    code = f"""
import psutil, torch
from tests.unit.tiny_models import tiny_base, tiny_config
from vllm_mtp.train.on_policy import continuer
if __name__ == "__main__":
    config = tiny_config(base={str(demo.BASE)!r}, length=16, on_policy_engine="vllm")
    with continuer(tiny_base(), (1,), config) as continued:
        (text,) = continued([torch.arange(5, 12)], False)
        during = len(psutil.Process().children(recursive=True))
    engine = [process for process in psutil.Process().children(recursive=True) if "VLLM" in process.name()]
    print(len(text), during > 0, psutil.wait_procs(engine, timeout=30)[1])
"""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.splitlines()[-1] == "16 True []"


def test_without_vllm_transformers_continues(tmp_path: Path) -> None:
    save_tiny_base(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with continuer(base, (1,), tiny_config(base=tmp_path, on_policy_engine="transformers")) as continued:
        long, short = continued([torch.arange(5, 12), torch.arange(5, 8)], False)
    assert long[:7].tolist() == list(range(5, 12))
    assert short[:3].tolist() == list(range(5, 8))
    assert all(len(out) == 20 or (out[-1] == 1 and len(out) < 20) for out in (long, short))
