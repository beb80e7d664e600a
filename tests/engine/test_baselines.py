"""Baselines of the benchmarks are none of straw: trained for some minutes they have the properties that their methods are known
for, and vLLM accepts of their drafts what was computed without it."""

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.baselines import train as training
from benchmarks.baselines.drafter import Drafter
from benchmarks.baselines.eagle import Eagle
from benchmarks.baselines.evaluate import decoded, load
from benchmarks.baselines.train import METHODS, Limits, train
from vllm_mtp import demo
from vllm_mtp.outputs import acceptance_length
from vllm_mtp.train.on_policy import continue_prompts

from .conftest import Engines

pytestmark = [pytest.mark.engine, pytest.mark.full]
STEPS, DRAFTS, NEW_TOKENS, NUM_PROMPTS = 200, 3, 64, 8
Text = tuple[list[torch.Tensor], list[int]]


class BlindEagle(Eagle):
    """EAGLE that is trained, and drafts, without the base's features."""

    def features(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        feature, state = super().features(input_ids)
        return torch.zeros_like(feature), state


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(method, steps) -> the folder of a baseline trained on the standard library."""
    library, known = Path(sysconfig.get_paths()["stdlib"]), dict[tuple[str, int], Path]()

    def folder(method: str, steps: int = STEPS) -> Path:
        if (method, steps) not in known:
            size = {"length": 128, "batch_size": 4}
            output = tmp_path_factory.mktemp(method)
            known[method, steps] = train(method, demo.BASE, sorted(library.glob("*.py")), output, Limits(steps), data_options=size)
        return known[method, steps]

    return folder


@pytest.fixture(scope="module")
def texts(engines: Engines, prompts: list[str]) -> Text:
    """Prompts with what the base writes after them, and the prompts' lengths."""
    encoded = [torch.tensor(engines().encode(prompt)) for prompt in prompts[:: len(prompts) // NUM_PROMPTS][:NUM_PROMPTS]]
    base = AutoModelForCausalLM.from_pretrained(demo.BASE, dtype=torch.float32)
    return continue_prompts(base, encoded, NEW_TOKENS, []), [len(prompt) for prompt in encoded]


def length(model: Drafter, texts: Text, k: int = DRAFTS) -> float:
    """Tokens a forward after the prompt's."""
    found = acceptance_length(decoded(model, *texts, k))
    assert found is not None
    return found


@pytest.mark.parametrize("method", sorted(METHODS))
def test_vllm_accepts_what_was_computed_without_it_and_writes_what_it_writes_plainly(
    engines: Engines, trained: Callable[..., Path], texts: Text, method: str
) -> None:
    folder, (ids, lengths) = trained(method), texts
    prompts: list[Any] = [{"prompt_token_ids": text[:n].tolist()} for text, n in zip(ids, lengths, strict=True)]
    plain = engines().greedy(prompts, NEW_TOKENS, ignore_eos=True)
    model = load(folder, demo.BASE)
    engine = engines(model.speculative_config(folder, DRAFTS))
    served, accepted = engine.forwards(lambda: engine.greedy(prompts, NEW_TOKENS, ignore_eos=True))
    assert served == plain
    computed = length(model, ([torch.tensor(p["prompt_token_ids"] + out) for p, out in zip(prompts, plain, strict=True)], lengths))
    print(f"{method}: {accepted:.3f} tokens a forward in vLLM, {computed:.3f} computed")
    # vLLM counts drafts behind the last token that was asked for too.
    assert accepted == pytest.approx(computed, abs=0.03)
    assert accepted > 1.05


def test_eagle_draws_on_the_bases_features(trained: Callable[..., Path], texts: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.METHODS, "blind", BlindEagle)
    monkeypatch.setitem(training.LEARNING_RATES, "blind", training.LEARNING_RATES["eagle"])
    seeing, blind = (length(load(trained(method), demo.BASE), texts) for method in ("eagle", "blind"))
    print(f"with features {seeing:.3f}, without {blind:.3f}")
    assert seeing > blind + 0.1


def test_a_head_of_medusa_is_right_more_often_than_the_next(trained: Callable[..., Path], texts: Text) -> None:
    model = load(trained("medusa"), demo.BASE)
    right, rows = torch.zeros(4), 0
    for text, n in zip(*texts, strict=True):
        drafts = model.drafts(text, n - 1, 4)[: len(text) - n - 5]
        for i in range(4):
            right[i] += (drafts[:, i] == text[n + 1 + i :][: len(drafts)]).sum()
        rows += len(drafts)
    print(f"heads are right {(right / rows).tolist()}")
    assert right[0] > right[1] > right[2] > right[3] > 0


def test_a_draft_model_is_accepted_more_the_longer_it_was_trained(trained: Callable[..., Path], texts: Text) -> None:
    early, late = (length(load(trained("draft", steps), demo.BASE), texts) for steps in (STEPS // 6, STEPS))
    print(f"{early:.3f} after {STEPS // 6} steps, {late:.3f} after {STEPS}")
    assert late > early + 0.1
