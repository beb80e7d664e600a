"""Files from strangers, checked before they are loaded: JSON objects, safetensors headers and the folder around them."""

import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open

MAX_JSON_BYTES = 4 << 20
MAX_HEADER_BYTES = 4 << 20  # about 25,000 tensors; an adapter of an 80-layer model has 1,120
MAX_DIMENSIONS = 8
MAX_BYTES = 2**48  # of a file, and so of any size and place in it; products of such numbers stay small
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
        super().__init__(one_line(message))


def printable(text: str) -> str:
    """The text with characters that do not print written out: a terminal obeys some of them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(message: str) -> str:
    """The message as one printable line of at most MAX_MESSAGE characters."""
    message = message[: 4 * MAX_MESSAGE]  # enough to fill the line, whatever of it is blank
    line = printable(" ".join(message.split()))
    return line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]} ..."


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def _check_link(path: Path) -> None:
    """Refuse a link that leads out of the folder that `path` stands in.

    The hub's download cache is the one exception: its snapshots are links into the `blobs` folder beside them.
    """
    if not path.is_symlink():
        return
    root = path.parent.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a circle is a RuntimeError before Python 3.13
        raise AdapterError(f"{path} is a link that leads nowhere: put the file itself there.") from None
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise AdapterError(f"{path} is a link that leads out of the adapter's folder: put the file itself there.")


def _without_waiting(path: str, flags: int) -> int:
    """Opens a named pipe too at once, so that it can be refused."""
    return os.open(path, flags | os.O_NONBLOCK)


@contextmanager
def _opened(path: Path, remedy: str, *, any_link: bool = False) -> Iterator[tuple[BinaryIO, int]]:
    """The regular file `path` and its size; AdapterError on anything else, which could block or never end."""
    try:
        if not any_link:
            _check_link(path)
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterError(f"{path} is no regular file: {remedy}.")
            yield file, status.st_size
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: an adapter folder must have it; {remedy}.") from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None


def read_json_object(path: Path, *, any_link: bool = False) -> dict[str, object]:
    """The JSON object in `path`.

    Strict about what other parsers see otherwise or not at all: no NaN, no lone surrogates, at most 200 levels. Of two members of
    one name the last one counts.

    Args:
        path: the file.
        any_link: follow links out of the file's folder; for folders of the operator's own.

    Raises:
        AdapterError: it is missing, oversized, no regular file, or no JSON object.
    """
    with _opened(path, "download or write the adapter again", any_link=any_link) as (file, size):
        if size > MAX_JSON_BYTES:
            raise AdapterError(f"{path} has {size} bytes, at most {MAX_JSON_BYTES} are read: it is no configuration file.")
        text = file.read(MAX_JSON_BYTES)
    try:
        value = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON ({error}): download or write the adapter again.") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds a JSON {type(value).__name__}, expected an object: write the adapter again.")
    return value


def check_folder(folder: Path) -> None:
    """Refuse pickle files and links that lead out of `folder`, whether or not they would be read."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise AdapterError(f"{folder} is not a folder that can be read ({error.strerror}): name the adapter's folder.") from None
    for path in paths:
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise AdapterError(
                f"{path} may be a pickle file, which can run code when it is loaded: convert weights to safetensors"
                " (load them with peft where they are trusted, then save_pretrained) and delete it."
            )
        _check_link(path)


def _field(value: object, what: str, path: Path, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= MAX_BYTES for n in value):
        raise AdapterError(f"{path}: {what} of tensor {name} is {value!r}, expected a list of whole numbers: the file is damaged.")
    return tuple(value)


def _raw_header(path: Path, remedy: str) -> tuple[dict[str, object], int, int]:
    """The header of a safetensors file, the number of bytes up to its end, and the size of the file."""
    with _opened(path, remedy) as (file, size):
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise AdapterError(f"{path} is truncated: its header should have {length} bytes, the file has {size}; {remedy}.")
        if length > MAX_HEADER_BYTES:
            raise AdapterError(f"{path} has a header of {length} bytes, at most {MAX_HEADER_BYTES} are read; {remedy}.")
        text = file.read(length)
    try:
        header = from_json(text, allow_inf_nan=False)
    except ValueError as error:
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
        if not isinstance(dtype, str) or dtype not in FLOAT_BYTES:
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
                # A copy: what safetensors gives lies in the mapped file, changes with it, and ends the process with a bus error
                # when the file becomes shorter.
                tensors[name] = file.get_tensor(name).clone()
    except (SafetensorError, OSError) as error:
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
