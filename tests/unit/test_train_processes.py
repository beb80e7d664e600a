"""Two processes train what one does, when they share each step's sequences."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.test_train_run import run_config
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.curves import LOSSES, series
from vllm_mtp.train.run import train

STEPS = 20
COMMAND = "from vllm_mtp.cli.main import app; app()"


def by_torchrun(config: TrainConfig, num_processes: int) -> None:
    """The command on so many processes, through gloo."""
    file = config.output.with_suffix(".yaml")
    options = config.model_dump(mode="json", exclude_defaults=True)
    file.write_text(json.dumps(options))  # JSON is YAML
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_processes),
        "--no-python",
    ]
    subprocess.run([*launcher, sys.executable, "-c", COMMAND, "train", "--config", str(file)], check=True, timeout=300)


RECIPES: dict[str, dict[str, object]] = {
    "gated-lora": {},
    "self-distill": {"recipe": "self-distill"},
    "self-distill, full": {"recipe": "self-distill", "tuning": "full"},
    "gated-lora, base in parts": {"fsdp": True},
    "gated-lora, base in parts, checkpointing": {"fsdp": True, "gradient_checkpointing": True},
    "self-distill, base in parts": {"recipe": "self-distill", "fsdp": True},
}


@pytest.mark.full
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_with_the_same_global_batch_have_the_losses_of_one(recipe: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=STEPS, batch_size=4, learning_rate=0.01, warmup_steps=2, **RECIPES[recipe])
    with config.data[0].open("a") as file:
        for i in range(20):
            chat = [{"role": "user", "content": str(i)}, {"role": "assistant", "content": f"{i} and {i + 1}"}]
            file.write(json.dumps({"messages": chat}) + "\n")
    one, two = (config.model_copy(update={"output": tmp_path / name, "save_steps": 5}) for name in ("one", "two"))
    train(one.model_copy(update={"fsdp": False}))
    by_torchrun(two, 2)
    histories = [json.loads((run.output / "history.json").read_text()) for run in (one, two)]
    for name in LOSSES if recipe != "self-distill, full" else ("loss", "plain", "consistency"):
        (steps, wanted), (_, found) = (series(history, name) for history in histories)
        assert steps == list(range(1, STEPS + 1))
        assert found == pytest.approx(wanted, abs=1e-5 if name == "loss" else 2e-4)  # terms are rounded to four places
    losses = series(histories[0], "loss")[1]
    assert max(losses) > 1.1 * min(losses)
    head = "plain" if recipe == "self-distill, full" else "sampler"
    assert [entry["step"] for entry in histories[1] if f"eval_quadratic.{head}.3" in entry] == [STEPS]
    adapters = [load_file(run.output / f"checkpoint-{STEPS}" / "trained.safetensors") for run in (one, two)]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=1e-4, rtol=1e-3)
