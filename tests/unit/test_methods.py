"""Methods beside each other: who runs when, and what is compared with what."""

from argparse import Namespace
from typing import Any

from benchmarks.methods import PLAIN, measure, methods
from vllm_mtp.outputs import Output
from vllm_mtp.selection import OPTIONS

from .turns import TimedEngine


def test_all_methods_draft_alike_and_ours_with_options_that_there_are() -> None:
    configs = methods("adapter", 3, "linear")
    assert configs[PLAIN] is None
    assert {config["num_speculative_tokens"] for config in configs.values() if config} == {3}
    ours = configs["vllm-mtp"]
    assert ours is not None
    assert set(ours) - {"method", "model", "num_speculative_tokens"} <= set(OPTIONS)


def test_methods_run_in_turns_and_are_compared_with_plain_of_their_round() -> None:
    order: list[str] = []
    seconds = {PLAIN: [9, 2, 4], "n-gram": [9, 1, 1], "vllm-mtp": [9, 2, 1]}
    output = Output([1, 2], [1, 1], ["a", "b"])
    engines: Any = {name: TimedEngine(name, of_engine, order, output) for name, of_engine in seconds.items()}
    found = measure(engines, ["x"], 1, Namespace(rounds=2, max_tokens=2))
    assert order == [PLAIN, "n-gram", "vllm-mtp"] * 3
    assert {name: comparison.ratios for name, comparison in found.items()} == {"n-gram": [2, 4], "vllm-mtp": [1, 4]}
