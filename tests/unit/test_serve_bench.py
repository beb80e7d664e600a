"""The benchmark of servers: what its table says of runs."""

from typing import Any

from benchmarks.serve import KEPT, arguments, summary, table
from vllm_mtp.bench.config import PLAIN, BenchConfig


def run(method: str, round_: int, throughput: float, texts: list[str], **more: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys(KEPT, 2.0),
        "pair": "ours",
        "method": method,
        "clients": 4,
        "temperature": 0.0,
        "round": round_,
        "output_throughput": throughput,
        "texts": texts,
        "spec_decode_acceptance_length": None,
        **more,
    }


def test_a_ratio_is_of_one_round_and_the_floor_is_plain_vllm_against_itself() -> None:
    runs = [run(PLAIN, 0, 100, ["a", "b", "c"]), run("ours", 0, 150, ["a", "b", "x"], spec_decode_acceptance_length=2.5)]
    runs += [run(PLAIN, 1, 50, ["a", "y", "c"]), run("ours", 1, 100, ["a", "b", "c"], spec_decode_acceptance_length=2.5)]
    runs += [run(PLAIN, 2, 50, ["a", "y", "z"])]  # its partner is not there yet
    (row,) = summary({"runs": runs})
    assert (row["ratio"], row["ratio_range"]) == (1.75, [1.5, 2.0])
    assert (row["identical"], row["plain_identical"], row["num_prompts"]) == (2, 2, 3)
    assert row["ours"]["spec_decode_acceptance_length"] == 2.5
    assert "spec_decode_acceptance_length" not in row["plain"]
    line = table({"runs": runs}).splitlines()[-1]
    assert line.startswith("| 4 | ours | 125 | 75 | 1.75 (1.50 to 2.00) | 2.0 / 2.0 |")
    assert line.endswith("| 2.50 | 2 of 3 | 2 of 3 |")


def test_options_of_engines_are_flags_of_servers() -> None:
    methods = {"n-gram": {"speculative": {"method": "ngram"}}}
    config = BenchConfig.model_validate({"methods": methods, "engine": {"dtype": "float32", "enforce_eager": True, "a_b": False}})
    assert arguments(config) == ["--max-num-seqs", "32", "--no-enable-prefix-caching", "--dtype", "float32", "--enforce-eager"]
