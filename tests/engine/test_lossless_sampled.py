"""Sampled output has plain vLLM's distribution: two-sample tests of token counts, 2,000 samples a prompt.

At each position after the first (which is not drafted) the counts of the tokens sampled by two engines are compared by Pearson's
chi-square test; tokens seen fewer than ten times together share one cell. Plain against plain with another seed is the floor.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from vllm_mtp import demo

from .conftest import Engine, Engines, speculative

pytestmark = pytest.mark.engine
SAMPLES, TOKENS, NUM_PROMPTS = 2000, 4, 3
Counts = list[Counter[int]]


def sample(engine: Engine, prompt: str, seed: int, temperature: float = 1.0, top_p: float = 0.9) -> Counts:
    """Counts of the tokens at each position over `SAMPLES` continuations of `prompt`."""
    torch.manual_seed(seed)  # requests without a seed of their own draw from the global generator
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=TOKENS, ignore_eos=True, n=SAMPLES)
    completions = engine.llm.generate([prompt], params, use_tqdm=False)[0].outputs
    return [Counter(completion.token_ids[i] for completion in completions) for i in range(TOKENS)]


def p_value(a: Counter[int], b: Counter[int]) -> float:
    """Probability of counts at least this different if both were drawn from one distribution."""
    common = [token for token in a | b if a[token] + b[token] >= 10]
    rest = [sum(counts[token] for token in a | b if a[token] + b[token] < 10) for counts in (a, b)]
    cells = [[a[token], b[token]] for token in common] + ([rest] if sum(rest) else [])
    table = torch.tensor(cells, dtype=torch.float64)
    if len(table) < 2:
        return 1.0
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(table) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2))


def smallest(a: list[Counts], b: list[Counts]) -> float:
    """The smallest p-value over prompts and drafted positions, times their number (Bonferroni)."""
    values = [p_value(x[i], y[i]) for x, y in zip(a, b, strict=True) for i in range(1, TOKENS)]
    return min(1.0, min(values) * len(values))


# What is quick on this processor: plain vLLM's product in bfloat16 is slow where there is no instruction for it. A prompt is
# computed once for all its samples.
DTYPE = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
OPTIONS: dict[str, Any] = {"max_num_seqs": 64, "dtype": DTYPE, "enable_prefix_caching": True, "block_size": 32}


@pytest.fixture(scope="module")
def plain(engines: Engines, prompts: list[str]) -> dict[str, list[Counts]]:
    """What plain vLLM samples: `plain`, `floor` with another seed, `cooler` at a slightly lower temperature."""
    kinds = {"plain": (1, 1.0), "floor": (2, 1.0), "cooler": (3, 0.8)}
    engine = engines(**OPTIONS)
    return {kind: [sample(engine, prompt, *how) for prompt in prompts[1 : 1 + NUM_PROMPTS]] for kind, how in kinds.items()}


@pytest.mark.feature("`temperature`, `top_p`", "works", "plain vLLM's distribution")
@pytest.mark.parametrize("drafts", ["greedy", "probabilistic"])
def test_sampled_tokens_have_plains_distribution(
    engines: Engines, prompts: list[str], plain: dict[str, list[Counts]], drafts: str
) -> None:
    engine = engines(speculative(demo.ADAPTER, 2, draft_sample_method=drafts), **OPTIONS)
    before = engine.metric("vllm:spec_decode_num_accepted_tokens")
    ours = [sample(engine, prompt, 4) for prompt in prompts[1 : 1 + NUM_PROMPTS]]
    assert engine.metric("vllm:spec_decode_num_accepted_tokens") - before > SAMPLES / 10
    values = {
        name: smallest(plain["plain"], other) for name, other in {**plain, "ours": ours}.items() if other is not plain["plain"]
    }
    for name, value in values.items():
        print(f"p({name} = plain) = {value:.3g}")
    assert values["floor"] > 1e-3
    assert values["ours"] > 1e-3
    assert values["cooler"] < 1e-6  # the test would see a difference as small as this
