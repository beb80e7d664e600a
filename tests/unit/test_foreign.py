"""Weights of other projects: what they are taken for, what must be said of them, and which are refused."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.foreign_models import full_checkpoint, noise_lora
from tests.unit.tiny_models import save_tiny_base
from vllm_mtp import demo
from vllm_mtp.adapter import AdapterError
from vllm_mtp.cli.main import app
from vllm_mtp.config import ServingOptions
from vllm_mtp.foreign import FULL, NOISE, check_foreign, kind_of, noise_tokens, read_foreign
from vllm_mtp.selection import ConfigurationError, asked_for, resolve

LORA = "adapter_model.safetensors"
VOCABULARY, MASK_TOKEN = 258, 259
FIRST = "model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny_base(folder)
    return folder


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    return noise_lora(base, tmp_path / "uno")


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path) -> Path:
    return full_checkpoint(base, tmp_path / "checkpoint")


def test_what_a_folder_is_shows_in_its_files(
    base: Path, lora: Path, checkpoint: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    assert kind_of(lora) == NOISE
    assert kind_of(checkpoint) == kind_of(base) == FULL
    for other in (adapter_folder, tmp_path / "nothing", tmp_path, "Qwen/Qwen3-8B", "a\0b"):
        assert kind_of(other) is None


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_a_lora_is_read_with_and_without_pefts_prefix(prefix: str, base: Path, tmp_path: Path) -> None:
    folder = noise_lora(base, tmp_path / "uno", prefix=prefix)
    adapter = read_foreign(folder, base, 4, VOCABULARY)
    written = load_file(folder / LORA)
    assert len(adapter.lora) == len(written) / 2
    for module, weights in adapter.lora.items():
        assert torch.equal(weights.a, written[f"{prefix}{module}.lora_A.weight"])
        assert torch.equal(weights.b, written[f"{prefix}{module}.lora_B.weight"])
        assert weights.scale == 2
    assert adapter.mask_token_ids == noise_tokens(VOCABULARY)[:4]
    assert adapter.sampler is None


def test_noise_is_drawn_from_the_tokens_before_the_mask_token_and_always_the_same() -> None:
    tokens = noise_tokens(6)
    assert set(tokens) == set(range(1, 6))
    assert tokens == noise_tokens(6)
    assert noise_tokens(2) == (1,) * len(tokens)


def test_all_mask_rows_of_a_checkpoint_are_its_mask_token(checkpoint: Path) -> None:
    adapter = read_foreign(checkpoint, checkpoint, 3, MASK_TOKEN)
    assert adapter.mask_token_ids == (MASK_TOKEN,) * 3
    assert adapter.lora == {}
    table = torch.randn(VOCABULARY + 128, 5)
    embeddings = adapter.embeddings(lambda ids: table[ids], 2, torch.device("cpu"))
    assert torch.equal(embeddings, table[[MASK_TOKEN, MASK_TOKEN]])


def edit_json(file: str, **changes: object) -> Callable[[Path], object]:
    def mutate(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, **changes}))

    return mutate


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def mutate(folder: Path) -> None:
        tensors = load_file(folder / LORA)
        change(tensors)
        save_file(tensors, folder / LORA)

    return mutate


BAD_LORAS = {
    "pickled": (lambda f: (f / "adapter_model.bin").write_bytes(b""), "adapter_model.bin may be a pickle file"),
    "no weights": (lambda f: (f / LORA).unlink(), f"{LORA} is missing"),
    "truncated": (lambda f: os.truncate(f / LORA, 5000), "is truncated"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
    "another rank": (edit_json("adapter_config.json", r=4), "expected [4, "),
    "an option that cannot be served": (edit_json("adapter_config.json", use_dora=True), "use_dora is True"),
    "further modules": (edit_json("adapter_config.json", modules_to_save=["embed_tokens"]), "modules_to_save is"),
    "the unembedding": (edit_json("adapter_config.json", target_modules=["lm_head"]), "target_modules names 'lm_head'"),
    "a tensor too few": (edit_tensors(lambda t: t.pop(FIRST)), f"tensor {FIRST} is missing"),
    "a tensor too many": (
        edit_tensors(lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)})),
        "lm_head.weight of shape [2, 2]",
    ),
    "two prefixes": (
        edit_tensors(lambda t: t.update({f"base_model.model.{FIRST}": t[FIRST].clone()})),
        f"tensor base_model.model.{FIRST.replace('A', 'B')} is missing",
    ),
    "another width": (edit_tensors(lambda t: t.update({FIRST: torch.zeros(8, 3)})), f"{FIRST} has shape [8, 3], expected [8, "),
}


@pytest.mark.parametrize("case", BAD_LORAS)
def test_a_bad_lora_is_refused_with_the_reason(case: str, base: Path, lora: Path) -> None:
    mutate, message = BAD_LORAS[case]
    mutate(lora)
    with pytest.raises(AdapterError, match=re.escape(message)) as error:
        check_foreign(lora, base, 4, VOCABULARY)
    assert len(str(error.value).splitlines()) == 1


def test_numbers_that_are_not_finite_are_found(base: Path, lora: Path) -> None:
    edit_tensors(lambda tensors: tensors[FIRST].view(-1)[3].fill_(float("nan")))(lora)
    check_foreign(lora, base, 4, VOCABULARY)
    with pytest.raises(AdapterError, match="holds NaN or infinity in 1 of"):
        read_foreign(lora, base, 4, VOCABULARY)


BAD_CHECKPOINTS = {
    "pickled": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin may be a pickle file"),
    "pickled beside": (lambda f: (f / "optimizer.pt").touch(), "optimizer.pt may be a pickle file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no safetensors"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 5000), "model.safetensors"),
    "a link": (lambda f: (f / "more.safetensors").symlink_to("/etc/hostname"), "more.safetensors is a link that leads out"),
    "no sizes": (edit_json("config.json", hidden_size=None), "has no hidden_size"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_with_the_reason(case: str, checkpoint: Path) -> None:
    mutate, message = BAD_CHECKPOINTS[case]
    mutate(checkpoint)
    with pytest.raises(AdapterError, match=re.escape(message)) as error:
        check_foreign(checkpoint, checkpoint, 4, MASK_TOKEN)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("kind", "token"), [("uno", 1), ("uno", 259), ("checkpoint", 386)])
def test_a_mask_token_outside_of_the_vocabulary_is_refused(kind: str, token: int, base: Path, lora: Path, checkpoint: Path) -> None:
    folder, target = (lora, base) if kind == "uno" else (checkpoint, checkpoint)
    with pytest.raises(AdapterError, match=rf"mask_token_id is {token}, and .* it is a number from"):
        check_foreign(folder, target, 4, token)


# -- what an operator writes --------------------------------------------------------------------------------------------


def resolved(target: Path, **written: Any) -> ServingOptions:
    arguments = SimpleNamespace(
        model=str(target), speculative_config={"method": "mtp", **written}, spec_method=None, spec_model=None, spec_tokens=None
    )
    asked = asked_for(arguments)
    assert asked is not None
    text = SimpleNamespace(to_dict=lambda: json.loads((target / "config.json").read_text()), model_type="llama")
    flags = {"is_moe": False, "is_multimodal_model": False, "is_hybrid": False, "is_attention_free": False}
    return resolve(asked, {}, SimpleNamespace(model=str(target), hf_text_config=text, **flags), SimpleNamespace())


def test_a_lora_is_selected_with_what_it_does_not_say(base: Path, lora: Path) -> None:
    chosen = resolved(base, model=str(lora), mask_token_id=258, num_speculative_tokens=4)
    assert (chosen.adapter, chosen.mask_token_id, chosen.num_speculative_tokens) == (str(lora), 258, 4)
    with pytest.raises(
        ConfigurationError, match=r"is a LoRA for noise rows and does not say the end of the range .* give mask_token_id"
    ):
        resolved(base, model=str(lora), num_speculative_tokens=4)
    with pytest.raises(
        ConfigurationError, match="does not say how many tokens it was trained to draft: give num_speculative_tokens"
    ):
        resolved(base, model=str(lora), mask_token_id=258)


def test_a_checkpoint_is_its_own_adapter(base: Path, checkpoint: Path) -> None:
    for written in ({}, {"model": str(checkpoint)}):
        chosen = resolved(checkpoint, mask_token_id=MASK_TOKEN, num_speculative_tokens=4, **written)
        assert (chosen.adapter, chosen.mask_token_id) == (str(checkpoint), MASK_TOKEN)
    with pytest.raises(ConfigurationError, match="is no adapter: mask rows of a full checkpoint run on its own weights"):
        resolved(base, model=str(checkpoint), mask_token_id=MASK_TOKEN, num_speculative_tokens=4)
    with pytest.raises(ConfigurationError, match="give num_speculative_tokens"):
        resolved(checkpoint, mask_token_id=MASK_TOKEN)
    with pytest.raises(ConfigurationError, match="mask_token_id: Input should be a valid integer"):
        resolved(checkpoint, mask_token_id="259", num_speculative_tokens=4)


def test_an_adapter_of_ours_has_no_mask_token() -> None:
    with pytest.raises(ConfigurationError, match="has mask embeddings of its own: leave mask_token_id out"):
        resolved(demo.BASE, model=str(demo.ADAPTER), mask_token_id=5)


# -- vllm-mtp inspect ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside_base", [False, True])
def test_inspect_names_a_lora_for_noise_rows(beside_base: bool, base: Path, lora: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(lora), *(["--base", str(base)] if beside_base else [])])
    assert result.exit_code == 0, result.output
    for words in ("LoRA for noise rows", "org/some-base", "rank 8, scale 2", "q_proj x 2", "mask_token_id", "none"):
        assert words in result.output


def test_inspect_names_a_full_checkpoint_and_refuses_bad_ones(checkpoint: Path, lora: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(checkpoint)])
    assert result.exit_code == 0, result.output
    for words in ("full checkpoint", "llama", "386 tokens", "mask_token_id"):
        assert words in result.output
    (checkpoint / "optimizer.pt").touch()
    edit_json("adapter_config.json", r=4)(lora)
    for folder, message in ((checkpoint, "optimizer.pt may be"), (lora, "expected [4, ")):
        result = CliRunner().invoke(app, ["inspect", str(folder)])
        assert result.exit_code == 1
        assert message in result.output
