"""What stands in the mask rows and in the real rows, against the reference and against plain vLLM. fp32."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_mtp import demo
from vllm_mtp.reference import ReferenceModel

from .conftest import Engine, Engines, speculative

pytestmark = pytest.mark.engine


def record_groups(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], torch.Tensor]]:
    """Collects (prefix ids, states [length, d]) of every group that the engine computes."""
    expansion, runner = engine.proposer.expansion, engine.runner
    forward, seen = expansion.target.forward, []

    def recording(input_ids: torch.Tensor, positions: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = forward(input_ids, positions, *args, **kwargs)
        if expansion.last is None:
            return out
        groups, hidden, batch = expansion.last.groups, expansion.last.hidden, runner.input_batch
        for g in range(groups.num_groups):
            request, row = int(groups.request[g]), int(groups.row[g])
            length = int(positions[row]) + 1
            known = int(batch.num_tokens_no_spec[request])
            ids = batch.token_ids_cpu[request, : min(known, length)].tolist()
            ids += input_ids[row + 1 - (length - len(ids)) : row + 1].tolist()  # drafts are rows of this step only
            seen.append((ids, hidden[groups.start[g] : groups.start[g + 1]].clone()))
        return out

    monkeypatch.setattr(expansion.target, "forward", recording)
    return seen


@pytest.mark.parametrize(
    ("block_size", "layout", "eager"),
    [
        (128, "quadratic", True),
        (32, "quadratic", True),
        (32, "linear", True),
        pytest.param(32, "quadratic", False, marks=pytest.mark.full),
    ],
)
def test_mask_states_equal_the_reference(
    engines: Engines, prompts: list[str], monkeypatch: pytest.MonkeyPatch, block_size: int, layout: str, eager: bool
) -> None:
    k = 4
    reference = ReferenceModel.from_folder(demo.BASE, demo.ADAPTER)
    engine = engines(speculative(demo.ADAPTER, k, layout), block_size=block_size, enforce_eager=eager)
    seen = record_groups(engine, monkeypatch)
    # 16 requests of different lengths in one step, one of them about to fill its first block of 128.
    text = engine.encode("\n".join(prompts[:6]))
    batch: list[Any] = [{"prompt_token_ids": text[i : i + 20 + 13 * i]} for i in range(15)] + [{"prompt_token_ids": text[:119]}]
    engine.greedy(batch, 16)
    lengths = {len(ids) for ids, _ in seen}
    assert len(lengths) > 60
    assert max(lengths) > 128
    crossed = [entry for entry in seen if len(entry[0]) // block_size != (len(entry[0]) + k - 1) // block_size]
    sample = seen[:: max(1, len(seen) // 120)] + crossed[:20]
    assert crossed
    worst = max((reference.mask_states(ids, len(states)) - states).abs().max().item() for ids, states in sample)
    print(f"largest difference of {len(sample)} groups: {worst:.2g}")
    assert worst < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mask_rows_with_a_window(engines: Engines, prompts: list[str], monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """They see the end of their prefix and its first tokens; real rows, which in bfloat16 our kernel serves too, see all."""
    window = 40
    reference = ReferenceModel.from_folder(demo.BASE, demo.ADAPTER, mask_window=window)
    unbounded = ReferenceModel.from_folder(demo.BASE, demo.ADAPTER)
    engine = engines(speculative(demo.ADAPTER, 4, mask_window=window), block_size=32, dtype=dtype)
    seen = record_groups(engine, monkeypatch)
    text = engine.encode("\n".join(prompts[:6]))
    lengths = (20, 38, 64, 70, 150, 256)
    batch: list[Any] = [{"prompt_token_ids": text[:length]} for length in lengths]
    found = engine.greedy(batch, 12)
    sample = seen[:: max(1, len(seen) // 60)]
    tolerance = {"float32": 1e-4, "bfloat16": 0.05}[dtype]

    def error(of: ReferenceModel, ids: list[int], states: torch.Tensor) -> float:
        expected = of.mask_states(ids, len(states))
        return ((expected - states.float()).norm() / expected.norm()).item()

    assert max(error(reference, ids, states) for ids, states in sample) < tolerance
    assert max(error(unbounded, ids, states) for ids, states in sample) > 2 * tolerance
    if dtype == "float32":
        assert found == engines(block_size=32).greedy(batch, 12)


def test_prompt_logits_are_bit_identical_with_the_adapter_loaded(
    engines: Engines, prompts: list[str], random_adapter: Path
) -> None:
    def prompt_logits(engine: Engine) -> list[torch.Tensor]:
        compute, seen, first = engine.runner.model.compute_logits, [], []

        def recording(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(compute(hidden, *args, **kwargs))
            return seen[-1]

        engine.runner.model.compute_logits = recording
        try:
            for prompt in prompts[:20]:
                calls = len(seen)
                engine.greedy([prompt], 12)
                first.append(seen[calls])
        finally:
            engine.runner.model.compute_logits = compute
        return first

    expected = prompt_logits(engines())
    engine = engines(speculative(random_adapter, 8))
    before = engine.proposer.planner.counters.mask_rows
    found = prompt_logits(engine)
    assert engine.proposer.planner.counters.mask_rows - before > 20 * 8  # mask rows stood behind every prompt
    assert all(torch.equal(e, f) for e, f in zip(expected, found, strict=True))


def test_a_second_request_hits_the_prefix_cache_as_in_plain(engines: Engines, prompts: list[str]) -> None:
    def hits(engine: Engine) -> tuple[list[list[int]], list[float]]:
        first = engine.greedy(prompts[:12], 128)
        texts = [engine.llm.get_tokenizer().decode(engine.encode(p) + o) for p, o in zip(prompts[:12], first, strict=True)]
        counts = [engine.metric("vllm:prefix_cache_hits")]
        second = engine.greedy(prompts[:12], 128)
        counts.append(engine.metric("vllm:prefix_cache_hits"))
        third = engine.greedy(texts, 32)
        counts.append(engine.metric("vllm:prefix_cache_hits"))
        assert second == first
        return first + third, [b - a for a, b in pairwise(counts)]

    options = {"enable_prefix_caching": True, "block_size": 32}
    tokens, (same_prompt, with_answer) = hits(engines(**options))
    assert min(same_prompt, with_answer) > 0
    for layout in ("quadratic", "linear"):
        found, counts = hits(engines(speculative(demo.ADAPTER, 4, layout), **options))
        assert found == tokens
        assert counts[0] == same_prompt
        # vLLM enters a block into the cache when the request is next scheduled, so under any speculation the block that a request's
        # very last step fills by accepted drafts is missed: at most one for each of the 12.
        assert with_answer - 12 * 32 <= counts[1] <= with_answer
