"""Weights of other projects in a real engine: output is plain vLLM's, and mask rows are computed as the reference computes them."""

import json
from pathlib import Path

import pytest

from tests.foreign_models import full_checkpoint, mask_token, noise_lora
from vllm_mtp import demo
from vllm_mtp.foreign import TRAINING_FILE, read_foreign
from vllm_mtp.reference import ReferenceModel
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.run import train

from .conftest import Engines
from .test_states import record_groups

pytestmark = pytest.mark.engine

K = 4


def serve(
    engines: Engines,
    prompts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    target: Path,
    adapter: Path,
    mask_token_id: int,
    **options: str,
) -> None:
    """Holds an engine against plain vLLM and the reference."""
    batch = prompts[:20]
    expected = engines(model=str(target)).greedy(batch, 40, ignore_eos=True)
    written = {"method": "mtp", "mask_token_id": mask_token_id, "num_speculative_tokens": K, "layout": "quadratic", **options}
    engine = engines(written, model=str(target))
    seen = record_groups(engine, monkeypatch)
    assert engine.greedy(batch, 40, ignore_eos=True) == expected
    loaded = read_foreign(adapter, target, K, mask_token_id)
    reference = ReferenceModel.from_folder(target)
    reference.adapter = loaded
    sample = seen[:: max(1, len(seen) // 30)]
    worst = max((reference.mask_states(ids, len(states)) - states).abs().max().item() for ids, states in sample)
    print(f"largest difference of {len(sample)} groups: {worst:.2g}")
    assert worst < 1e-4


def test_a_lora_for_noise_rows_is_served_as_plain(
    engines: Engines, prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = noise_lora(demo.BASE, tmp_path / "uno")
    serve(engines, prompts, monkeypatch, demo.BASE, adapter, 2048, model=str(adapter))


@pytest.mark.full
def test_a_full_checkpoint_is_served_as_plain(
    engines: Engines, prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = full_checkpoint(demo.BASE, tmp_path / "checkpoint")
    serve(engines, prompts, monkeypatch, target, target, mask_token(demo.BASE))


@pytest.mark.full
def test_a_model_that_was_trained_to_draft_for_itself_is_served_as_plain(
    engines: Engines, prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))
    options = {"recipe": "self-distill", "tuning": "full", "base": demo.BASE, "data": data, "output": tmp_path / "run"}
    shape = {"mask_tokens": K, "length": 48, "groups": 4, "batch_size": 2, "steps": 3, "warmup_steps": 0, "learning_rate": 1e-4}
    target = train(TrainConfig.model_validate({**options, **shape, "on_policy": 0.0, "bf16": False}))
    token = json.loads((target / TRAINING_FILE).read_text())["mask_token_id"]
    serve(engines, prompts, monkeypatch, target, target, token)
