"""Decoding of the reference: output never depends on drafts, and forwards are counted as the evaluation counts them."""

import pytest
import torch

from tests.unit.tiny_models import as_adapter, tiny_base, tiny_config, tiny_masked_model
from vllm_mtp.outputs import loops, novel_length
from vllm_mtp.reference import ReferenceModel
from vllm_mtp.train.evaluate import draft_table, emitted
from vllm_mtp.train.model import MaskedModel

VOCABULARY = 6  # few tokens, so that random drafts are accepted now and then
PROMPTS = [[2, 3, 4], [5, 2, 2, 3, 4, 5, 3], [4], [3, 3, 5, 2]]


@pytest.fixture(scope="module")
def model() -> MaskedModel:
    return tiny_masked_model(tiny_config(), tiny_base(VOCABULARY))


@pytest.fixture(scope="module")
def reference(model: MaskedModel) -> ReferenceModel:
    return ReferenceModel(model.base, as_adapter(model))


def test_linear_and_quadratic_output_equal_plain_greedy(reference: ReferenceModel) -> None:
    forwards = {"linear": 0, "quadratic": 0}
    for prompt in PROMPTS:
        plain, ones = reference.decode(prompt, 24, 3, "plain")
        assert ones == [1] * len(plain)
        for layout in ("linear", "quadratic"):
            tokens, counts = reference.decode(prompt, 24, 3, layout)
            assert tokens == plain
            assert sum(counts) == len(plain)
            forwards[layout] += len(counts)
    assert forwards["quadratic"] <= forwards["linear"] < 24 * len(PROMPTS)


def test_plain_decoding_equals_transformers(reference: ReferenceModel) -> None:
    tokens, _ = reference.decode([2, 3, 4], 20, 3, "plain")
    wanted = reference.base.generate(torch.tensor([[2, 3, 4]]), max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 3:]
    assert tokens == wanted.tolist()


def test_decoding_stops_after_the_end_token_in_the_middle_of_accepted_drafts(reference: ReferenceModel) -> None:
    for prompt in PROMPTS:
        plain, _ = reference.decode(prompt, 24, 3, "plain")
        end = plain[5]
        wanted = plain[: plain.index(end) + 1]
        tokens, counts = reference.decode(prompt, 24, 3, "quadratic", end)
        assert tokens == wanted
        assert sum(counts) == len(tokens)


@pytest.mark.parametrize("layout", ["quadratic", "linear"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_evaluation_counts_the_forwards_of_decoding(model: MaskedModel, reference: ReferenceModel, layout: str, k: int) -> None:
    for prompt in PROMPTS:
        tokens, counts = reference.decode(prompt, 24, k, layout)  # type: ignore[arg-type]
        text = prompt + tokens
        drafts = draft_table(model, torch.tensor(text), len(prompt), with_sampler=True)
        assert emitted(drafts, text, len(prompt), k, layout) == counts


def test_drafts_of_a_smaller_k_are_the_first_ones_of_a_larger(reference: ReferenceModel) -> None:
    assert reference.drafts([2, 3, 4, 5], 3)[:2] == reference.drafts([2, 3, 4, 5], 2)


def test_sampler_head_sees_the_token_before(reference: ReferenceModel) -> None:
    # The mask states are the same whatever y_0 is, so without the head the drafts would be too.
    changed = [prompt for prompt in PROMPTS if len({tuple(reference.drafts([*prompt, last], 3)) for last in range(VOCABULARY)}) > 1]
    assert changed


def test_a_k_beyond_the_adapters_mask_tokens_is_refused(reference: ReferenceModel) -> None:
    with pytest.raises(ValueError, match="k is 4; the adapter has 3"):
        reference.mask_states([2, 3], 4)


def test_mask_tokens_without_an_adapter_are_refused() -> None:
    with pytest.raises(ValueError, match="need an adapter"):
        ReferenceModel(tiny_base(VOCABULARY)).drafts([2, 3], 1)


def test_loops_are_eight_tokens_three_times() -> None:
    assert loops([1, 2, 3, 4, 5, 6, 7, 8] * 3)
    assert not loops([1, 2, 3, 4, 5, 6, 7, 8] * 2)
    assert not loops(list(range(40)))


def test_text_is_novel_until_eight_tokens_occur_again() -> None:
    assert novel_length(list(range(20))) == 20
    assert novel_length([99, *range(10), *range(10)]) == 1 + 10 + 7  # the eighth token of the second pass completes a known 8-gram
    assert novel_length([5] * 30) == 8
