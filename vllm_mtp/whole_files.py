"""Files and folders that are there whole or not at all, also when the disk is full or the process is killed."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; what was written takes the place of `path` at the end of the block.

    Raises:
        OSError: it cannot be written. Nothing is left behind, and what stood at `path` still does.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written: {reason(error)}") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write files to; it takes the place of `folder` at the end of the block.

    Raises:
        OSError: it cannot be written. Nothing is left behind, and what stood at `folder` still does.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        os.umask(umask := os.umask(0))
        temporary.chmod(0o777 & ~umask)  # mkdtemp and safetensors make theirs private to the user
        for path in temporary.iterdir():
            path.chmod(0o666 & ~umask)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            folder.rename(old / folder.name)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(f"{folder} could not be written: {reason(error)}") from error
        raise


def reason(error: OSError | SafetensorError) -> str:
    """What went wrong while something was written, without its path."""
    return getattr(error, "strerror", None) or str(error)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def below_here(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures as JSON has them, with paths below this folder as they are in it: they are for other machines too."""
    found: dict[str, Any] = json.loads(json.dumps(figures).replace(f'"{Path.cwd()}/', '"'))
    return found


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    """Writes what was measured as JSON, `below_here`."""
    write_whole(path, json.dumps(below_here(figures), indent=1) + "\n")
