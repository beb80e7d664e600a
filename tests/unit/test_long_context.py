"""Prompts of a length, and drafters that reach as far as the base."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.long_context import LONGEST, config_of, prompts, stretched, table
from vllm_mtp import demo


def test_prompts_are_different_pieces_of_the_length() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    found = prompts(str(demo.BASE), 600, 3)
    assert len(set(found)) == 3
    for text in found:
        assert abs(len(tokenizer(text)["input_ids"]) - 600) < 12


def test_a_drafter_that_attends_reaches_as_far_as_the_base_and_others_are_left(tmp_path: Path) -> None:
    for name, config in {"eagle": {"max_position_embeddings": 512}, "medusa": {"num_heads": 8}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    assert stretched(tmp_path / "medusa", tmp_path / "copies") == tmp_path / "medusa"
    copy = stretched(tmp_path / "eagle", tmp_path / "copies")
    assert json.loads((copy / "config.json").read_text())["max_position_embeddings"] == LONGEST
    assert json.loads((tmp_path / "eagle/config.json").read_text()) == {"max_position_embeddings": 512}
    method = {"speculative": {"method": "eagle", "model": str(tmp_path / "eagle")}, "search": {"num_speculative_tokens": [1, 2]}}
    config = config_of({"methods": {"EAGLE": method}}, 64, tmp_path / "run")
    assert config.methods["EAGLE"].speculative["model"] == str(tmp_path / "run/drafters/eagle")
    assert len(config.requests(1)) == config.prompts_per_run
    assert not config.methods["EAGLE"].search


def test_the_table_has_a_column_for_each_length() -> None:
    row = {"clients": 1, "method": "n-gram", "tokens_per_forward": 2.0, "ratio": 1.5}
    lines = table([{"prompt_tokens": 1024, **row}, {"prompt_tokens": 64, **row, "ratio": 1.25}]).splitlines()
    assert lines[0] == "| clients | method | 64 tokens | 1024 tokens |"
    assert lines[2] == "| 1 | n-gram | 2.00, 1.25 | 2.00, 1.50 |"
