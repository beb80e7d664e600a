"""A file is there whole, or what stood in its place still is."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_mtp.whole_files import whole, write_whole


def test_a_written_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    for text in ("one", "two"):
        write_whole(file, text)
        assert file.read_text() == text
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    file.write_text("old")

    def write() -> None:
        with whole(file) as part:
            part.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"figures\.json could not be written: No space left on device"):
        write()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_safetensors_own_error_is_one_of_the_system(tmp_path: Path) -> None:
    file = tmp_path / "no such folder" / "a.safetensors"
    with pytest.raises(OSError, match="could not be written"), whole(file) as part:
        save_file({"a": torch.ones(1)}, part)
