"""The demo's text: the source of Python's standard library, split by a fixed rule.

A file is held out when the SHA-256 of its path (relative to the library, with forward slashes) is 0 modulo 24. The rule needs
no list, so it holds on any machine and any Python version; held-out files are never trained on. Modules only: files
under a test directory are trained on but never held out, because their text repeats itself more than a reader's code would.
"""

import hashlib
import sysconfig
from pathlib import Path

HELD_OUT_MODULUS = 24
MAX_FILE_BYTES = 400_000
LEFT_OUT = ("site-packages/", "encodings/")  # not the library's own; generated code pages, which are tables and not code


def library_root() -> Path:
    """The running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_test(name: str) -> bool:
    """Whether a relative path lies in a test directory of the library."""
    return any(part in ("test", "tests", "idle_test") for part in name.split("/"))


def is_held_out(name: str) -> bool:
    """Whether the fixed rule keeps the file at this relative path out of training."""
    return not is_test(name) and int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_MODULUS == 0


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
