"""`vllm-mtp train`: options from flags and from a file, and one line where they are wrong."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.unit.test_train_run import run_config
from vllm_mtp.cli.main import app
from vllm_mtp.train import run
from vllm_mtp.train.config import LossWeights, TrainConfig


def train(*words: object) -> Result:
    """The command's end."""
    return CliRunner().invoke(app, ["train", *map(str, words)])


def error_of(result: Result) -> str:
    """The one line that says what is wrong."""
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error:"))
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "missing"], "is not a model folder"),
        (["--mask-tokens", "0"], "--mask-tokens Input should be greater than or equal to 1"),
        (["--length", "9"], "leaves no row"),
        (["--position-decay", "2"], "--position-decay Input should be less than or equal to 1"),
        (["--data", "missing.txt"], "missing.txt does not exist"),
        (["--length", "100000"], "not one sequence of 100000"),
        (["--config", "missing.yaml"], "--config missing.yaml: No such file"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, arguments: list[str], message: str) -> None:
    config = run_config(tmp_path)
    given = {"--base": str(config.base), "--data": str(config.data[0]), "--output": str(tmp_path / "out"), "--on-policy": "0"}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert message in error_of(train(*(word for pair in given.items() for word in pair)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: x\noutput: y", "--data Field required"),
        ("base: x\noutput: y\ndata: z\nlenght: 9", "has an option that there is not: lenght."),
        ("base: x\noutput: y\ndata: z\nloss: {decay: 1}", "has an option that there is not: loss.decay."),
        ("base: x\noutput: y\ndata: z\nsteps: many", "--steps Input should be a valid integer"),
        ("- base", "holds no options: write `name: value` in each line."),
        ("base: [", "is not YAML: "),
    ],
)
def test_a_wrong_file_of_options_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert message in error_of(train("--config", tmp_path / "run.yaml"))


def test_options_come_from_a_file_and_flags_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"base: {config.base}\ndata: {config.data[0]}\noutput: {tmp_path / 'run'}\n"
        "steps: 7\nlearning_rate: 1e-3\nrank: 16\nsampler: false\nloss: {position_decay: 0.5, plain_head: 2}\n"
    )
    found: list[TrainConfig] = []
    monkeypatch.setattr(run, "train", found.append)
    words = ("--steps", 9, "--sampler", "--consistency", 0, "--plain-head", 3, "--prompts", "a", "--prompts", "b", "--rank", 32)
    assert train("--config", tmp_path / "run.yaml", *words).exit_code == 0
    assert found[0] == TrainConfig(
        base=config.base,
        data=config.data,
        output=tmp_path / "run",
        eval_data=(Path("a"), Path("b")),
        steps=9,
        learning_rate=1e-3,
        sampler=True,
        rank=32,
        loss=LossWeights(position_decay=0.5, plain_head=3, consistency=0),
    )
