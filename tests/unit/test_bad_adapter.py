"""What can be wrong with an adapter folder: each is refused before a tensor is loaded, with the reason in a sentence."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_mtp.adapter import (
    AdapterError,
    is_adapter,
    linear_shapes,
    read_adapter,
    read_config,
    validate_folder,
)
from vllm_mtp.peft_format import modules_in, read_lora_specs
from vllm_mtp.safe_files import read_header

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


def raw_value(file: str, key: str, text: str) -> Callable[[Path], None]:
    """Puts `text`, as it stands, where a key's value is."""

    def mutate(folder: Path) -> None:
        edit_json(file, **{key: "HERE"})(folder)
        (folder / file).write_text((folder / file).read_text().replace('"HERE"', text))

    return mutate


def replaced(file: str, replace: Callable[[Path], object]) -> Callable[[Path], None]:
    """Puts something else in the place of a file."""

    def mutate(folder: Path) -> None:
        (folder / file).unlink()
        replace(folder / file)

    return mutate


def repeated(**entries: object) -> Callable[[Path], None]:
    return header_entry(lambda header: header["mask_embeddings"].update(entries))


def speculators(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["speculators_config"]


def ends_with_odd_letters(header: dict) -> None:
    header["a\x1b[2Jb\u202ec"] = header.pop("mask_embeddings")


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
    "a number without end": (
        lambda f: edit_json("config.json", base={**json.loads((f / "config.json").read_text())["base"], "hidden_size": 10**30})(f),
        "base.hidden_size: Input should be less than or equal to",
    ),
    "a name without end": (
        header_entry(lambda h: h.update({"x\n" * 10**6: h["mask_embeddings"]})),
        "x x x",
    ),
    "another base for vLLM": (
        lambda f: edit_json("config.json", speculators_config={**speculators(f), "verifier": {"name_or_path": "other/base"}})(f),
        "speculators_config is {'algorithm': 'mtp'",
    ),
    "too many drafts for vLLM": (
        lambda f: edit_json("config.json", speculators_config={**speculators(f), "proposal_methods": [{"speculative_tokens": 5}]})(
            f
        ),
        "write the adapter again, or remove speculators_model_type",
    ),
    "another method for vLLM": (edit_json("config.json", speculators_model_type="eagle3"), "speculators_model_type is 'eagle3'"),
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
    "a number of too many digits": (raw_value("config.json", "num_mask_tokens", "9" * 5000), "config.json is not valid JSON"),
    "a shape of too many digits": (
        header_entry(lambda h: h.update(mask_embeddings={"dtype": "F32", "shape": [10**4000], "data_offsets": [0, 4]})),
        "the shape of tensor mask_embeddings",
    ),
    "a shape whose product has no end": (
        header_entry(lambda h: h.update(mask_embeddings={"dtype": "F32", "shape": [10**4000] * 900, "data_offsets": [0, 4]})),
        "the shape of tensor mask_embeddings",
    ),
    "dtype is an object": (repeated(dtype={"F32": 1}), "mask_embeddings has dtype {'F32': 1}"),
    "not a number": (raw_value("config.json", "training", "NaN"), "config.json is not valid JSON"),
    "half a character": (raw_value("config.json", "training", '"\\ud800"'), "config.json is not valid JSON"),
    "nested as deeply as Python can": (
        raw_value("config.json", "training", "[" * 985 + "]" * 985),
        "config.json is not valid JSON",
    ),
    "k in quotes": (edit_json("config.json", num_mask_tokens="4"), "num_mask_tokens: Input should be a valid integer"),
    "k is true": (edit_json("config.json", num_mask_tokens=True), "num_mask_tokens: Input should be a valid integer"),
    "rsLoRA in words": (edit_json("adapter_config.json", use_rslora="no"), "use_rslora is 'no', expected true or false"),
    "a name that a terminal obeys": (header_entry(ends_with_odd_letters), "mask_embeddings is missing"),
    "a pipe": (replaced(MTP, os.mkfifo), f"{MTP} is no regular file"),
    "a pipe for a configuration": (replaced("adapter_config.json", os.mkfifo), "adapter_config.json is no regular file"),
    "a folder": (replaced(MTP, os.mkdir), f"{MTP} cannot be read (Is a directory)"),
    "a device without end": (
        replaced("config.json", lambda path: path.symlink_to("/dev/zero")),
        "config.json is a link that leads out",
    ),
    "a link to itself": (replaced(LORA, lambda path: path.symlink_to(path.name)), f"{LORA} is a link that leads nowhere"),
    "a further link to itself": (lambda f: (f / "notes").symlink_to("notes"), "notes is a link that leads nowhere"),
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


def test_a_configuration_behind_a_link_is_not_read(adapter_folder: Path, base_folder: Path) -> None:
    (adapter_folder / "config.json").rename(base_folder / "sound.json")
    (adapter_folder / "config.json").symlink_to(base_folder / "sound.json")
    with pytest.raises(AdapterError, match=r"config\.json is a link that leads out"):
        read_config(adapter_folder)
    assert is_adapter(adapter_folder)  # so that the reason is given, and not vLLM's about a model that it does not know


def modules(folder: Path, num_layers: int) -> list[str]:
    return modules_in(folder / LORA, read_header(folder / LORA), num_layers)


@pytest.mark.parametrize("option", ["target_modules", "rank_pattern", "alpha_pattern"])
def test_long_lists_are_looked_up_and_not_compared_with_every_module(option: str, adapter_folder: Path) -> None:
    names = [f"{i}.down_proj" for i in range(90_000)]
    value = ["999.mlp.down_proj"] * 90_000 if option == "target_modules" else dict.fromkeys(names, 1)
    edit_json("adapter_config.json", **{option: value})(adapter_folder)
    begin = time.monotonic()
    specs = read_lora_specs(adapter_folder, modules(adapter_folder, 1000))
    assert len(specs) == (1 if option == "target_modules" else 7000)
    assert time.monotonic() - begin < 2  # seconds; hundreds, if each name is held against each module


def test_the_first_name_of_a_pattern_that_fits_counts(adapter_folder: Path) -> None:
    pattern = {"q_proj": 4, "model.layers.1.self_attn.q_proj": 8, "mlp.up_proj": 2, "up_proj": 16}
    edit_json("adapter_config.json", alpha_pattern=pattern, lora_alpha=1, r=2)(adapter_folder)
    specs = read_lora_specs(adapter_folder, modules(adapter_folder, 3))
    scales = {module.rsplit(".", 2)[-1]: spec.scale for module, spec in specs.items()}
    assert scales == {"q_proj": 2, "k_proj": 0.5, "v_proj": 0.5, "o_proj": 0.5, "gate_proj": 0.5, "up_proj": 1, "down_proj": 0.5}


def test_a_message_is_one_printable_line(adapter_folder: Path) -> None:
    header_entry(lambda h: h.update({"a\x1b[2Jb\u202ec\nd": 5}))(adapter_folder)
    with pytest.raises(AdapterError, match=re.escape(r"tensor a\x1b[2Jb\u202ec d is 5")):
        validate_folder(adapter_folder)


def test_refused_files_are_closed(adapter_folder: Path) -> None:
    replaced(MTP, os.mkdir)(adapter_folder)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(AdapterError):
        validate_folder(adapter_folder)
    assert set(os.listdir("/proc/self/fd")) == before


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
