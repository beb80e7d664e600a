"""The acceptance benchmark's own counting: what is novel, what a forward gave, and the adapter without its sampler head."""

from pathlib import Path

from benchmarks.acceptance import acceptance_length, figures, novel, table, without_sampler
from vllm_mtp.adapter import read_adapter
from vllm_mtp.cli.engine import Output


def test_a_novel_beginning_is_cut_inside_the_forward_that_ends_it() -> None:
    output = Output([*range(9), *range(9)], [1, 5, 5, 5, 2], list("abcde"))
    assert novel(output) == Output([*range(9), *range(7)], [1, 5, 5, 5], list("abcd"))
    assert novel(Output([*range(9), *range(6), 99], [1, 5, 5, 5], list("abcd"))).steps == [1, 5, 5, 5]
    assert novel(Output([1] * 12, [3, 3, 3, 3], list("abcd"))).steps == [3, 3, 2]


def test_the_forward_that_ends_the_prompt_counts_in_tokens_per_forward_alone() -> None:
    loop, text = Output([1] * 12, [1, 5, 6], [""] * 3), Output(list(range(7)), [1, 2, 4], [""] * 3)
    found = figures([loop, text])
    assert found["all"]["tokens_per_forward"] == 19 / 6
    assert found["all"]["acceptance_length"] == 17 / 4
    assert found["looping"]["outputs"] == found["not_looping"]["outputs"] == 1
    assert found["not_looping"]["tokens_per_forward"] == 7 / 3
    assert acceptance_length([Output([1], [1], [""])]) is None
    row = {"k": 4, "layout": "linear", "sampler": True, "drafts": "greedy", "figures": {"temperature 0": found}}
    assert table([row]).splitlines()[-1] == "| 4 | linear | yes | greedy | 3.17 (2) | 2.50 (2) | 4.00 (1) | 2.33 (1) |"


def test_without_sampler_leaves_the_rest_of_the_adapter_as_it_is(adapter_folder: Path, tmp_path: Path) -> None:
    before, after = read_adapter(adapter_folder), read_adapter(without_sampler(adapter_folder, tmp_path / "copy"))
    assert after.sampler is None
    assert after.config == before.config.model_copy(update={"sampler": None})
    assert all(
        (after.lora[name].a == weights.a).all() and (after.lora[name].b == weights.b).all() for name, weights in before.lora.items()
    )
