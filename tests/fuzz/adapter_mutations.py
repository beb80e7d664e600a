"""Ways to damage an adapter folder, each with what a reader must make of the result.

A mutation changes `Case.folder`, which holds a sound adapter, and returns REFUSED (a reader must refuse it), READ (a reader must
read what the files say) or EITHER (damage that may happen to leave a sound adapter; if it is read, then as the files say).
"""

import contextlib
import copy
import json
import os
import random
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REFUSED, READ, EITHER = "refused", "read", "either"
CONFIG, PEFT, LORA, MTP = "config.json", "adapter_config.json", "adapter_model.safetensors", "mtp.safetensors"
FILES, JSONS, TENSORS = (CONFIG, PEFT, LORA, MTP), (CONFIG, PEFT), (LORA, MTP)
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U64", "U8", "BOOL", "C64", "F4", "f32", "")
ODD_TEXTS = (
    "",
    " ",
    "\0",
    "\x1b[2J",
    "\u202e",
    "../../etc/passwd",
    "/etc/passwd",
    "~",
    "file:///etc/passwd",
    "%s%n{0}{x!r}",
    "__import__('os')",
    "NaN",
    "true",
    "1",
    "none",
    "\U0001f600",
    "x" * 5000,
)
ODD_NUMBERS = (
    0,
    -0.0,
    -1,
    1,
    2,
    3,
    7,
    1.0,
    1.5,
    33,
    2**31 - 1,
    2**31,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    10**400,
    1e308,
    5e-324,
)
ODD_VALUES = (None, True, False, [], {}, [[]], {"": None}, [None], *ODD_NUMBERS, *ODD_TEXTS)


@dataclass
class Case:
    """A sound adapter in `folder` that a mutation may change; `outside` has copies of its files, which nothing may read.

    Attributes:
        path: what a reader is given; the folder, unless a mutation says otherwise.
        allowed: folders that a reader may read from.
    """

    rng: random.Random
    folder: Path
    outside: Path
    path: Path
    allowed: list[Path]

    def file(self, names: tuple[str, ...] = FILES) -> Path:
        """One of the adapter's files."""
        return self.folder / self.rng.choice(names)


Mutation = Callable[[Case], str]
MUTATIONS: dict[str, tuple[Mutation, int]] = {}
"""Name -> mutation, and how often it is chosen."""


def mutation(weight: int = 1) -> Callable[[Mutation], Mutation]:
    """Enters a mutation under its function's name."""

    def enter(function: Mutation) -> Mutation:
        MUTATIONS[function.__name__] = function, weight
        return function

    return enter


def _odd_value(rng: random.Random) -> Any:
    match rng.randrange(6):
        case 0:
            return [copy.deepcopy(rng.choice(ODD_VALUES)) for _ in range(rng.randrange(1, 5))]
        case 1:
            return {str(rng.choice(ODD_TEXTS)): copy.deepcopy(rng.choice(ODD_VALUES)) for _ in range(rng.randrange(1, 4))}
        case 2:
            return rng.choice((float("nan"), float("inf"), -float("inf")))
        case _:
            return copy.deepcopy(rng.choice(ODD_VALUES))  # for a later change is made in what is there


# -- bytes -------------------------------------------------------------------------------------------------------


@mutation(8)
def changed_bytes(case: Case) -> str:
    file, rng = case.file(), case.rng
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        near_start = rng.random() < 0.7
        data[rng.randrange(min(len(data), 400) if near_start else len(data))] = rng.randrange(256)
    file.write_bytes(data)
    return EITHER


@mutation(3)
def spliced_bytes(case: Case) -> str:
    file, rng = case.file(), case.rng
    data = file.read_bytes()
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    middle = rng.choice((b"", data[a:b] * 2, bytes(b - a), rng.randbytes(rng.randrange(64)), data[a:b][::-1]))
    file.write_bytes(data[:a] + middle + data[b:])
    return EITHER


@mutation(2)
def truncated(case: Case) -> str:
    file = case.file(TENSORS)
    os.truncate(file, case.rng.randrange(file.stat().st_size))
    return REFUSED


@mutation()
def data_behind_the_end(case: Case) -> str:
    with case.file(TENSORS).open("ab") as file:
        file.write(case.rng.randbytes(case.rng.randrange(1, 100)))
    return REFUSED


@mutation()
def sparse_giant(case: Case) -> str:
    """A file that claims to have terabytes."""
    file = case.file()
    with contextlib.suppress(OSError):  # more than the file system can name
        os.truncate(file, case.rng.choice((2**32, 2**36, 2**40, 2**43)))
        return REFUSED
    return READ


@mutation()
def other_files_content(case: Case) -> str:
    a, b = case.rng.sample(FILES, 2)
    shutil.copy(case.folder / a, case.folder / b)
    return REFUSED


# -- JSON --------------------------------------------------------------------------------------------------------


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value in a JSON value, the whole first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(deeper for key, part in inner for deeper in _places(part, (*place, key)))]


def _with(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    at = value
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = new
    return value


def _edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@mutation(16)
def odd_json_value(case: Case) -> str:
    file, rng = case.file(JSONS), case.rng
    values = json.loads(file.read_text())
    places = _places(values)
    for _ in range(rng.choice((1, 1, 1, 2))):
        values = _with(values, rng.choice(places[1:] if rng.random() < 0.97 else places[:1]), _odd_value(rng))
        places = _places(values)
        if len(places) < 2:
            break
    file.write_text(json.dumps(values))
    return EITHER


@mutation(6)
def odd_json_key(case: Case) -> str:
    file, rng = case.file(JSONS), case.rng
    values = json.loads(file.read_text())
    inside = values if rng.random() < 0.6 else rng.choice([v for v in values.values() if isinstance(v, dict)])
    keys = list(inside)
    key = rng.choice(keys) if keys else "x"
    match rng.randrange(4):
        case 0:
            inside.pop(key, None)
        case 1:
            inside[rng.choice((key.upper(), key + " ", key + "s", key.replace("_", "-")))] = inside.pop(key, 1)
        case 2:
            inside[rng.choice(("auto_map", "trust_remote_code", "__class__", "quantization_config", *ODD_TEXTS))] = _odd_value(rng)
        case 3:
            # After which one the last word is, JSON does not say; parsers take the last one.
            text = json.dumps(values).replace(f'"{key}":', f'"{key}": {json.dumps(_odd_value(rng))}, "{key}":', 1)
            file.write_text(text)
            return EITHER
    file.write_text(json.dumps(values))
    return EITHER


@mutation(3)
def nested_json(case: Case) -> str:
    """Nesting around the depths at which parsers, printers and Python itself give up."""
    file, rng = case.file(JSONS), case.rng
    depth = rng.choice((10, 60, 100, 190, 205, 300, 480, 900, 960, 985, 990, 995, 1000, 1500, 20000)) + rng.randrange(12)
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")))
    text = opening * depth + ("1" if "a" in opening else "") + closing * depth
    values = json.loads(file.read_text())
    place = rng.choice([p for p in _places(values) if p])
    values = _with(values, place, "HERE")
    file.write_text(json.dumps(values).replace('"HERE"', text) if rng.random() < 0.8 else text)
    return EITHER


@mutation(4)
def raw_json(case: Case) -> str:
    """Text that is no JSON, or JSON that few writers write."""
    file, rng = case.file(JSONS), case.rng
    text = file.read_text()
    number = rng.choice(("9" * rng.choice((300, 4299, 4300, 4301, 100_000)), "1e999", "-1e999", "1e-999", "0x10", "01", "+1", "1."))
    values = json.loads(text)
    place = rng.choice([p for p in _places(values) if p])
    holed = json.dumps(_with(values, place, "HERE"))
    file.write_bytes(
        rng.choice(
            (
                holed.replace('"HERE"', number).encode(),
                holed.replace('"HERE"', number).encode(),
                holed.replace('"HERE"', rng.choice(("NaN", "Infinity", "-Infinity", "nan", "None", "undefined"))).encode(),
                holed.replace("HERE", rng.choice(("\\ud800", "\\udfff\\ud800", "\\u0000", "\\x41", "\\"))).encode(),
                holed.replace("HERE", "\xff").encode("latin-1"),
                b"\xef\xbb\xbf" + text.encode(),
                text.encode("utf-16"),
                text.encode("utf-32"),
                b" " * rng.choice((1, 1 << 20, (4 << 20) + 1)) + text.encode(),
                text.encode() + rng.choice((b" ", b"\0", b"{}", b"//", b"\n" * 100)),
                b"/* */" + text.encode(),
                text.replace("}", ",}").encode(),
                text.replace('"', "'").encode(),
                b"",
                rng.choice((b"null", b"[]", b'"text"', b"0", b"true", b"{}", b"[" * 10**6)),
            )
        )
    )
    return EITHER


# -- PEFT's options ----------------------------------------------------------------------------------------------

_MODULES = [
    f"model.layers.{i}.{part}"
    for i in range(3)
    for part in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
]


@mutation(5)
def peft_option(case: Case) -> str:
    rng = case.rng
    option, value = rng.choice(
        (
            ("peft_type", rng.choice(("lora", "IA3", "ADALORA", None, 5, ["LORA"]))),
            ("bias", rng.choice(("all", "lora_only", True, 1))),
            ("use_dora", rng.choice((True, 1, "yes"))),
            ("fan_in_fan_out", True),
            ("modules_to_save", ["lm_head"]),
            ("layers_to_transform", rng.choice(([0], 1, [10**9]))),
            ("layer_replication", [[0, 2]]),
            ("trainable_token_indices", [1]),
            ("target_parameters", ["x"]),
            ("exclude_modules", ["q_proj"]),
            ("use_rslora", rng.choice(("false", "no", 1, [0], {"a": 1}))),
            ("init_lora_weights", rng.choice(("pissa", "PiSSA_niter_4", "olora", "corda", "loftq", "lora_ga"))),
            ("target_modules", rng.choice(("q_proj", ".*", [], None, [1], ["lm_head"], ["../q_proj"], ["q_proj", ".*"]))),
            ("rank_pattern", {rng.choice(("(a+)+$", "q_proj|k_proj", "^model", "", "q proj")): 2}),
            ("r", rng.choice((0, -2, 3, 4097, 2**40, 2.5, "2", None, True, [2], float("nan")))),
            ("lora_alpha", rng.choice((0, -1, 1e7, None, "1", True, float("inf"), float("nan")))),
        )
    )
    _edit(case.folder / PEFT, lambda values: values.update({option: value}))
    return REFUSED


@mutation(3)
def other_scales(case: Case) -> str:
    """Patterns of scales and rsLoRA, which a reader must honour."""
    rng = case.rng
    alphas = {
        rng.choice((module, module.rsplit(".", 1)[1], module.split(".", 2)[2])): rng.choice((1, 2.5, 16, 1e-3))
        for module in rng.sample(_MODULES, rng.randrange(6))
    }
    more: dict[str, Any] = {
        "alpha_pattern": alphas,
        "lora_alpha": rng.choice((1, 8, 0.5)),
        "use_rslora": rng.choice((True, False, None)),
        "rank_pattern": rng.choice((None, {}, {rng.choice(_MODULES): 2})),
        "target_modules": rng.choice((_MODULES, [module.rsplit(".", 1)[1] for module in _MODULES])),
        "lora_dropout": rng.random(),
        "peft_version": rng.choice(("0.19.0", None, "x" * 100)),
        "use_dora": rng.choice((None, False)),
    }
    _edit(case.folder / PEFT, lambda values: values.update(more))
    return READ


@mutation()
def fewer_targets(case: Case) -> str:
    """Targets that do not match the file's tensors."""
    targets = case.rng.sample(_MODULES, case.rng.randrange(1, len(_MODULES) - 1))
    _edit(case.folder / PEFT, lambda values: values.update(target_modules=targets))
    return REFUSED


@mutation()
def endless_lists(case: Case) -> str:
    """Lists and patterns as long as the file may be: what compares each entry with each module takes minutes."""
    rng = case.rng
    count = rng.choice((1000, 30_000, 90_000))
    names = [f"{rng.choice(('x', 'layers.999', '2'))}.mlp.{i}_down_proj" for i in range(count)]
    known = [rng.choice(_MODULES[-7:]) for _ in range(count)]
    layers = rng.choice((3, 1000))
    _edit(case.folder / CONFIG, lambda values: values["base"].update(num_hidden_layers=layers))
    option, value = rng.choice(
        (
            ("target_modules", known),
            ("target_modules", [*known, "lm_head"]),
            ("target_modules", ["q_proj", *names]),
            ("alpha_pattern", dict.fromkeys(names, 2)),
            ("rank_pattern", dict.fromkeys(names, 2)),
            ("rank_pattern", {**dict.fromkeys(names, 2), "(": 1}),
        )
    )
    _edit(case.folder / PEFT, lambda values: values.update({option: value}))
    return EITHER


# -- safetensors headers -----------------------------------------------------------------------------------------


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensor bytes of a sound safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file; `length`: what it says that its header has."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _edit_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header, data = split(file.read_bytes())
    change(header)
    file.write_bytes(joined(json.dumps(header).encode(), data))


def _tensor(rng: random.Random, header: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    name = rng.choice([name for name in header if name != "__metadata__"])
    return name, header[name]


@mutation(5)
def odd_dtype(case: Case) -> str:
    file, rng = case.file(TENSORS), case.rng
    header, data = split(file.read_bytes())
    _, entry = _tensor(rng, header)
    entry["dtype"] = rng.choice(
        [dtype for dtype in (*DTYPES, None, 32, ["F32"], {"F32": 1}, "F32\0", "x" * 10**5) if dtype != "F32"]
    )
    file.write_bytes(joined(json.dumps(header).encode(), data))
    return REFUSED  # a 16-bit float has another size


@mutation(8)
def odd_shape(case: Case) -> str:
    file, rng = case.file(TENSORS), case.rng
    header, data = split(file.read_bytes())
    _, entry = _tensor(rng, header)
    shape = list(entry["shape"])
    at = rng.randrange(len(shape))
    match rng.randrange(8):
        case 0:
            shape = [rng.choice((-1, 0, 1.0 * shape[at], True, "16", None, 2**31, 2**63, 2**64 + shape[at], 10**400)), *shape[1:]]
            if shape[0] == entry["shape"][0] and type(shape[0]) is int:
                shape.append(1)
        case 1:
            shape = [-n for n in shape]
        case 2:
            shape = shape[::-1] if len(set(shape)) > 1 else [*shape, 1]
        case 3:
            shape.insert(rng.randrange(len(shape) + 1), 1)
        case 4:
            shape = rng.choice(([], None, "2x16", {"0": 2}, 32, [shape], [[n] for n in shape]))
        case 5:
            shape = [*shape, *[1] * rng.choice((10, 1000, 100_000))]
        case 6:
            # The product of these is what takes long, or has no end.
            digits, count = rng.choice(((4200, 900), (400, 9000), (19, 50_000)))
            shape = [int("9" * digits)] * count
        case 7:
            shape[at] += rng.choice((-1, 1, 16))
    entry["shape"] = shape
    file.write_bytes(joined(json.dumps(header).encode(), data))
    return REFUSED


@mutation(8)
def odd_offsets(case: Case) -> str:
    file, rng = case.file(TENSORS), case.rng
    header, data = split(file.read_bytes())
    _, entry = _tensor(rng, header)
    begin, end = entry["data_offsets"]
    other = _tensor(rng, header)[1]["data_offsets"]
    if other == [begin, end]:
        other = [begin + 4, end + 4]
    entry["data_offsets"] = rng.choice(
        (
            [end, begin],
            [begin, end + 1],
            [begin, end - 1],
            [begin + 4, end + 4],
            [begin - 4, end - 4],
            [-end, -begin],
            [begin + 2**64, end + 2**64],
            [2**63, 2**63 + end - begin],
            [begin, end, end],
            [begin],
            [],
            None,
            "0:64",
            {"0": begin},
            [float(begin), float(end)],
            [str(begin), str(end)],
            [True, False],
            [10**400, 10**400],
            other,
        )
    )
    file.write_bytes(joined(json.dumps(header).encode(), data))
    return REFUSED


@mutation(3)
def odd_entry(case: Case) -> str:
    rng = case.rng

    def change(header: dict[str, Any]) -> None:
        name, entry = _tensor(rng, header)
        if rng.random() < 0.5:
            header[name] = rng.choice((None, 1, "F32", [], [entry], {}, True))
        else:
            entry.pop(rng.choice(list(entry)))

    _edit_header(case.file(TENSORS), change)
    return REFUSED


@mutation(4)
def odd_tensor_name(case: Case) -> str:
    rng = case.rng

    def change(header: dict[str, Any]) -> None:
        name, entry = _tensor(rng, header)
        names = (*ODD_TEXTS, name.upper(), name + "\0", name + " ", f"../{name}", name.replace("_", "/"), "\ud800", "__metadata__")
        new = rng.choice([other for other in names if other != name])
        if rng.random() < 0.7:
            del header[name]
        header[new] = entry

    _edit_header(case.file(TENSORS), change)
    return REFUSED


@mutation(2)
def duplicate_tensor(case: Case) -> str:
    """One name twice in a header: with the same entry, with another tensor's, with nonsense before or behind."""
    file, rng = case.file(TENSORS), case.rng
    header, data = split(file.read_bytes())
    name, entry = _tensor(rng, header)
    twin = rng.choice(
        (entry, _tensor(rng, header)[1], {}, None, {**entry, "dtype": "I32"}, {**entry, "shape": entry["shape"][::-1]})
    )
    first, second = rng.sample((entry, twin), 2)
    text = json.dumps(header).replace(
        f"{json.dumps(name)}: {json.dumps(entry)}",
        f"{json.dumps(name)}: {json.dumps(first)}, {json.dumps(name)}: {json.dumps(second)}",
    )
    file.write_bytes(joined(text.encode(), data))
    return EITHER


@mutation(3)
def odd_header_length(case: Case) -> str:
    file, rng = case.file(TENSORS), case.rng
    header, data = split(file.read_bytes())
    text = json.dumps(header).encode()
    length = rng.choice(
        (0, 1, 2, 8, len(text) - 1, len(text) + 1, len(text) + len(data), len(text) + len(data) + 1, 2**24, 2**32, 2**40)
    )
    file.write_bytes(joined(text, data, rng.choice((length, length, 2**63, 2**64 - 1, 2**64 - 8))))
    return REFUSED


@mutation(2)
def padded_header(case: Case) -> str:
    """Blanks behind the header, so that tensors lie at odd places; a reader must not care."""
    file = case.file(TENSORS)
    header, data = split(file.read_bytes())
    file.write_bytes(joined(json.dumps(header).encode() + b" " * case.rng.randrange(20), data))
    return READ


@mutation()
def header_of_another_kind(case: Case) -> str:
    file, rng = case.file(TENSORS), case.rng
    header, data = split(file.read_bytes())
    text = json.dumps(header).encode()
    head = rng.choice(
        (b" " + text, b"\n" + text, b"[]", b"null", b"", b"[" * 5000, b'{"a":' * 3000, b"\x80\x04." + text, text + text)
    )
    file.write_bytes(joined(head, data))
    return EITHER


@mutation(2)
def odd_metadata(case: Case) -> str:
    rng = case.rng
    metadata = rng.choice(
        (None, [], 5, {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"a": "x" * 10**5}, {"\0": "\0"}, {"format": "tf"}, {})
    )
    _edit_header(case.file(TENSORS), lambda header: header.update(__metadata__=metadata))
    return EITHER


@mutation()
def many_tensors(case: Case) -> str:
    """A header with as many tensors, or as much of anything, as fits."""
    file, rng = case.file(TENSORS), case.rng
    header, data = split(file.read_bytes())
    text = json.dumps(header)[:-1]
    count = rng.choice((1000, 20_000, 60_000))
    last = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    empty = f'{{"dtype":"F32","shape":[0],"data_offsets":[{last},{last}]}}'
    what = rng.choice(("tensors", "nothings"))
    more = ",".join(f'"t{i}":{empty}' for i in range(count)) if what == "tensors" else f'"t":[{",".join(["{}"] * 40 * count)}]'
    file.write_bytes(joined(f"{text},{more}}}".encode(), data))
    return REFUSED


# -- tensors -----------------------------------------------------------------------------------------------------


@mutation(3)
def not_finite(case: Case) -> str:
    file, rng = case.file(TENSORS), case.rng
    header, data = split(file.read_bytes())
    _, entry = _tensor(rng, header)
    begin, end = entry["data_offsets"]
    at = rng.randrange(begin, end, 4)
    bits = rng.choice((0x7FC00000, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF))
    file.write_bytes(joined(json.dumps(header).encode(), data[:at] + struct.pack("<I", bits) + data[at + 4 :]))
    return REFUSED


@mutation(2)
def other_numbers(case: Case) -> str:
    """Finite numbers of any size, denormal ones among them; a reader must take them as they are."""
    file, rng = case.file(TENSORS), case.rng
    header, data = split(file.read_bytes())
    _, entry = _tensor(rng, header)
    if entry["dtype"] != "F32":
        return READ
    begin, end = entry["data_offsets"]
    new = b"".join(
        struct.pack("<f", rng.choice((0.0, -0.0, 1e-45, 3.4e38, -3.4e38, rng.gauss(0, 1)))) for _ in range(begin, end, 4)
    )
    file.write_bytes(joined(json.dumps(header).encode(), data[:begin] + new + data[end:]))
    return READ


def _rewritten(file: Path, rng: random.Random, dtypes: tuple[str, ...], shuffle: bool) -> None:
    """The file's tensors in other dtypes (top halves of their floats) and another order."""
    header, data = split(file.read_bytes())
    names = [name for name in header if name != "__metadata__"]
    if shuffle:
        rng.shuffle(names)
    new: dict[str, Any] = {}
    blob = b""
    for name in names:
        entry = header[name]
        raw = data[slice(*entry["data_offsets"])]
        dtype = rng.choice(dtypes) if entry["dtype"] == "F32" else entry["dtype"]
        if (
            dtype != entry["dtype"]
        ):  # the upper half is the number as bfloat16, and some finite number as float16 with its exponent cut
            raw = b"".join(bytes((raw[i + 2], raw[i + 3] & (0xFF if dtype == "BF16" else 0xBF))) for i in range(0, len(raw), 4))
        new[name] = {"dtype": dtype, "shape": entry["shape"], "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    file.write_bytes(joined(json.dumps(new).encode(), blob))


@mutation(2)
def other_order(case: Case) -> str:
    _rewritten(case.file(TENSORS), case.rng, ("F32",), shuffle=True)
    return READ


@mutation(2)
def other_dtypes(case: Case) -> str:
    """Float16 and bfloat16 among float32, at places that are no multiple of their sizes."""
    _rewritten(case.file(TENSORS), case.rng, ("F32", "BF16", "F16"), shuffle=True)
    return READ


@mutation(2)
def another_width(case: Case) -> str:
    """A consistent file whose tensors do not fit the base: one more, or one fewer, number in every row."""
    file, rng = case.file(TENSORS), case.rng
    header, _ = split(file.read_bytes())
    chosen, _ = _tensor(rng, header)
    offset = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if name == chosen:
            entry["shape"][-1] += rng.choice((-1, 1))
        size = 4
        for n in entry["shape"]:
            size *= n
        entry["data_offsets"] = [offset, offset := offset + size]
    file.write_bytes(joined(json.dumps(header).encode(), bytes(offset)))
    return REFUSED


@mutation()
def sparse_tensors(case: Case) -> str:
    """A sound header for gigabytes of zeros that take no space on disk: they may not be loaded."""
    rng = case.rng
    width = rng.choice((2**24, 2**27))
    header: dict[str, Any] = {}
    offset = 0
    for name, entry in split((case.folder / LORA).read_bytes())[0].items():
        if name == "__metadata__":
            continue
        shape = [2, width] if "lora_A" in name else entry["shape"]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset := offset + 4 * shape[0] * shape[1]]}
    head = joined(json.dumps(header).encode(), b"")
    (case.folder / LORA).write_bytes(head)
    os.truncate(case.folder / LORA, len(head) + offset)
    return REFUSED


# -- files -------------------------------------------------------------------------------------------------------


@mutation(2)
def missing_file(case: Case) -> str:
    case.file().unlink()
    return REFUSED


@mutation(3)
def no_regular_file(case: Case) -> str:
    file, rng = case.file(), case.rng
    file.unlink()
    match rng.randrange(4):
        case 0:
            file.mkdir()
        case 1:
            os.mkfifo(file)
        case 2:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(file))
        case 3:
            file.symlink_to(
                rng.choice(("/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/environ", "/proc/self/mem", "/dev/tty"))
            )
    return REFUSED


@mutation(6)
def link_out(case: Case) -> str:
    """Links to sound copies of the file: only where they lie speaks against them."""
    file, rng = case.file(), case.rng
    file.unlink()
    target = case.outside / file.name
    match rng.randrange(5):
        case 0:
            file.symlink_to(target)
        case 1:
            file.symlink_to(os.path.relpath(target, case.folder))
        case 2:
            (case.folder / "step").symlink_to(target)
            file.symlink_to("step")
        case 3:
            (case.folder / "door").symlink_to(case.outside, target_is_directory=True)
            file.symlink_to(Path("door") / file.name)
        case 4:
            file.symlink_to(Path("..") / case.folder.name / ".." / os.path.relpath(target, case.folder.parent))
    return REFUSED


@mutation(2)
def link_in(case: Case) -> str:
    """Links that stay in the folder, however they say it."""
    file, rng = case.file(), case.rng
    (case.folder / "parts").mkdir()
    kept = case.folder / rng.choice((f"parts/{file.name}", f"{file.name}.data"))
    file.rename(kept)
    file.symlink_to(
        rng.choice((kept, kept.relative_to(case.folder), Path("..") / case.folder.name / kept.relative_to(case.folder)))
    )
    return READ


@mutation(2)
def link_nowhere(case: Case) -> str:
    file, rng = case.file(), case.rng
    file.unlink()
    if rng.random() < 0.5:
        file.symlink_to(file.name)
    else:
        file.symlink_to(rng.choice(("a-missing-file", "/nowhere/at/all", "\n", "x" * 200, "..")))
    return REFUSED


@mutation(2)
def further_link(case: Case) -> str:
    """A link that no reader needs; one that leads out, or round in a circle, may lead somebody else out."""
    link = case.folder / case.rng.choice(("notes", "model.safetensors", "tokenizer.json", ".hidden", "sub"))
    link.symlink_to(case.rng.choice((str(case.outside / CONFIG), str(case.outside), "/etc/passwd", "../..", "/", link.name)))
    return REFUSED


@mutation(2)
def pickle_file(case: Case) -> str:
    name = case.rng.choice(("adapter_model.bin", "x.pt", "OPTIMIZER.PTH", "a.Pkl", "a.pickle", "model.ckpt", "m.joblib"))
    # Runs code when it is loaded: the witness of opened files would see its file.
    (case.folder / name).write_bytes(b"cposix\nsystem\n(S'touch /tmp/vllm-mtp-fuzz-was-here'\ntR.")
    return REFUSED


@mutation()
def further_files(case: Case) -> str:
    """Files that mean nothing to a reader."""
    name = case.rng.choice(
        ("README.md", "modeling_adapter.py", "conftest.py", "tokenizer.json", "config.json~", "mtp.safetensors.index.json")
    )
    (case.folder / name).write_bytes(case.rng.choice((b"", b"raise SystemExit('was run')", b"\xff" * 100)))
    if case.rng.random() < 0.3:
        (case.folder / "checkpoint-1").mkdir()
    return READ


@mutation()
def other_path(case: Case) -> str:
    """The folder itself under another name: an operator's own link, or a roundabout path."""
    rng = case.rng
    if rng.random() < 0.5:
        case.path = case.folder.parent / "link"
        case.path.symlink_to(rng.choice((case.folder, Path(case.folder.name))))
    else:
        (case.folder / "sub").mkdir()
        case.path = case.folder / rng.choice(("sub/..", ".", "./sub/../."))
    return READ


@mutation(2)
def hub_cache(case: Case) -> str:
    """The hub's download cache: links to the blobs beside the snapshots, and only to those."""
    rng = case.rng
    model = case.folder.parent / "models--x"
    blobs, snapshot = model / "blobs", model / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    case.path, case.allowed = snapshot, [model]
    for name in FILES:
        (case.folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    match rng.randrange(5):
        case 0:
            return READ
        case 1:
            name = rng.choice(FILES)
            (snapshot / name).unlink()
            (snapshot / name).symlink_to(case.outside / name)
        case 2:
            name = rng.choice(FILES)
            (blobs / name).unlink()
            (blobs / name).symlink_to(case.outside / name)
        case 3:
            shutil.rmtree(blobs)
            blobs.symlink_to(case.outside, target_is_directory=True)
        case 4:
            name = rng.choice(FILES)
            (blobs / name).rename(model / name)
            (snapshot / name).unlink()
            (snapshot / name).symlink_to(Path("../..") / name)
    return REFUSED
