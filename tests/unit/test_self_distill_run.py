"""Whole runs of the recipe self-distill: resume, what they leave, and what `inspect` says of it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.unit.resume import assert_resumes
from tests.unit.test_train_run import run_config
from tests.unit.tiny_models import tiny_tokenizer
from vllm_mtp.adapter import read_adapter
from vllm_mtp.cli.main import app
from vllm_mtp.foreign import FULL, TRAINING_FILE, kind_of, read_foreign
from vllm_mtp.reference import ReferenceModel
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.curves import series
from vllm_mtp.train.export import from_adapter
from vllm_mtp.train.run import train
from vllm_mtp.train.self_distill import FullStudent, Student

FULL_TUNING = {"tuning": "full", "learning_rate": 0.01}
NUM_TOKENS = len(tiny_tokenizer())
K = 3


def config_of(folder: Path, **options: object) -> TrainConfig:
    """As `run_config`, with regions of 4 rows."""
    return run_config(folder, recipe="self-distill", **options)


def inspected(folder: Path) -> str:
    """What `inspect` prints, without the table's frame."""
    result = CliRunner().invoke(app, ["inspect", str(folder)], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("options", [{"learning_rate": 0.05}, FULL_TUNING], ids=["gated", "full"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    tmp_path: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, **options)
    folder = train(config)
    half = load_file(config.output / "checkpoint-2" / "trained.safetensors")
    unbroken = assert_resumes(config, folder, Student, monkeypatch)
    assert any((half[name] - tensor).abs().max() > 1e-3 for name, tensor in unbroken.items())
    steps, losses = series(json.loads((config.output / "history.json").read_text()), "loss")
    assert steps == [1, 2, 3, 4]
    assert min(losses) > 0


def test_a_gated_run_leaves_an_adapter_that_drafts_as_it_was_trained(tmp_path: Path) -> None:
    config = config_of(tmp_path, learning_rate=0.05, targets="distribution")
    folder = train(config)
    training = read_adapter(folder).config.training
    assert training["tokens_per_forward"]["quadratic.sampler.3"] >= 1  # type: ignore[index]
    reference, loaded = ReferenceModel.from_folder(config.base, folder), from_adapter(config.base, folder)
    ids = torch.randint(2, 200, (1, 20))
    with torch.no_grad():
        z = loaded.states(ids, torch.tensor([[9]]))[1][0, 0]
    torch.testing.assert_close(reference.mask_states(ids[0, :9].tolist(), K), z, atol=1e-4, rtol=1e-4)
    said = inspected(folder)
    assert "recipe: self-distill" in said
    assert "targets: distribution" in said


def test_a_full_run_leaves_a_model_that_is_read_as_a_full_checkpoint(tmp_path: Path) -> None:
    config = config_of(tmp_path, **FULL_TUNING)
    before = {file.name: file.read_bytes() for file in config.base.iterdir()}
    folder = train(config)
    assert folder == config.output / "model"
    assert {file.name: file.read_bytes() for file in config.base.iterdir()} == before
    assert kind_of(folder) == FULL

    written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    checkpoint = load_file(config.output / "checkpoint-4" / "trained.safetensors")
    assert torch.equal(written.model.norm.weight, checkpoint["base.model.norm.weight"])
    start = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32)
    assert not torch.equal(written.model.norm.weight, start.model.norm.weight)
    assert written.config.vocab_size > start.config.vocab_size == NUM_TOKENS

    token = json.loads((folder / TRAINING_FILE).read_text())["mask_token_id"]
    assert token == NUM_TOKENS
    reference = ReferenceModel(written, read_foreign(folder, folder, K, token))
    options = {"base": "b", "data": "d", "output": "o", "recipe": "self-distill", "mask_tokens": K, "tuning": "full"}
    student = FullStudent(written, TrainConfig.model_validate(options), token, NUM_TOKENS)
    ids = torch.randint(2, 200, (1, 20))
    with torch.no_grad():
        z = student.states(ids, torch.tensor([[9]]))[1][0, 0]
    torch.testing.assert_close(reference.mask_states(ids[0, :9].tolist(), K), z, atol=1e-4, rtol=1e-4)

    said = inspected(folder)
    for words in (
        "a model that was trained to draft for itself",
        f"3, all of them token {token} of the vocabulary",
        f'"mask_token_id": {token}, "num_speculative_tokens": 3',
        "recipe: self-distill",
        "tuning: full",
        "quadratic.plain.3: ",
    ):
        assert words in said


def test_a_folder_with_something_else_is_not_replaced_by_a_model(tmp_path: Path) -> None:
    config = config_of(tmp_path, **FULL_TUNING)
    (config.output / "model").mkdir(parents=True)
    (config.output / "model" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="exists and was not written by training"):
        train(config)
