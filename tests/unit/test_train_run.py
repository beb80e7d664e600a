"""Whole training runs of a few steps: resume, export, data and errors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.unit.resume import assert_resumes
from tests.unit.tiny_models import save_tiny_base, tiny_base, tiny_config
from vllm_mtp.adapter import check_base, read_adapter
from vllm_mtp.reference import ReferenceModel
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.curves import LOSSES, series
from vllm_mtp.train.documents import DataError
from vllm_mtp.train.export import from_adapter
from vllm_mtp.train.model import MaskedModel
from vllm_mtp.train.on_policy import continue_prompts
from vllm_mtp.train.run import train
from vllm_mtp.train.trainer import last_checkpoint


def run_config(folder: Path, **options: object) -> TrainConfig:
    """A run of 4 steps on a little text, with on-policy sequences and an evaluation."""
    base, data = folder / "base", folder / "data.jsonl"
    if not base.exists():
        save_tiny_base(base)
        data.write_text("".join(json.dumps({"text": f"line {i}: {i * i}\n" * 4}) + "\n" for i in range(20)))
    return tiny_config(
        base=base,
        data=[data],
        output=folder / "run",
        eval_data=[data],
        eval_prompts=2,
        on_policy=0.5,
        on_policy_sequences=6,
        save_steps=2,
        log_steps=1,
        **options,
    )


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(tmp_path)
    folder = train(config)
    assert_resumes(config, folder, MaskedModel, monkeypatch)


def test_a_run_leaves_its_history_its_curves_and_logs_for_tensorboard(tmp_path: Path) -> None:
    config = run_config(tmp_path, eval_steps=2, report_to="tensorboard")
    adapter = read_adapter(train(config))
    assert adapter.config.serving is not None
    assert adapter.config.serving.mask_window == max(32, config.length)
    history = json.loads((config.output / "history.json").read_text())
    steps, losses = series(history, "loss")
    assert steps == [1, 2, 3, 4]
    parts = zip(*(series(history, name)[1] for name in LOSSES[1:]), strict=True)
    assert losses == [pytest.approx(sum(terms), abs=2e-4) for terms in parts]
    names = {f"quadratic.sampler{kind}.{k}" for kind in ("", ".novel") for k in (1, 2, 3)}
    assert {name.removeprefix("eval_") for entry in history for name in entry if name.startswith("eval_")} == names
    for name in names:
        evaluated, values = series(history, f"eval_{name}")
        assert evaluated == [2, 4]
        assert values[-1] == adapter.config.training["tokens_per_forward"][name]  # type: ignore[index]
    assert (config.output / "curves.png").read_bytes().startswith(b"\x89PNG")
    (logs,) = config.output.glob("runs/*")
    events = EventAccumulator(str(logs)).Reload()
    assert {"train/loss", "train/sampler", *(f"eval/{name}" for name in names)} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("eval/quadratic.sampler.3")] == [2, 4]


def test_a_base_in_parts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(DataError, match="FSDP and DeepSpeed of accelerate cannot hold the base"):
        train(run_config(tmp_path))


def test_one_process_has_nobody_to_share_the_base_with(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--fsdp shares the base out over processes, and there is one"):
        train(run_config(tmp_path, fsdp=True))


def test_an_unknown_place_to_report_to_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--report-to nowhere: nowhere is not supported"):
        train(run_config(tmp_path, report_to=["nowhere"]))


def test_an_output_folder_with_another_runs_checkpoints_is_refused(tmp_path: Path) -> None:
    train(run_config(tmp_path))
    with pytest.raises(DataError, match="holds a run with rank=4, now 2"):
        train(run_config(tmp_path, rank=2))


def test_the_exported_adapter_drafts_as_the_model_in_training(tmp_path: Path) -> None:
    config = run_config(tmp_path, learning_rate=0.05)
    folder = train(config)
    adapter = read_adapter(folder)
    check_base(adapter.config, config.base)
    assert adapter.config.num_mask_tokens == 3
    assert adapter.config.training["tokens_per_forward"]["quadratic.sampler.3"] >= 1  # type: ignore[index]

    reference = ReferenceModel.from_folder(config.base, folder)
    model = MaskedModel(reference.base, config)
    model.load_trainable(load_file(config.output / "checkpoint-4" / "trained.safetensors"))
    loaded = from_adapter(config.base, folder)
    ids = torch.randint(2, 200, (1, 20))
    with torch.no_grad():
        z = model.states(ids, torch.tensor([[9]]))[1][0, 0]
        again = loaded.states(ids, torch.tensor([[9]]))[1][0, 0]
    wanted = reference.mask_states(ids[0, :9].tolist(), 3)
    torch.testing.assert_close(wanted, z, atol=0.05, rtol=0.05)  # weights in bfloat16
    torch.testing.assert_close(again, wanted, atol=1e-4, rtol=1e-4)
    assert max(weights.b.abs().max().item() for weights in adapter.lora.values()) > 0.005


def test_greedy_continuations_of_unequal_prompts_are_the_bases_own() -> None:
    base = tiny_base()
    prompts = [torch.tensor([2, 3, 4, 5, 6]), torch.tensor([7, 8])]
    reference = ReferenceModel(base)
    for prompt, sequence in zip(prompts, continue_prompts(base, prompts, 8, ends=()), strict=True):
        assert sequence.tolist() == prompt.tolist() + reference.decode(prompt.tolist(), 8, 1, "plain")[0]


def test_continuations_end_with_the_end_token() -> None:
    base = tiny_base()
    plain = ReferenceModel(base).decode([2, 3, 4], 8, 1, "plain")[0]
    sequence = continue_prompts(base, [torch.tensor([2, 3, 4])], 8, ends=(plain[3],))[0]
    assert sequence.tolist() == [2, 3, 4, *plain[: plain.index(plain[3]) + 1]]


def test_a_checkpoint_that_was_not_finished_is_not_gone_on_from(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    train(config)
    newest = config.output / "checkpoint-4"
    assert last_checkpoint(config.output) == str(newest)
    state = newest / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-20])  # killed while it was written
    assert last_checkpoint(config.output) == str(config.output / "checkpoint-2")
    train(config)
    assert last_checkpoint(config.output) == str(newest)
