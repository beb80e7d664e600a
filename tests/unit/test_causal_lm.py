"""What is found in models of every architecture, and training on them against one naive forward for every prefix."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from tests.architectures import ARCHITECTURES
from tests.unit.tiny_models import as_adapter, save_tiny_base, tiny_config, tiny_masked_model
from vllm_mtp.base_model import linear_shapes
from vllm_mtp.causal_lm import UnsupportedModel, linears, unembedding
from vllm_mtp.cli.main import app
from vllm_mtp.reference import ReferenceModel
from vllm_mtp.train.model import MaskedModel

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def tiny(name: str, **options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**SIZES, **ARCHITECTURES[name].config, **options})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_layer_that_all_rows_go_through_is_found(name: str) -> None:
    model = tiny(name)
    found = linears(model)
    assert {path.rpartition(".")[2] for path in found} == set(ARCHITECTURES[name].modules)
    assert all(path.startswith("model.layers.") and ".experts" not in path for path in found)
    assert all(model.get_submodule(path) is layer for path, layer in found.items())
    assert linear_shapes(model.config) == {path: tuple(layer.weight.shape) for path, layer in found.items()}


def test_experts_and_what_routes_to_them_are_left_out_as_a_list_too() -> None:
    """Older models of transformers, and those of other people, have a list of experts and a linear router."""
    model = tiny("llama", num_local_experts=3)
    block = nn.Module()
    block.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(32, 8), "w2": nn.Linear(8, 32)}) for _ in range(3))
    block.gate, block.shared_expert_gate, block.shared = nn.Linear(32, 3), nn.Linear(32, 1), nn.Linear(32, 32)
    model.model.layers[1].mlp = block
    found = [path for path in linears(model) if path.startswith("model.layers.1.mlp")]
    assert found == ["model.layers.1.mlp.shared"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_states_are_those_of_separate_forwards(name: str) -> None:
    """Windows are shorter than the sequence and cut into prefixes and groups."""
    options = {"sliding_window": 6} if ARCHITECTURES[name].options.get("sliding_window") else {}
    model = tiny_masked_model(tiny_config(), tiny(name, **options))
    reference = ReferenceModel(model.base, as_adapter(model))
    ids, prefixes = torch.randint(2, 61, (2, 20)), torch.tensor([[1, 7, 16, 3, 12], [2, 9, 10, 17, 1]])
    with torch.no_grad():
        real, z = model.states(ids, prefixes)
        for row, lengths, rows, groups in zip(ids, prefixes, real, z, strict=True):
            torch.testing.assert_close(rows, reference.real_states(row.tolist()), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(unembedding(model.base)(rows), model.base(row[None]).logits[0], atol=1e-5, rtol=1e-5)
            for length, states in zip(lengths.tolist(), groups, strict=True):
                expected = reference.mask_states(row[:length].tolist(), len(states))
                torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


def test_a_window_and_a_cap_of_scores_are_felt() -> None:
    ids, prefixes = torch.randint(2, 61, (1, 20)), torch.tensor([[18]])
    adapter = as_adapter(tiny_masked_model(tiny_config(), tiny("gemma2")))
    states = []
    for options in ({}, {"sliding_window": 6}, {"attn_logit_softcapping": 0.1}):
        model = tiny_masked_model(tiny_config(), tiny("gemma2", **options))
        model.mask_embeddings.data = adapter.mask_embeddings
        states.append(model.states(ids, prefixes)[1])
    assert (states[1] - states[0]).abs().max() > 0.01
    assert (states[2] - states[0]).abs().max() > 0.01


def test_the_command_refuses_a_model_that_keeps_a_state(tmp_path: Path) -> None:
    save_tiny_base(tmp_path)
    config = AutoConfig.for_model("mamba", vocab_size=258, hidden_size=16, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("a text " * 100)
    arguments = ["--base", str(tmp_path), "--data", str(tmp_path / "text.txt"), "--output", str(tmp_path / "output")]
    result = CliRunner().invoke(app, ["train", *arguments, "--on-policy", "0"])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("error: mask-token prediction does not support mamba models")


@pytest.mark.parametrize("model_type", ["mamba", "jamba", "qwen3_next"])
def test_training_a_model_that_keeps_a_state_is_refused(model_type: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, num_hidden_layers=4))
    with pytest.raises(UnsupportedModel, match=f"does not support {model_type} models"):
        MaskedModel(model, tiny_config())
