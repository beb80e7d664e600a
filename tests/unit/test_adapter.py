"""An adapter folder: what is written is read again, as PEFT means it, and what is wrong with one is said in a sentence."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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

LORA, MTP = "adapter_model.safetensors", "mtp.safetensors"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
hypothesis_files = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def edit_tensors(file: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return mutate


def edit_json(file: str, **changes: object) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, **changes}))

    return mutate


def truncate(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size - size)


def header_length(file: str, length: int) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(length.to_bytes(8, "little") + data[8:])

    return mutate


def header_entry(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        data = (folder / MTP).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        change(header)
        raw = json.dumps(header).encode()
        (folder / MTP).write_bytes(len(raw).to_bytes(8, "little") + raw + data[end:])

    return mutate


def link_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / MTP, outside)
    (folder / MTP).symlink_to(outside)


BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "holds a JSON list, expected an object"),
    "config is nested deeply": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json"),
    "config is huge": (lambda f: (f / "config.json").write_text(" " * (5 << 20)), "5242880 bytes"),
    "not an adapter": (edit_json("config.json", model_type="llama"), "'llama', expected 'vllm_mtp'"),
    "unknown key": (edit_json("config.json", num_mask_token=4), "num_mask_token: Extra inputs are not permitted"),
    "k out of range": (edit_json("config.json", num_mask_tokens=0), "num_mask_tokens: Input should be greater than or equal to 1"),
    "k is text": (edit_json("config.json", num_mask_tokens="many"), "found 'many'"),
    "newer format": (edit_json("config.json", format_version=2), "format_version: Input should be 1"),
    "missing tensor": (edit_tensors(LORA, lambda t: t.pop(FIRST)), f"{LORA}: tensor {FIRST} is missing"),
    "extra tensor": (edit_tensors(LORA, lambda t: t.update(extra=torch.zeros(1))), "tensor extra of shape [1] is not expected"),
    "LoRA of a layer too many": (
        edit_tensors(LORA, lambda t: t.update({FIRST.replace(".0.", ".3."): t[FIRST].clone()})),
        "layers.3.self_attn.q_proj.lora_A.weight of shape [2, 16] is not expected",
    ),
    "rank of one tensor": (edit_tensors(LORA, lambda t: t.update({FIRST: torch.zeros(3, 16)})), "has shape [3, 16], expected [2, "),
    "rank of all": (edit_json("adapter_config.json", r=8), "expected [8, "),
    "a vector": (edit_tensors(LORA, lambda t: t.update({FIRST: torch.zeros(2)})), "has shape [2], expected [2, "),
    "integers": (edit_tensors(LORA, lambda t: t.update({FIRST: t[FIRST].int()})), f"{FIRST} has dtype I32, expected one of F32"),
    "too few mask embeddings": (
        edit_tensors(MTP, lambda t: t.update(mask_embeddings=torch.zeros(3, 16))),
        "mask_embeddings has shape [3, 16], expected [4, 16]",
    ),
    "no sampler": (edit_tensors(MTP, lambda t: t.pop("sampler.linear_1.weight")), "sampler.linear_1.weight is missing"),
    "a sampler too many": (edit_json("config.json", sampler=None), "tensor sampler.linear_1.bias of shape [16] is not expected"),
    "no LoRA file": (lambda f: (f / LORA).unlink(), f"{LORA} is missing"),
    "truncated": (truncate(LORA, 5), f"{LORA} is truncated"),
    "truncated to nothing": (lambda f: os.truncate(f / MTP, 0), f"{MTP} is truncated"),
    "data behind the end": (lambda f: (f / MTP).write_bytes((f / MTP).read_bytes() + b"x"), f"{MTP} is damaged"),
    "huge header": (header_length(MTP, 2**63), f"{MTP} is truncated: its header should have 9223372036854775808 bytes"),
    "header ends early": (header_length(MTP, 10), "damaged header"),
    "shape is negative": (
        header_entry(lambda h: h["mask_embeddings"].update(shape=[-4, -16])),
        "the shape of tensor mask_embeddings",
    ),
    "shape is astronomic": (header_entry(lambda h: h["mask_embeddings"].update(shape=[2**40, 2**40])), "lies at"),
    "tensors overlap": (header_entry(lambda h: h.update(twin=h["mask_embeddings"])), "begins at byte"),
    "entry is a number": (header_entry(lambda h: h.update(mask_embeddings=1)), "entry for tensor mask_embeddings is 1"),
    "pickle": (lambda f: (f / "adapter_model.bin").write_bytes(b""), "adapter_model.bin may be a pickle file"),
    "pickle with capitals": (lambda f: (f / "x.PTH").write_bytes(b""), "x.PTH may be a pickle file"),
    "link that leads out": (link_out, f"{MTP} is a link that leads out"),
    "DoRA": (edit_json("adapter_config.json", use_dora=True), "use_dora is True, which cannot be served"),
    "biases": (edit_json("adapter_config.json", bias="all"), "bias is 'all', expected 'none'"),
    "other modules": (edit_json("adapter_config.json", modules_to_save=["lm_head"]), "modules_to_save is ['lm_head']"),
    "transposed": (edit_json("adapter_config.json", fan_in_fan_out=True), "fan_in_fan_out is True"),
    "an option of the future": (edit_json("adapter_config.json", use_better_lora=True), "use_better_lora is True"),
    "changes the base": (edit_json("adapter_config.json", init_lora_weights="pissa"), "changes the base's weights"),
    "target outside": (edit_json("adapter_config.json", target_modules=["q_proj", "lm_head"]), "target_modules names 'lm_head'"),
    "target by expression": (edit_json("adapter_config.json", target_modules=".*q_proj"), "expected a list of module names"),
    "rank by expression": (edit_json("adapter_config.json", rank_pattern={"(a+)+$": 2}), "rank_pattern is"),
    "rank is text": (edit_json("adapter_config.json", r="8"), "the rank is '8', expected a whole number"),
    "no LoRA": (edit_json("adapter_config.json", peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_on_its_headers_with_the_reason(case: str, adapter_folder: Path, base_folder: Path) -> None:
    mutate, message = BAD[case]
    mutate(adapter_folder)
    with pytest.raises(AdapterError, match=re.escape(message)) as error:
        validate_folder(adapter_folder, base_folder)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(AdapterError, match=re.escape(message)):
        read_adapter(adapter_folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("file", "name"), [(LORA, FIRST), (MTP, "mask_embeddings"), (MTP, "sampler.norm_1.weight")])
def test_a_number_that_is_not_finite_is_found_when_tensors_are_loaded(
    value: float, file: str, name: str, adapter_folder: Path
) -> None:
    edit_tensors(file, lambda tensors: tensors[name].view(-1)[3].fill_(value))(adapter_folder)
    validate_folder(adapter_folder)
    with pytest.raises(AdapterError, match=re.escape(f"{file}: tensor {name} holds NaN or infinity in 1 of")):
        read_adapter(adapter_folder)


def test_features_are_checked_against_the_base(adapter_folder: Path, base_folder: Path) -> None:
    edit_tensors(LORA, lambda tensors: tensors.update({FIRST: torch.zeros(2, 15)}))(adapter_folder)
    with pytest.raises(AdapterError, match=re.escape("has shape [2, 15], expected [2, 16]")):
        read_adapter(adapter_folder, linear_shapes(base_folder))


@pytest.mark.parametrize(
    ("key", "value"), [("model_type", "qwen3"), ("hidden_size", 32), ("num_hidden_layers", 2), ("vocab_size", 41)]
)
def test_another_base_is_refused_with_both_values(key: str, value: object, adapter_folder: Path, base_folder: Path) -> None:
    found = json.loads((base_folder / "config.json").read_text())[key]
    edit_json("config.json", **{key: value})(base_folder)
    with pytest.raises(AdapterError, match=rf"{key} is {value} here and {found} in .*some/base"):
        validate_folder(adapter_folder, base_folder)


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

    monkeypatch.setattr(module, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
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


@hypothesis_files
@given(share=st.floats(0, 1, exclude_max=True), file=st.sampled_from([LORA, MTP]))
def test_every_truncation_is_found(share: float, file: str, adapter_folder: Path) -> None:
    data = (adapter_folder / file).read_bytes()
    try:
        (adapter_folder / file).write_bytes(data[: int(share * len(data))])
        with pytest.raises(AdapterError):
            validate_folder(adapter_folder)
    finally:
        (adapter_folder / file).write_bytes(data)


@hypothesis_files
@given(
    position=st.integers(0, 3000),
    byte=st.integers(0, 255),
    file=st.sampled_from([LORA, MTP, "config.json", "adapter_config.json"]),
)
def test_a_changed_byte_gives_an_adapter_or_an_error_of_ours(position: int, byte: int, file: str, adapter_folder: Path) -> None:
    data = (adapter_folder / file).read_bytes()
    changed = bytearray(data)
    changed[position % len(data)] = byte
    try:
        (adapter_folder / file).write_bytes(changed)
        read_adapter(adapter_folder)
    except AdapterError:
        pass
    finally:
        (adapter_folder / file).write_bytes(data)
