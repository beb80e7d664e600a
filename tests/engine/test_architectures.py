"""Every architecture that is supported: a tiny random model is trained by the real trainer, exported, and served beside plain
vLLM."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.olmo2.modeling_olmo2 import Olmo2Model
from vllm.config import set_current_vllm_config

from tests.architectures import ARCHITECTURES
from tests.unit.test_train_processes import by_torchrun
from tests.unit.tiny_models import tiny_config
from vllm_mtp import demo
from vllm_mtp.adapter import read_adapter
from vllm_mtp.mask_attention import ForkedSequences
from vllm_mtp.reference import ReferenceModel
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.run import train

from .conftest import Engines, speculative
from .feature_models import random_model
from .test_states import record_groups

pytestmark = pytest.mark.engine

K, STEPS, NEW_TOKENS = 3, 20, 40


@pytest.fixture(autouse=True)
def class_of_transformers() -> Iterator[None]:
    """vLLM runs OLMo 2 as transformers has it, and changes its class for that; tests that come later want it as it was."""
    bases, own = Olmo2Model.__bases__, {name: vars(Olmo2Model).get(name) for name in ("__init__", "__call__", "__del__")}
    yield
    Olmo2Model.__bases__ = bases
    for name, method in own.items():
        if method is not None:
            setattr(Olmo2Model, name, method)
        elif name in vars(Olmo2Model):
            delattr(Olmo2Model, name)


def run_for(base: Path, output: Path) -> TrainConfig:
    """A run for `base`: 20 steps on the demo's prompts."""
    data = output.with_suffix(".jsonl")
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in demo.prompts()[20:60]))
    return tiny_config(base=base, data=(data,), output=output, mask_tokens=K, length=48, steps=STEPS, learning_rate=1e-2)


@pytest.mark.full
@pytest.mark.feature("sliding-window attention in all layers", "works")
@pytest.mark.parametrize(("name", "forked"), [*((name, False) for name in ARCHITECTURES), ("gemma2", True), ("gemma3", True)])
def test_trained_exported_and_served_as_plain(
    name: str, forked: bool, engines: Engines, prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`forked`: without our kernel for CPUs, as on other processors."""
    engines.close()
    base = random_model(tmp_path / "base", **ARCHITECTURES[name].config)
    adapter = train(run_for(base, tmp_path / "output"))
    lora = read_adapter(adapter).lora
    assert {module.rpartition(".")[2] for module in lora} == set(ARCHITECTURES[name].modules)
    assert min(weights.b.abs().max().item() for weights in lora.values()) > 1e-3  # all of it was trained

    options = {"model": str(base), "block_size": 32}
    batch = prompts[:20]
    expected = engines(**options).greedy(batch, NEW_TOKENS, ignore_eos=True)
    engine = engines(speculative(adapter, K, kernels="torch" if forked else "auto", mask_window=None), **options)
    assert isinstance(engine.proposer.attention, ForkedSequences) is forked
    seen = record_groups(engine, monkeypatch)
    found = engine.greedy(batch, NEW_TOKENS, ignore_eos=True)
    same = sum(a == b for a, b in zip(expected, found, strict=True))
    # Where vLLM takes a model over from transformers, it changes transformers' class, which then asks for this.
    with set_current_vllm_config(engine.llm.llm_engine.vllm_config):
        reference = ReferenceModel.from_folder(base, adapter)
    sample = seen[:: max(1, len(seen) // 30)]
    differences = [(reference.mask_states(ids, len(states)) - states).abs().max().item() for ids, states in sample]
    size = torch.stack([states.abs().max() for _, states in sample]).max().item()
    print(f"{name}: {same} of {len(batch)} identical; largest difference {max(differences):.2g} of states up to {size:.2g}")
    assert same == len(batch)
    assert max(differences) < 1e-4
    assert max(len(ids) for ids, _ in seen) > 64  # past every window


@pytest.mark.full
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trained_with_its_base_in_parts_and_served_as_plain(
    name: str, engines: Engines, prompts: list[str], tmp_path: Path
) -> None:
    """By two processes, each of which holds half of the base: the adapter is the one of a process that holds all of it."""
    engines.close()
    base = random_model(tmp_path / "base", **ARCHITECTURES[name].config)
    whole, parts = (run_for(base, tmp_path / output) for output in ("whole", "parts"))
    wanted = read_adapter(train(whole)).lora
    by_torchrun(parts.model_copy(update={"fsdp": True}), 2)
    adapter = parts.output / "adapter"
    for module, lora in read_adapter(adapter).lora.items():
        torch.testing.assert_close(lora.a, wanted[module].a, atol=2e-3, rtol=0.02)  # an adapter is in bfloat16
        torch.testing.assert_close(lora.b, wanted[module].b, atol=2e-3, rtol=0.02)

    options: dict[str, Any] = {"model": str(base), "block_size": 32}
    expected = engines(**options).greedy(prompts[:8], NEW_TOKENS, ignore_eos=True)
    engine = engines(speculative(adapter, K), **options)
    assert engine.greedy(prompts[:8], NEW_TOKENS, ignore_eos=True) == expected
    assert engine.metric("vllm:spec_decode_num_drafts") > 0
