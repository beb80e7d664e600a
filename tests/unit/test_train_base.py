"""The demo base's second stage starts where its first stage ended."""

from pathlib import Path

import torch

from benchmarks.demo_model.train_base import new_model, widened


def test_a_widened_model_is_the_same_function_with_more_to_train(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = new_model().eval()
    small.save_pretrained(tmp_path)
    wide = widened(tmp_path, 1536).eval()
    ids = torch.randint(0, 2048, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits, small(ids).logits, atol=1e-5, rtol=1e-5)
    assert wide.model.layers[0].mlp.up_proj.weight.shape == (1536, 384)
    assert wide.model.layers[0].mlp.up_proj.weight[1024:].abs().min() > 0
