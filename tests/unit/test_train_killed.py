"""A run that is killed with SIGKILL, in a step or while it writes a checkpoint, goes on as if it had not been."""

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.test_train_run import run_config
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.curves import series
from vllm_mtp.train.model import MaskedModel
from vllm_mtp.train.run import train
from vllm_mtp.train.trainer import MaskTrainer, last_checkpoint

STEPS, SAVE_STEPS = 12, 3


def config_of(folder: Path, name: str) -> TrainConfig:
    """A run in `folder` of its own, over the same base and data as the others."""
    config = run_config(folder, steps=STEPS, learning_rate=0.05, warmup_steps=2)
    return config.model_copy(update={"output": folder / name, "save_steps": SAVE_STEPS, "eval_data": ()})


def killed_in_step(number: int) -> None:
    """The process will be killed in the forward of a step, counted from 1."""
    forward, calls = MaskedModel.forward, iter(range(1, STEPS + 1))

    def dying(self: MaskedModel, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, **inputs)

    MaskedModel.forward = dying  # type: ignore[method-assign, assignment]


def killed_in_checkpoint(number: int) -> None:
    """The process will be killed after the weights of a step's checkpoint and half of its optimizer's state were written."""
    save = MaskTrainer._save_optimizer_and_scheduler

    def dying(self: MaskTrainer, output_dir: str) -> None:
        save(self, output_dir)
        if self.state.global_step == number:
            file = Path(output_dir, "optimizer.pt")
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    MaskTrainer._save_optimizer_and_scheduler = dying  # type: ignore[method-assign]


def run_and_die(die: Callable[[int], None], number: int, config: TrainConfig) -> None:
    """Body of the process that is killed."""
    torch.set_num_threads(1)  # threads do not survive the fork
    die(number)
    train(config)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The folder of base and data, and the losses of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("killed")
    config = config_of(folder, "undisturbed")
    train(config)
    return folder, losses_of(config)


def losses_of(config: TrainConfig) -> list[float]:
    """The loss of every step, from a run's history."""
    steps, losses = series(json.loads((config.output / "history.json").read_text()), "loss")
    assert steps == list(range(1, STEPS + 1))
    return losses


@pytest.mark.parametrize(
    ("die", "number"), [(killed_in_step, random.Random(0).randint(SAVE_STEPS + 1, STEPS)), (killed_in_checkpoint, 2 * SAVE_STEPS)]
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    die: Callable[[int], None], number: int, undisturbed: tuple[Path, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted = undisturbed
    config = config_of(folder, die.__name__)
    process = multiprocessing.get_context("fork").Process(target=run_and_die, args=(die, number, config))
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == -signal.SIGKILL
    assert not (config.output / "history.json").exists()

    resumed_from = int(str(last_checkpoint(config.output)).rpartition("-")[2])
    if die is killed_in_checkpoint:
        assert (config.output / f"checkpoint-{number}" / "trained.safetensors").exists()
        assert resumed_from == number - SAVE_STEPS
    else:
        assert 0 <= number - 1 - resumed_from < SAVE_STEPS
    steps: list[int] = []
    forward = MaskedModel.forward
    monkeypatch.setattr(MaskedModel, "forward", lambda self, **inputs: (steps.append(1), forward(self, **inputs))[1])
    train(config)
    assert len(steps) == STEPS - resumed_from
    assert losses_of(config) == pytest.approx(wanted, rel=0.01)
    assert max(wanted) > 1.02 * min(wanted)  # else one percent would say nothing
