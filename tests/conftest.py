"""Folders that tests of several modules need."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.folders import write_base, write_small_adapter
from vllm_mtp import compat


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    """A base model's config.json and norm weights: all that an adapter is checked against."""
    return write_base(tmp_path / "base")


@pytest.fixture
def adapter_folder(base_folder: Path) -> Path:
    """An adapter with four mask tokens for `base_folder`."""
    return write_small_adapter(base_folder.parent / "adapter", base_folder)


@pytest.fixture
def unread() -> Iterator[None]:
    """Nothing is known of the installed vLLM, and what becomes known is forgotten."""
    compat._violations.cache_clear()
    yield
    compat._violations.cache_clear()
