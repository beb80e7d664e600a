"""Texts and chats from text files, JSON lines and saved datasets; what cannot be used is counted, with where it stands."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_REPORTED = 5
EXPECTED = 'expected {"messages": [{"role": "...", "content": "..."}, ..]} or {"text": "..."}'
DATASET_FILES = ("state.json", "dataset_dict.json")  # of one split, and of several, as `save_to_disk` writes them

Messages = list[dict[str, Any]]


class DataError(ValueError):
    """Training data that cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Document:
    """A text, or the messages of a chat, and the file and line where it stands."""

    content: str | Messages
    where: str


@dataclass
class BadLines:
    """Lines that are left out: how many, and the first few with the reason. With `strict` the first one is a DataError."""

    strict: bool = False
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        """One more."""
        if self.strict:
            raise DataError(f"{where}: {reason}")
        self.count += 1
        if self.count <= MAX_REPORTED:
            self.first.append(f"{where}: {reason}")

    def report(self, name: str) -> None:
        """Say on standard error what was left out of `name`, if anything was."""
        if self.count:
            more = [f"and {self.count - len(self.first)} more"] if self.count > len(self.first) else []
            print("\n  ".join([f"{name}: left out {self.count} bad lines", *self.first, *more]), file=sys.stderr, flush=True)


def read_documents(paths: Sequence[Path], bad: BadLines) -> list[Document]:
    """All documents of some files and folders.

    A .jsonl file has a chat or a text in each line, any other file is one text. A folder is a dataset saved by `save_to_disk`, or
    else the files in it.

    Raises:
        DataError: a path cannot be read, or no document is left.
    """
    documents: list[Document] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist: give a text file, a .jsonl file, a saved dataset, or a folder of files.")
        if any((path / name).is_file() for name in DATASET_FILES):
            documents += _read_dataset(path, bad)
        elif path.is_dir():
            for file in sorted(f for f in path.rglob("*") if f.is_file()):
                documents += _read_file(file, bad, in_folder=True)
        else:
            documents += _read_file(path, bad, in_folder=False)
    if not documents:
        found = f"; {bad.first[0]}" if bad.first else ""
        raise DataError(f"{', '.join(map(str, paths))} has no text and no chat{found}.")
    return documents


def _read_file(file: Path, bad: BadLines, *, in_folder: bool) -> Iterator[Document]:
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:  # bytes, because JSON may hold characters that also count as ends of lines
            yield from _parsed(file, lines, bad)
        return
    try:
        yield Document(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError:
        if not in_folder:  # a folder of sources has pictures and archives in it
            raise DataError(f"{file} is not UTF-8 text: convert it, or leave it out.") from None


def _parsed(file: Path, lines: Iterable[bytes], bad: BadLines) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.strip())
        except UnicodeDecodeError:
            bad.add(where, "not UTF-8")
        except json.JSONDecodeError as error:
            bad.add(where, f"not JSON: {error.msg}, column {error.colno}")
        else:
            yield from _document(row, where, bad)


def _read_dataset(folder: Path, bad: BadLines) -> Iterator[Document]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError:
        raise DataError(f"{folder} is a saved dataset: pip install datasets.") from None
    dataset = load_from_disk(str(folder))
    if isinstance(dataset, DatasetDict):
        if "train" not in dataset:
            raise DataError(f"{folder} has the splits {', '.join(dataset)} and no train: name the folder of one of them.")
        dataset = dataset["train"]
    for number, row in enumerate(dataset, 1):
        yield from _document(row, f"{folder}, row {number}", bad)


def _document(row: object, where: str, bad: BadLines) -> Iterator[Document]:
    match row:
        case {"messages": [_, *_] as messages} if all(map(_is_message, messages)):
            if any(message["role"] == "assistant" for message in messages[1:]):
                yield Document(messages, where)
            else:
                bad.add(where, "no assistant answers anything")
        case {"text": str(text)}:
            yield Document(text, where)
        case _:
            bad.add(where, EXPECTED)


def _is_message(message: object) -> bool:
    """Content may be missing where an assistant calls a tool."""
    match message:
        case {"role": str(), "content": str()} | {"role": str(), "tool_calls": [_, *_]}:
            return True
    return False
