"""Whole training runs of a few steps: resume, export, data and errors."""

import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.unit.tiny_models import save_tiny_base, tiny_base, tiny_config
from vllm_mtp.adapter import check_base, read_adapter
from vllm_mtp.cli import train as command
from vllm_mtp.reference import ReferenceModel
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.data import DataError, Sequences, read_documents
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
    unbroken = load_file(config.output / "checkpoint-4" / "trained.safetensors")
    for path in (config.output / "checkpoint-4").iterdir():
        path.unlink()
    (config.output / "checkpoint-4").rmdir()
    steps = []
    forward = MaskedModel.forward
    monkeypatch.setattr(MaskedModel, "forward", lambda self, **inputs: (steps.append(1), forward(self, **inputs))[1])
    assert train(config) == folder
    resumed = load_file(config.output / "checkpoint-4" / "trained.safetensors")
    assert len(steps) == 2
    assert resumed.keys() == unbroken.keys()
    for name, tensor in unbroken.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=0)


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
    assert max(weights.b.abs().max().item() for weights in adapter.lora.values()) > 0.01


def test_greedy_continuations_of_unequal_prompts_are_the_bases_own() -> None:
    base = tiny_base()
    prompts = [torch.tensor([2, 3, 4, 5, 6]), torch.tensor([7, 8])]
    reference = ReferenceModel(base)
    for prompt, sequence in zip(prompts, continue_prompts(base, prompts, 8, end=None), strict=True):
        assert sequence.tolist() == prompt.tolist() + reference.decode(prompt.tolist(), 8, 1, "plain")[0]


def test_continuations_end_with_the_end_token() -> None:
    base = tiny_base()
    plain = ReferenceModel(base).decode([2, 3, 4], 8, 1, "plain")[0]
    sequence = continue_prompts(base, [torch.tensor([2, 3, 4])], 8, end=plain[3])[0]
    assert sequence.tolist() == [2, 3, 4, *plain[: plain.index(plain[3]) + 1]]


def test_sequences_depend_on_seed_and_index_alone_and_groups_have_labels() -> None:
    stream = torch.arange(200)
    on_policy = {
        "input_ids": torch.arange(1000, 1040).view(2, 20),
        "lengths": torch.tensor([20, 11]),
        "prompt_lengths": torch.tensor([6, 8]),
    }
    data = Sequences(stream, on_policy, tiny_config(on_policy=0.5))
    kinds = set()
    for index in range(40):
        item = data[index]
        assert all(torch.equal(value, data[index][name]) for name, value in item.items())
        continued = bool(item["input_ids"][0] >= 1000)
        kinds.add(continued)
        first = {20: 6, 11: 8}[int(item["lengths"])] if continued else 1
        assert item["prefix_lengths"].shape == (5,)
        assert int(item["prefix_lengths"].min()) >= first
        assert int(item["prefix_lengths"].max()) <= int(item["lengths"]) - 2
    assert kinds == {True, False}
    assert not torch.equal(
        data[0]["prefix_lengths"], Sequences(stream, on_policy, tiny_config(on_policy=0.5, seed=1))[0]["prefix_lengths"]
    )


def test_documents_are_read_from_lines_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("a = 1\n")
    (tmp_path / "code" / "picture.png").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_documents((tmp_path / "code", tmp_path / "lines.jsonl")) == ["a = 1\n", "one", "two"]
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n{"content": "two"}\n')
    with pytest.raises(DataError, match="line 2"):
        read_documents((tmp_path / "lines.jsonl",))
    with pytest.raises(DataError, match="not UTF-8"):
        read_documents((tmp_path / "code" / "picture.png",))
    with pytest.raises(DataError, match="does not exist"):
        read_documents((tmp_path / "missing",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "missing"], "is not a model folder"),
        (["--mask-tokens", "0"], "--mask-tokens Input should be greater than or equal to 1"),
        (["--length", "9"], "leaves no row"),
        (["--position-decay", "2"], "--loss.position-decay Input should be less than or equal to 1"),
        (["--data", "missing.txt"], "missing.txt does not exist"),
        (["--length", "100000"], "not one sequence of 100000"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, arguments: list[str], message: str) -> None:
    config = run_config(tmp_path)
    app = typer.Typer()
    app.command()(command.train)
    given = {"--base": str(config.base), "--data": str(config.data[0]), "--output": str(tmp_path / "out"), "--on-policy": "0"}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    result = CliRunner().invoke(app, [word for pair in given.items() for word in pair])
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]


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
