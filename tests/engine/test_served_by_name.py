"""An adapter that is served as if it were the model: vLLM takes base and method from its config.json."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_mtp import demo
from vllm_mtp.adapter import read_config, speculators_format

from .conftest import Engines

pytestmark = pytest.mark.engine


def adapter_of(base: str, folder: Path) -> Path:
    """The demo's adapter, naming its base so."""
    shutil.copytree(demo.ADAPTER, folder)
    config = read_config(folder)
    config = config.model_copy(update={"base": config.base.model_copy(update={"name_or_path": base})})
    (folder / "config.json").write_text(json.dumps({**json.loads(config.model_dump_json()), **speculators_format(config)}))
    return folder


def test_the_base_is_served_with_the_adapter(
    engines: Engines, prompts: list[str], plain: Callable[[int, int], list[list[int]]], tmp_path: Path
) -> None:
    expected = plain(4, 32)
    adapter = adapter_of(str(demo.BASE), tmp_path / "adapter")
    engine = engines(model=str(adapter))
    options = engine.proposer.options
    assert (options.adapter, options.num_speculative_tokens, options.layout) == (str(adapter), 8, "auto")
    found, per_forward = engine.forwards(lambda: engine.greedy(prompts[:4], 32))
    assert found == expected
    assert per_forward > 1.4


def test_the_operators_options_count(engines: Engines, tmp_path: Path) -> None:
    adapter = adapter_of(str(demo.BASE), tmp_path / "adapter")
    engine = engines({"num_speculative_tokens": 2, "layout": "quadratic"}, model=str(adapter))
    options = engine.proposer.options
    assert (options.num_speculative_tokens, options.layout) == (2, "quadratic")
