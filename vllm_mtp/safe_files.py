"""Files from strangers, checked before they are loaded: JSON objects, safetensors headers and the folder around them."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

MAX_JSON_BYTES = 4 << 20
MAX_HEADER_BYTES = 16 << 20  # about 100,000 tensors; an adapter of an 80-layer model has 1,120
MAX_MESSAGE = 1000
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

Shape = tuple[int | None, ...]
"""An expected shape; None stands for a size that only the base model could tell."""


class AdapterError(ValueError):
    """An adapter folder cannot be used. The message is one sentence: file, tensor or key, found, expected, remedy.

    It stays one line of bounded length, whatever a stranger has put into a name or a value that it quotes.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__(line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]} ...")


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def read_json_object(path: Path) -> dict[str, object]:
    """The JSON object in `path`; AdapterError when it is missing, oversized or not an object."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise AdapterError(f"{path} has {size} bytes, at most {MAX_JSON_BYTES} are read: it is no configuration file.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: an adapter folder must have it; download or write the adapter again.") from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON ({error}): download or write the adapter again.") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds a JSON {type(value).__name__}, expected an object: write the adapter again.")
    return value


def check_folder(folder: Path) -> None:
    """Refuse pickle files and links that lead out of `folder`.

    The hub's download cache is the one exception to the second rule: its snapshots are links into the `blobs` folder beside them.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder: name the adapter's folder.")
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise AdapterError(
                f"{path} may be a pickle file, which can run code when it is loaded: convert weights to safetensors"
                " (load them with peft where they are trusted, then save_pretrained) and delete it."
            )
        if path.is_symlink() and not any(path.resolve().is_relative_to(parent) for parent in allowed):
            raise AdapterError(f"{path} is a link that leads out of the adapter's folder: put the file itself there.")


def _field(value: object, what: str, path: Path, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise AdapterError(f"{path}: {what} of tensor {name} is {value!r}, expected a list of whole numbers: the file is damaged.")
    return tuple(value)


def _raw_header(path: Path, remedy: str) -> tuple[dict[str, object], int, int]:
    """The header of a safetensors file, the number of bytes up to its end, and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise AdapterError(f"{path} is truncated: its header should have {length} bytes, the file has {size}; {remedy}.")
            if length > MAX_HEADER_BYTES:
                raise AdapterError(f"{path} has a header of {length} bytes, at most {MAX_HEADER_BYTES} are read; {remedy}.")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: an adapter folder must have it; {remedy}.") from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AdapterError(f"{path} has a damaged header ({error}); {remedy}.") from None
    if not isinstance(header, dict):
        raise AdapterError(f"{path} has a damaged header (a JSON {type(header).__name__}); {remedy}.")
    return header, 8 + length, size


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Name -> dtype and shape of every tensor of a safetensors file, without reading one.

    Raises AdapterError when the header is damaged or does not account for every byte of the file, and on tensors that are not
    float32, float16 or bfloat16.
    """
    remedy = "download or write the adapter again"
    header, data_start, size = _raw_header(path, remedy)
    tensors, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict):
            raise AdapterError(f"{path}: the header's entry for tensor {name} is {entry!r}, expected an object; {remedy}.")
        dtype, shape = entry.get("dtype"), _field(entry.get("shape"), "the shape", path, name)
        if dtype not in FLOAT_BYTES:
            raise AdapterError(f"{path}: tensor {name} has dtype {dtype}, expected one of {', '.join(FLOAT_BYTES)}: convert it.")
        offsets = _field(entry.get("data_offsets"), "the place", path, name)
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * FLOAT_BYTES[dtype]:
            raise AdapterError(f"{path}: tensor {name} of shape {list(shape)} and dtype {dtype} lies at {list(offsets)}; {remedy}.")
        tensors[name] = TensorHeader(dtype, shape)
        spans.append((offsets, name))
    end = 0
    for offsets, name in sorted(spans):
        if offsets[0] != end:
            raise AdapterError(f"{path}: tensor {name} begins at byte {offsets[0]}, expected {end}; {remedy}.")
        end = offsets[1]
    if data_start + end != size:
        state = "truncated" if size < data_start + end else "damaged"
        raise AdapterError(f"{path} is {state}: it has {size} bytes, its header describes {data_start + end}; {remedy}.")
    return tensors


def _text(shape: Shape) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def check_tensors(path: Path, found: dict[str, TensorHeader], expected: dict[str, Shape], remedy: str) -> None:
    """Compare a file's tensors with what they must be; AdapterError names the first that is missing, extra or misshapen."""
    for name, shape in expected.items():
        if name not in found:
            raise AdapterError(f"{path}: tensor {name} is missing, expected with shape {_text(shape)}: {remedy}.")
    for name, header in found.items():
        if name not in expected:
            raise AdapterError(f"{path}: tensor {name} of shape {list(header.shape)} is not expected there: {remedy}.")
        want = expected[name]
        if len(header.shape) != len(want) or any(w not in (None, h) for w, h in zip(want, header.shape, strict=True)):
            raise AdapterError(f"{path}: tensor {name} has shape {_text(header.shape)}, expected {_text(want)}: {remedy}.")


def load_tensors(path: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The named tensors of a file whose header has been checked, on the CPU; AdapterError on NaN and infinity."""
    tensors = {}
    try:
        with safe_open(path, "pt") as file:
            for name in names:
                tensors[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise AdapterError(f"{path} cannot be loaded ({error}): download or write the adapter again.") from None
    for name, tensor in tensors.items():
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            bad = int(tensor.numel() - finite.sum())
            raise AdapterError(
                f"{path}: tensor {name} holds NaN or infinity in {bad} of {tensor.numel()} places, expected finite numbers:"
                " training diverged or the file is damaged; take an earlier checkpoint."
            )
    return tensors
