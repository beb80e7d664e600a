"""The benchmark's plain LoRA is the gated one but for its real rows."""

import pytest
import torch

from benchmarks.gate import UngatedModel
from tests.unit.tiny_models import tiny_base, tiny_config
from vllm_mtp.train.model import MaskedModel

BATCH = {
    "input_ids": torch.randint(2, 61, (2, 20), generator=torch.Generator().manual_seed(0)),
    "lengths": torch.tensor([20, 20]),
    "prefix_lengths": torch.tensor([[1, 7, 16, 3, 12], [2, 9, 10, 17, 1]]),
}


def trained(model: MaskedModel) -> MaskedModel:
    """After a few steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        model(**BATCH)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("real_rows", [None, 0.0, 1.0])
def test_only_the_gate_keeps_real_rows(real_rows: float | None) -> None:
    config = tiny_config(targets="text", loss={"consistency": 0.0})
    torch.manual_seed(0)
    model = MaskedModel(tiny_base(), config) if real_rows is None else UngatedModel(tiny_base(), config, real_rows)
    before, at_first = (tensor.detach() for tensor in model.states(BATCH["input_ids"], BATCH["prefix_lengths"]))
    real, masks = trained(model).states(BATCH["input_ids"], BATCH["prefix_lengths"])
    assert torch.equal(real, before) == (real_rows is None)
    assert not torch.equal(masks, at_first)


def test_both_begin_with_the_same_loss() -> None:
    config, losses = tiny_config(targets="text", loss={"consistency": 0.0}), []
    for make in (MaskedModel, lambda base, config: UngatedModel(base, config, 0.0)):
        torch.manual_seed(0)
        losses.append(make(tiny_base(), config)(**BATCH)["loss"].item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
