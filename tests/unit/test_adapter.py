"""An adapter folder: what is written is read again, as PEFT means it, by a writer that leaves no half of one."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_mtp import adapter as module
from vllm_mtp.adapter import (
    AdapterError,
    base_facts,
    check_base,
    fingerprint_folder,
    fingerprint_tensors,
    is_adapter,
    linear_shapes,
    read_adapter,
    read_config,
    validate_folder,
    write_adapter,
)
from vllm_mtp.config import AdapterConfig


def test_another_base_of_the_same_shape_is_told_by_its_fingerprint(adapter_folder: Path, base_folder: Path) -> None:
    tensors = load_file(base_folder / "model.safetensors")
    config = read_config(adapter_folder)
    check_base(config, json.loads((base_folder / "config.json").read_text()), fingerprint_tensors(tensors.items()))
    tensors["model.layers.1.input_layernorm.weight"][0] += 0.5
    save_file(tensors, base_folder / "model.safetensors")
    with pytest.raises(AdapterError, match="fingerprint is"):
        validate_folder(adapter_folder, base_folder)
    with pytest.raises(AdapterError, match="fingerprint is"):
        check_base(config, json.loads((base_folder / "config.json").read_text()), fingerprint_tensors(tensors.items()))


def test_fingerprint_depends_on_the_norms_alone_and_not_on_precision_or_sharding(base_folder: Path) -> None:
    tensors = load_file(base_folder / "model.safetensors")
    want = fingerprint_folder(base_folder)
    assert want == fingerprint_tensors(reversed([*tensors.items(), ("model.layers.0.mlp.up_proj.weight", torch.ones(2))]))
    assert want == fingerprint_tensors((name, tensor.bfloat16()) for name, tensor in tensors.items())
    names = list(tensors)
    for part, chosen in (("a", names[:3]), ("b", names[3:])):
        save_file({name: tensors[name] for name in chosen}, base_folder / f"{part}.safetensors")
    (base_folder / "model.safetensors").rename(base_folder.parent / "old")
    assert fingerprint_folder(base_folder) == want
    weight_map = {name: "a.safetensors" if name in names[:3] else "b.safetensors" for name in names}
    save_file({"unrelated.model.norm.weight": torch.ones(1)}, base_folder / "consolidated.safetensors")
    (base_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert fingerprint_folder(base_folder) == want
    assert fingerprint_folder(base_folder.parent) is None


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/elsewhere.safetensors", "parts/../../elsewhere.safetensors"])
def test_a_base_whose_index_names_a_file_elsewhere_is_refused(name: str, base_folder: Path) -> None:
    (base_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(AdapterError, match=r"elsewhere\.safetensors, a file outside of the folder"):
        fingerprint_folder(base_folder)


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", "16"), ("vocab_size", -1), ("model_type", 5), ("num_hidden_layers", 10**9)]
)
def test_a_base_with_impossible_facts_is_refused(key: str, value: object, base_folder: Path) -> None:
    config = json.loads((base_folder / "config.json").read_text())
    (base_folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(AdapterError, match=rf"{key}: .* found {value!r}"):
        base_facts(base_folder)


def test_what_is_written_is_read_again(adapter_folder: Path, base_folder: Path, tmp_path: Path) -> None:
    first = read_adapter(adapter_folder, linear_shapes(base_folder))
    write_adapter(tmp_path / "deep" / "copy", first.config, first.lora, first.mask_embeddings, first.sampler)
    second = read_adapter(tmp_path / "deep" / "copy", linear_shapes(base_folder))
    assert second.config == first.config
    assert torch.equal(second.mask_embeddings, first.mask_embeddings)
    assert second.lora.keys() == first.lora.keys()
    for name, weights in first.lora.items():
        assert torch.equal(second.lora[name].a, weights.a)
        assert torch.equal(second.lora[name].b, weights.b)
        assert second.lora[name].scale == weights.scale
    assert first.sampler is not None
    assert second.sampler is not None
    for name, tensor in first.sampler.state_dict().items():
        assert torch.equal(second.sampler.state_dict()[name], tensor)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_model_is_read_as_peft_means_it(rslora: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1))
    targets = ["q_proj", "o_proj", "down_proj"]
    ranks, alphas = {"down_proj": 3, "layers.1.self_attn.q_proj": 5}, {"o_proj": 7, "model.layers.1.mlp.down_proj": 2}
    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=rslora,
        init_lora_weights=False,
    )
    facts = base_facts(model.config, "some/base")
    peft_model = get_peft_model(model, settings)
    config = AdapterConfig(num_mask_tokens=2, base=facts, sampler=None)
    write_adapter(tmp_path / "adapter", config, peft_model, torch.zeros(2, 16), None)
    adapter = read_adapter(tmp_path / "adapter", linear_shapes(model.config))
    layers = {name.removeprefix("base_model.model."): layer for name, layer in peft_model.named_modules()}
    assert len(adapter.lora) == 6
    for name, weights in adapter.lora.items():
        torch.testing.assert_close(weights.scale * weights.b @ weights.a, layers[name].get_delta_weight("default"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"


def test_a_writer_that_fails_leaves_the_old_adapter_and_nothing_else(adapter_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = read_adapter(adapter_folder)
    before = {path.name: path.read_bytes() for path in adapter_folder.iterdir()}
    siblings = sorted(adapter_folder.parent.iterdir())
    with pytest.raises(AdapterError, match="mask_embeddings has shape"):
        write_adapter(adapter_folder, adapter.config, adapter.lora, torch.zeros(1, 16), adapter.sampler)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for fails, error, says in (
        (killed, KeyboardInterrupt, ""),
        (full, OSError, f"{adapter_folder} could not be written: No space"),
    ):
        monkeypatch.setattr(module, "save_file", fails)
        with pytest.raises(error, match=says):
            write_adapter(adapter_folder, adapter.config, adapter.lora, adapter.mask_embeddings, adapter.sampler)
    assert {path.name: path.read_bytes() for path in adapter_folder.iterdir()} == before
    assert sorted(adapter_folder.parent.iterdir()) == siblings


def test_a_writer_replaces_an_adapter_but_no_other_folder(adapter_folder: Path, base_folder: Path) -> None:
    adapter = read_adapter(adapter_folder)
    write_adapter(adapter_folder, adapter.config, adapter.lora, adapter.mask_embeddings + 1, adapter.sampler)
    assert torch.equal(read_adapter(adapter_folder).mask_embeddings, adapter.mask_embeddings + 1)
    with pytest.raises(FileExistsError, match="is not an adapter"):
        write_adapter(base_folder, adapter.config, adapter.lora, adapter.mask_embeddings, adapter.sampler)
    assert (base_folder / "model.safetensors").exists()


def test_a_written_adapter_can_be_read_by_whom_the_umask_lets(adapter_folder: Path) -> None:
    plain = adapter_folder.parent / "plain"
    plain.mkdir()
    (plain / "file").touch()
    assert adapter_folder.stat().st_mode == plain.stat().st_mode
    assert {path.stat().st_mode for path in adapter_folder.iterdir()} == {(plain / "file").stat().st_mode}


def test_links_of_the_hubs_download_cache_are_followed(adapter_folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in adapter_folder.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    read_adapter(snapshot)


@pytest.mark.parametrize("path", ["does/not/exist", "Qwen/Qwen3-8B", "", "a\0b", "/dev/null"])
def test_is_adapter_never_raises(path: str, adapter_folder: Path, base_folder: Path) -> None:
    assert not is_adapter(path)
    assert is_adapter(adapter_folder)
    assert not is_adapter(base_folder)


def test_a_loaded_adapter_does_not_change_with_its_files(adapter_folder: Path) -> None:
    adapter = read_adapter(adapter_folder)
    for file in adapter_folder.glob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.write(bytes(file.stat().st_size))
    assert adapter.mask_embeddings.abs().sum() > 0
    for name, weights in adapter.lora.items():
        assert weights.a.abs().sum() > 0, name
