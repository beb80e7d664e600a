"""What an operator's options become for vLLM's two runners, without an engine."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import envs, triton_utils
from vllm.config import VllmConfig

from vllm_mtp import demo
from vllm_mtp.adapter import read_config
from vllm_mtp.config import ServingOptions
from vllm_mtp.foreign import longest_group
from vllm_mtp.load import drafts_by_batch_size, fitting_layouts
from vllm_mtp.roofline import Roofline
from vllm_mtp.safe_files import AdapterError
from vllm_mtp.selection import LOOKED_UP, ConfigurationError, _check_servable, asked_for, resolve, runs_on_v2, scheduled_rows
from vllm_mtp.v2_config import MaskTokenSpeculativeConfig

ATTENTION_ONLY = {"is_hybrid": False, "is_attention_free": False}


def options(**chosen: Any) -> ServingOptions:
    return ServingOptions(adapter=str(demo.ADAPTER), num_speculative_tokens=4, **chosen)


def check(chosen: ServingOptions) -> None:
    model = SimpleNamespace(is_multimodal_model=False, is_moe=False, model="m", hf_text_config=None, **ATTENTION_ONLY)
    _check_servable(chosen, SimpleNamespace(num_mask_tokens=4), model, SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model_type", "facts"),
    [
        ("mamba", {"is_attention_free": True}),
        ("jamba", {"is_hybrid": True}),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}),
        ("llama4_text", {"layer_types": ["chunked_attention", "full_attention"]}),
    ],
)
def test_models_that_keep_a_state_are_refused(model_type: str, facts: dict[str, Any]) -> None:
    text = SimpleNamespace(model_type=model_type, layer_types=facts.get("layer_types"))
    flags = {**ATTENTION_ONLY, **{key: value for key, value in facts.items() if key in ATTENTION_ONLY}}
    model = SimpleNamespace(is_multimodal_model=False, is_moe=False, model="m", hf_text_config=text, **flags)
    with pytest.raises(ConfigurationError, match=rf"does not support {model_type} models.* take a base model whose layers are"):
        _check_servable(options(), SimpleNamespace(num_mask_tokens=4), model, SimpleNamespace())  # type: ignore[arg-type]
    text.layer_types = ["sliding_attention", "full_attention"]
    model.is_hybrid = model.is_attention_free = False
    _check_servable(options(), SimpleNamespace(num_mask_tokens=4), model, SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["linear", (0, 4, 4, 4, 4), (0,) * 5])
def test_what_could_never_draft_again_is_refused_on_v2(monkeypatch: pytest.MonkeyPatch, layout: Any) -> None:
    # Not the environment itself: a vLLM server that has run in this process has frozen what was read from it.
    monkeypatch.setattr(envs, "VLLM_USE_V2_MODEL_RUNNER", False, raising=False)
    assert not runs_on_v2()
    check(options(layout=layout))
    monkeypatch.setattr(envs, "VLLM_USE_V2_MODEL_RUNNER", True, raising=False)
    assert runs_on_v2()
    with pytest.raises(ConfigurationError, match="use quadratic, auto or a list that begins with a group, or set VLLM_USE_V2"):
        check(options(layout=layout))
    check(options(layout="quadratic"))
    check(options(layout="auto"))


def test_a_vllm_that_chooses_the_runner_by_model_must_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_utils, "HAS_TRITON", True)
    monkeypatch.setattr(envs, "VLLM_USE_V2_MODEL_RUNNER", None, raising=False)
    assert runs_on_v2()
    monkeypatch.setattr(VllmConfig, "_is_default_v2_model_runner_model", lambda self: True, raising=False)  # as vLLM 0.26 has it
    with pytest.raises(ConfigurationError, match=r"set VLLM_USE_V2_MODEL_RUNNER to 1 \(or 0\)"):
        runs_on_v2()
    for chosen in (True, False):
        monkeypatch.setattr(envs, "VLLM_USE_V2_MODEL_RUNNER", chosen, raising=False)
        assert runs_on_v2() is chosen


def test_the_scheduler_asks_for_fewer_drafts_as_the_batch_grows() -> None:
    # A comb of 4 takes 5 + 20 rows a request, one of 2 takes 3 + 6, one of 1 takes 2 + 2.
    free = Roofline(free_rows=1e9)
    assert drafts_by_batch_size(fitting_layouts(4, 100, 100), 40, 100, 100, free) == [
        (1, 4, 4),
        (5, 11, 2),
        (12, 25, 1),
        (26, 40, 0),
    ]
    assert drafts_by_batch_size(fitting_layouts(4, 1000, 24), 6, 1000, 24, free) == [(1, 1, 4), (2, 4, 2), (5, 6, 1)]
    # Where rows are not free, what they cost comes before what there is room for.
    ranges = drafts_by_batch_size(fitting_layouts(8, 8192, 8192), 256, 8192, 8192, Roofline())
    assert [drafts for _, _, drafts in ranges] == [8, 4, 2, 1, 0]
    assert ranges[-1][0] < 100


@pytest.mark.parametrize(
    ("rows", "sequences", "given", "chunked", "expected"),
    [
        (2048, 16, None, None, 2048 - 16 * 20),  # as many as all requests can use
        (2048, 1024, None, None, 1024),  # and no more than half
        (2048, 16, None, False, None),  # a prompt must fit into a step
        (2048, 16, 2000, None, None),  # the operator's own number
        (None, 16, None, None, None),  # settled by vLLM after us
    ],
)
def test_room_for_mask_rows_is_set_aside(
    rows: int | None, sequences: int, given: int | None, chunked: bool | None, expected: int | None
) -> None:
    arguments = SimpleNamespace(
        max_num_batched_tokens=rows, max_num_seqs=sequences, max_num_scheduled_tokens=given, enable_chunked_prefill=chunked
    )
    assert scheduled_rows(options(), arguments) == expected


def engine_arguments(written: Any, **flags: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"speculative_config": written, "spec_method": None, "spec_model": None, "spec_tokens": None, "model": "m", **flags}
    )


def test_what_is_said_twice_is_refused_and_not_chosen_from(adapter_folder: Path) -> None:
    written = {"method": "mtp", "model": str(adapter_folder), "num_speculative_tokens": 3}
    assert asked_for(engine_arguments(written)) == written
    assert asked_for(engine_arguments({"method": "mtp"}, spec_model=str(adapter_folder), spec_tokens=3)) == written
    with pytest.raises(ConfigurationError, match="num_speculative_tokens is given twice"):
        asked_for(engine_arguments(written, spec_tokens=2))
    with pytest.raises(ConfigurationError, match="num_speculative_tokens is given twice"):
        asked_for(engine_arguments({**written, "num-speculative-tokens": 2}))


@pytest.mark.parametrize("written", [[1], "mtp", 5, {1: 2}, {"model": "no/such"}, {"model": 5}, {}, None])
def test_what_is_not_for_us_is_left_to_vllm(written: Any) -> None:
    assert asked_for(engine_arguments(written)) is None


def resolved(adapter: Path, base: Path, asked: dict[str, Any], additional: Any = None) -> ServingOptions:
    text = SimpleNamespace(to_dict=lambda: json.loads((base / "config.json").read_text()))
    model = SimpleNamespace(model="org/base", hf_text_config=text, is_moe=False, is_multimodal_model=False, **ATTENTION_ONLY)
    return resolve({"model": str(adapter), **asked}, additional or {}, model, SimpleNamespace())


def test_more_drafts_than_mask_tokens_are_looked_up(adapter_folder: Path, base_folder: Path) -> None:
    masks = read_config(adapter_folder).num_mask_tokens
    assert masks < LOOKED_UP
    found = resolved(adapter_folder, base_folder, {})
    assert (found.lookup, found.num_speculative_tokens, longest_group(found)) == (True, LOOKED_UP, masks)
    for asked, drafts in (({"lookup": False}, masks), ({"layout": "quadratic"}, masks), ({"num_speculative_tokens": 2}, 2)):
        found = resolved(adapter_folder, base_folder, asked)
        assert (found.num_speculative_tokens, longest_group(found)) == (drafts, drafts)
    more = {"num_speculative_tokens": masks + 1}
    assert longest_group(resolved(adapter_folder, base_folder, more)) == masks
    with pytest.raises(ConfigurationError, match=f"ask for at most {masks}; more drafts than that are looked up"):
        resolved(adapter_folder, base_folder, {**more, "lookup": False})


@pytest.mark.parametrize(
    ("asked", "additional", "message"),
    [
        ({"adapter": "another"}, None, "unknown speculative option 'adapter'"),
        ({"num_speculative_tokens": "4"}, None, "num_speculative_tokens: Input should be a valid integer"),
        ({"num_speculative_tokens": True}, None, "num_speculative_tokens: Input should be a valid integer"),
        ({"candidates": 4.0}, None, "candidates: Input should be a valid integer"),
        ({"layout": [True] * 5}, None, "layout"),
        ({"layout": [4] * 100_000}, None, "layout has 100000 group lengths"),
        ({}, [1], "--additional-config is [1]"),
        ({}, {"mtp": 5}, "mtp in --additional-config is 5"),
        ({}, {"mtp": "auto"}, "mtp in --additional-config is 'auto'"),
        ({}, {"mtp": [["layout", "linear"]]}, "mtp in --additional-config is [['layout', 'linear']]"),
        ({}, {"mtp": False}, "mtp in --additional-config is False"),
        ({}, {"mtp": {"adapter": "another"}}, "another adapter"),
    ],
)
def test_options_of_another_type_or_place_are_refused_in_one_line(
    asked: dict[str, Any], additional: Any, message: str, adapter_folder: Path, base_folder: Path
) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)) as error:
        resolved(adapter_folder, base_folder, asked, additional)
    assert len(str(error.value)) < 1100
    assert str(error.value).isprintable()


def test_a_checkout_in_front_of_the_installed_package_is_named(monkeypatch: pytest.MonkeyPatch, adapter_folder: Path) -> None:
    """There is no folder of kernels in it, and what is installed knows nothing of that."""
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "editable" not in repr(finder)])
    for name in [name for name in sys.modules if name.split(".")[:2] == ["vllm_mtp", "kernels"]]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigurationError, match=r"a checkout that is not installed, .* or with python -P"):
        resolve({"model": str(adapter_folder)}, {}, SimpleNamespace(), SimpleNamespace())


def test_a_base_that_is_no_folder_is_checked_by_its_configuration(adapter_folder: Path, base_folder: Path) -> None:
    assert resolved(adapter_folder, base_folder, {"lookup": False}).num_speculative_tokens == 4
    config = json.loads((base_folder / "config.json").read_text())
    (base_folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 25}))
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\..* has shape .*24.*, expected .*25"):
        resolved(adapter_folder, base_folder, {})


def test_the_configuration_brings_the_hooks_into_the_process_that_it_is_sent_to() -> None:
    config = object.__new__(MaskTokenSpeculativeConfig)
    config.__dict__.update(method="mtp", num_speculative_tokens=4)  # as it lies in a message to a worker
    code = f"""
import pickle
from vllm.v1.worker.gpu import model_runner
before = model_runner.init_speculator
config = pickle.loads({pickle.dumps(config)!r})
assert model_runner.init_speculator.vllm_mtp_original is before
assert model_runner.GPUModelRunner.load_model.vllm_mtp_original
assert not config.use_eagle() and not config.uses_draft_kv_cache()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
