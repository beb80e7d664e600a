"""A training run that loses its last checkpoint and runs again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.run import train


def assert_resumes(config: TrainConfig, folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Runs the last two of four steps again: the same folder, the same weights, no step more.

    Args:
        config: of a run that is done.
        folder: that it left.
        model: class of the model that is trained.

    Returns:
        The trained tensors.
    """
    trained, steps = config.output / "checkpoint-4" / "trained.safetensors", []
    unbroken = load_file(trained)
    shutil.rmtree(trained.parent)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda self, **inputs: (steps.append(1), forward(self, **inputs))[1])
    assert train(config) == folder
    resumed = load_file(trained)
    assert len(steps) == 2
    assert resumed.keys() == unbroken.keys()
    for name, tensor in unbroken.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=0)
    return unbroken
