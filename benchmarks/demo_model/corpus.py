"""The demo's text in three domains, each split by a fixed rule: the source of Python's standard library, its prose, and arithmetic.

A file is held out when the SHA-256 of its path (relative to the library, with forward slashes) is 0 modulo 24. The rule needs
no list, so it holds on any machine and any Python version; held-out files are never trained on. Modules only: files
under a test directory are trained on but never held out, because their text repeats itself more than a reader's code would.

Prose is the docstrings of those files, and the topics of the language reference that `help()` knows, split by the same rule.
Arithmetic problems are made (`arithmetic.py`).
"""

import ast
import hashlib
import itertools
import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

from benchmarks.demo_model import arithmetic

HELD_OUT_MODULUS = 24
MAX_FILE_BYTES = 400_000
MIN_DOCSTRING_CHARACTERS = 80
DOMAINS = ("code", "prose", "arithmetic")
LEFT_OUT = ("site-packages/", "encodings/")  # not the library's own; generated code pages, which are tables and not code


def library_root() -> Path:
    """The running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_test(name: str) -> bool:
    """Whether a relative path lies in a test directory of the library."""
    return any(part in ("test", "tests", "idle_test") for part in name.split("/"))


def is_held_out(name: str) -> bool:
    """Whether the fixed rule keeps the file at this relative path out of training."""
    return not is_test(name) and _is_chosen(name)


def _is_chosen(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_MODULUS == 0


def library_files(root: Path | None = None) -> dict[str, str]:
    """Relative path -> text of every readable module of the library, third-party packages left out."""
    root = root or library_root()
    files = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(LEFT_OUT) or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            files[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return files


def split(files: dict[str, str] | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """(train, held_out), each relative path -> text."""
    files = library_files() if files is None else files
    train = {name: text for name, text in files.items() if not is_held_out(name)}
    return train, {name: text for name, text in files.items() if is_held_out(name)}


def repeated(files: Iterable[str]) -> list[str]:
    """Relative paths as often as they are trained on: modules twice, tests once."""
    return [name for name in files for _ in range(1 if is_test(name) else 2)]


def docstrings(source: str) -> str:
    """The longer docstrings of a module, a blank line between them; none where it cannot be parsed."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if len(text) >= MIN_DOCSTRING_CHARACTERS)


def prose_split() -> tuple[dict[str, str], dict[str, str]]:
    """(train, held_out), each name -> text: the docstrings of a module, or a topic of the language reference."""
    sides = []
    for chosen, files in zip((False, True), split(), strict=True):
        side = {name: docstrings(text) for name, text in files.items() if not is_test(name)}
        side |= {f"topic {name}": text for name, text in topics.items() if _is_chosen(name) == chosen}
        sides.append({name: text for name, text in side.items() if text})
    return sides[0], sides[1]


def documents(domain: str, held_out: bool, wanted: int, seed: int = 0) -> list[str]:
    """A domain's documents in a shuffled order, `wanted` characters or a little more.

    Modules come twice as often as tests; where there are too few, they come again.
    """
    if domain == "arithmetic":
        source = (made.prompt + made.solution for made in arithmetic.problems(held_out, seed))
    else:
        files = (split() if domain == "code" else prose_split())[held_out]
        names = repeated(files)
        random.Random(seed).shuffle(names)
        source = (files[name] for name in itertools.cycle(names))
    taken, size = [], 0
    while size < wanted:
        taken.append(next(source))
        size += len(taken[-1])
    return taken
