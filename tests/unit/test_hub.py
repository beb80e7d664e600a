"""Adapters and bases by their names on the Hugging Face hub, from a download cache as `hf download` leaves it."""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from vllm_mtp import demo, hub
from vllm_mtp.adapter import AdapterError, read_adapter, read_config, speculators_format, validate_folder
from vllm_mtp.cli.main import app
from vllm_mtp.selection import asked_for

from .test_train_run import run_config

Publish = Callable[..., None]


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """(name, folder, revision) puts a folder's files where a download of that repository would lie; there is no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(name: str, folder: Path, revision: str = "main") -> None:
        commit = f"{len(revision):040x}"
        repository = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
        for each in (snapshot, blobs, repository / "refs"):
            each.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        for file in folder.iterdir():
            blob = blobs / f"{revision}-{file.name}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(blob)

    return put


def engine_args(**speculative: object) -> Namespace:
    return Namespace(speculative_config=speculative, spec_method=None, spec_model=None, spec_tokens=None, model="org/base")


def test_a_name_is_what_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "here").touch()
    assert hub.is_name("org/name")
    assert hub.is_name("org/name@v1.0")
    for path in ("org/here", "name", "/org/name", "./org/name", "a/b/c", "org/name/", "org/na me", "org/" + "x" * 300, "org/name@"):
        assert not hub.is_name(path), path
    assert hub.local("a/b/c") == Path("a/b/c")


def test_an_adapter_is_found_by_name_and_revision(publish: Publish, tmp_path: Path) -> None:
    other = shutil.copytree(demo.ADAPTER, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "training": {"of": "another time"}}))
    publish("org/adapter", demo.ADAPTER)
    publish("org/adapter", other, "v2")
    folder = hub.local("org/adapter")
    assert validate_folder(folder, demo.BASE) == read_config(demo.ADAPTER)
    assert len(read_adapter(folder).lora) == len(read_adapter(demo.ADAPTER).lora)
    assert read_config(hub.local("org/adapter@v2")).training == {"of": "another time"}


def test_the_servers_json_takes_a_name(publish: Publish) -> None:
    publish("org/adapter", demo.ADAPTER)
    publish("org/adapter", demo.ADAPTER, "v2")
    publish("org/model", demo.BASE)
    asked = asked_for(engine_args(method="mtp", model="org/adapter", num_speculative_tokens=4))
    assert asked == {"method": "mtp", "model": str(hub.local("org/adapter")), "num_speculative_tokens": 4}
    asked = asked_for(engine_args(method="mtp", model="org/adapter", revision="v2"))
    assert asked == {"method": "mtp", "model": str(hub.local("org/adapter@v2"))}
    # What is none of ours is vLLM's, with everything that was said of it.
    for model in ("org/model", "org/nothing", "org/base"):
        assert asked_for(engine_args(method="mtp", model=model, revision="v2")) is None


def test_what_cannot_be_had_is_named_with_a_remedy(publish: Publish) -> None:
    with pytest.raises(AdapterError, match=r"org/nothing is no folder here and cannot be had .*hf download org/nothing"):
        hub.local("org/nothing")
    found = CliRunner().invoke(app, ["inspect", "org/nothing"])
    assert found.exit_code == 1
    assert "hf download org/nothing" in " ".join(found.output.split())


def test_pickled_weights_and_code_are_not_asked_for(publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **options: asked.append(options) or ".")
    hub.local("org/adapter")
    (patterns,) = [options["allow_patterns"] for options in asked]
    assert not {"*", "*.bin", "*.pt", "*.py"} & set(patterns)  # type: ignore[call-overload]


def test_commands_take_names(publish: Publish) -> None:
    publish("org/adapter", demo.ADAPTER)
    publish("org/base", demo.BASE)
    found = CliRunner().invoke(app, ["inspect", "org/adapter", "--base", "org/base"])
    assert found.exit_code == 0, found.output


def test_an_adapter_names_the_base_by_its_name_on_the_hub(publish: Publish, tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=1)
    publish("org/base", config.base)
    given = config.model_dump(mode="json", exclude={"base", "base_name"})
    (tmp_path / "run.yaml").write_text(json.dumps(given))
    found = CliRunner().invoke(app, ["train", "--base", "org/base", "--config", str(tmp_path / "run.yaml")])
    assert found.exit_code == 0, found.output
    trained = read_config(config.output / "adapter")
    assert trained.base.name_or_path == "org/base"
    assert speculators_format(trained)["speculators_config"]["verifier"]["name_or_path"] == "org/base"
