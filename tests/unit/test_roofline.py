"""What rows cost by a model's sizes, and which layouts that leaves."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig

from vllm_mtp.load import best_comb, fitting_layouts, rows_of
from vllm_mtp.roofline import FREE_ROWS, WORTH_IT, Roofline, expected_tokens

DENSE = LlamaConfig(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    vocab_size=128256,
)
LAYOUTS = fitting_layouts(8, 8192, 1024)


def test_sizes_are_those_of_the_model() -> None:
    dense, mixture = Roofline.of(DENSE), Roofline.of(MixtralConfig())
    assert dense.experts == 0
    assert dense.head == pytest.approx(128256 * 4096 / 7.5e9, rel=0.01)  # Llama 3 8B less its input embedding
    # Of 46.7 B parameters less the embedding, 32 x 8 x 3 x 4096 x 14336 are in experts, of which a row takes 2 of 8.
    assert mixture.experts == pytest.approx(32 * 8 * 3 * 4096 * 14336 / 46.57e9, rel=0.001)
    assert mixture.chosen == 0.25


def test_rows_are_free_until_they_are_multiplied_longer_than_read() -> None:
    dense = Roofline(free_rows=150)
    assert dense.step(1, drafting=False) == pytest.approx(1)
    assert dense.step(50, drafting=False) < 1.01
    assert dense.step(1500, drafting=False) == pytest.approx(10, rel=0.001)
    assert Roofline(head=0.1).step(1, drafting=True) == pytest.approx(1.1)


def test_the_first_rows_of_a_mixture_are_dear_and_the_later_ones_cheap() -> None:
    mixture = Roofline.of(Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8))
    assert mixture.step(25, drafting=False) > 5 * mixture.step(1, drafting=False)
    assert mixture.step(400, drafting=False) < 1.2 * mixture.step(100, drafting=False)
    none, *_ = LAYOUTS
    assert best_comb(LAYOUTS, 1, 8192, 1024, mixture) == none
    assert max(best_comb(LAYOUTS, 32, 8192, 1024, mixture)) >= 4


@pytest.mark.parametrize("config", [DENSE, MixtralConfig(), Qwen3MoeConfig(), SimpleNamespace()])
def test_no_batch_is_given_what_it_would_lose_by(config: Any) -> None:
    roofline = Roofline.of(config)
    for requests in (1, 2, 7, 16, 64, 256, 1024):
        chosen = best_comb(LAYOUTS, requests, 8192, 1024, roofline)
        if any(chosen):
            gain = roofline.gain(requests, max(chosen), rows_of(chosen))
            assert gain >= WORTH_IT
            assert gain <= expected_tokens(max(chosen))
            assert requests * rows_of(chosen) <= 8192


def test_a_dense_model_drafts_less_as_the_batch_grows() -> None:
    drafts = [max(best_comb(LAYOUTS, requests, 8192, 1024, Roofline.of(DENSE))) for requests in range(1, 257)]
    assert drafts == sorted(drafts, reverse=True)
    assert (drafts[0], drafts[-1]) == (8, 0)


@pytest.mark.parametrize(
    ("quantization", "share"),
    [
        (None, 1),
        ({"quant_method": "gptq", "bits": 4}, 1 / 4),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 1 / 4),
        ({"config_groups": {"0": {"weights": {"num_bits": 4}, "input_activations": None}}}, 1 / 4),
        ({"config_groups": {"0": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}}}, 1),
        ({"quant_method": "fp8"}, 1),
    ],
)
def test_weights_that_are_read_faster_than_they_are_multiplied_leave_fewer_rows(quantization: Any, share: float) -> None:
    assert Roofline.of(SimpleNamespace(quantization_config=quantization)).free_rows == pytest.approx(FREE_ROWS * share)
