"""The acceptance benchmark's own counting: what is novel, what a forward gave, and the adapter without its sampler head."""

from pathlib import Path
from types import SimpleNamespace

from benchmarks.acceptance import table, without_sampler
from benchmarks.confidence import truncating
from vllm_mtp.adapter import read_adapter
from vllm_mtp.confidence import Drafted
from vllm_mtp.outputs import Output, acceptance_by_position, acceptance_length, agreement, common_prefix, figures, novel


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
    assert acceptance_by_position([loop, text]) == [1, 0.75, 0.75, 0.5, 0.25]
    assert acceptance_by_position([Output([1], [1])]) == []
    row = {"k": 4, "layout": "linear", "sampler": True, "drafts": "greedy", "figures": {"temperature 0": found}}
    assert table([row]).splitlines()[-1] == "| 4 | linear | yes | greedy | 3.17 (2) | 2.50 (2) | 4.00 (1) | 2.33 (1) |"


def test_without_sampler_leaves_the_rest_of_the_adapter_as_it_is(adapter_folder: Path, tmp_path: Path) -> None:
    before, after = read_adapter(adapter_folder), read_adapter(without_sampler(adapter_folder, tmp_path / "copy"))
    assert after.sampler is None
    assert after.config == before.config.model_copy(update={"sampler": None})
    assert all(
        (after.lora[name].a == weights.a).all() and (after.lora[name].b == weights.b).all() for name, weights in before.lora.items()
    )


def test_agreement_is_counted_up_to_the_first_difference() -> None:
    greedy = [Output([1, 2, 3, 4], [1, 3], ["", ""]), Output([5, 6], [1, 1], ["", ""])]
    other = [Output([1, 2, 9, 4], [1, 3], ["", ""]), Output([5, 6], [1, 1], ["", ""])]
    assert agreement(greedy, greedy) == {"same_outputs": 1, "tokens_before_the_first_difference": 1}
    assert agreement(other, greedy) == {"same_outputs": 0.5, "tokens_before_the_first_difference": 4 / 6}
    assert common_prefix([1, 2], [1, 2, 3]) == common_prefix([1, 2, 3], [1, 2]) == 2


def test_truncated_drafts_end_at_the_first_below_tau_and_the_rule_ends_with_its_context() -> None:
    class Proposer:
        def __init__(self) -> None:
            kinds = {"a": ([1, 2, 3], [0.9, 0.4, 0.9]), "b": ([4], [0.5]), "c": ([6, 7], [0.1, 1.0])}
            self.given = SimpleNamespace(drafted={request: Drafted(*found, tau=0.5) for request, found in kinds.items()})
            self.runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a", "none", "b", "c"]))

        def propose(self) -> list[list[int]]:
            return [[1, 2, 3], [], [4], [6, 7]]

    proposer = Proposer()
    with truncating(proposer):
        assert proposer.propose() == [[1], [], [4], []]
    assert proposer.propose() == [[1, 2, 3], [], [4], [6, 7]]
