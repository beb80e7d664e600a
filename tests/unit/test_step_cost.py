"""The cost of a step in the shape of a model that is not at hand."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import step_cost
from vllm_mtp.adapter import read_adapter
from vllm_mtp.bench.config import PLAIN

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}


def test_drafters_have_the_shape_of_the_base(tmp_path: Path) -> None:
    config = step_cost.write_base(tmp_path / "base", SHAPE)
    found = {
        family: step_cost.methods_of(family, tmp_path / "base", config, [2, 4], 8, tmp_path)
        for family in (step_cost.OURS, *step_cost.OTHERS)
    }
    assert list(found["mtp"]) == ["mtp 2", "mtp 4"]
    adapter = read_adapter(found["mtp"]["mtp 4"]["speculative"]["model"])
    assert (adapter.config.num_mask_tokens, adapter.config.base.hidden_size, adapter.config.base.fingerprint) == (4, 128, None)
    for family in step_cost.OTHERS:
        speculative = found[family][f"{family} 2"]["speculative"]
        stated = json.loads((Path(speculative["model"]) / "config.json").read_text())
        assert (speculative["method"], speculative["num_speculative_tokens"]) == (family, 2)
        assert "4096" in json.dumps(stated)
        assert not list(Path(speculative["model"]).glob("*.safetensors"))


def test_acceptance_is_of_a_method_and_a_number_of_drafts(tmp_path: Path) -> None:
    entries = [
        {"drafter": f"runs/{name}", "2": {"tokens_per_forward": value}}
        for name, value in {"mtp/adapter": 2.1, "medusa/medusa": 1.5}.items()
    ]
    (tmp_path / "equal.json").write_text(json.dumps({"prompts": 3, "drafters": entries}))
    length = step_cost.acceptance(tmp_path / "equal.json")
    assert [length("mtp", 2), length("medusa", 2), length("medusa", 4), length("eagle", 2)] == [2.1, 1.5, None, None]


@pytest.mark.engine
@pytest.mark.full
def test_every_method_runs_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output", tmp_path / "run", "--shape", json.dumps(SHAPE), "-k", 2, "--rank", 4, "--clients", 1, 2, "--rounds", 1]
    words += [
        "--max-tokens",
        8,
        "--engine",
        '{"enforce_eager": true}',
        "--results",
        tmp_path / "costs.json",
        "--plot",
        tmp_path / "costs.png",
    ]
    monkeypatch.setattr(sys, "argv", ["step_cost", *map(str, words)])
    step_cost.main()
    rows = json.loads((tmp_path / "costs.json").read_text())["results"]
    methods = [PLAIN, "mtp", PLAIN, "eagle", PLAIN, "medusa"]
    assert [(row["method"], row["clients"]) for row in rows] == [
        (m, n) for i in (0, 2, 4) for n in (1, 2) for m in methods[i : i + 2]
    ]
    assert all(row["ms_a_step"] > 0 for row in rows)
    assert all(row["over_plain"] == 1 for row in rows if row["method"] == PLAIN)
    assert capsys.readouterr().out.count("\n") == 2 + 4
    assert (tmp_path / "costs.png").stat().st_size
