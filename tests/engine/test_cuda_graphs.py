"""On a GPU, with vLLM's CUDA graphs: the tokens of plain vLLM, and every decode step a replay. Has not run on a GPU yet."""

from typing import Any

import pytest
import torch

from vllm_mtp import demo

from .conftest import Engines, speculative

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
# fp32, because equality is exact there only; of vLLM's backends for GPUs this one computes in fp32.
OPTIONS: dict[str, Any] = {"enforce_eager": False, "max_num_seqs": 32, "attention_backend": "TRITON_ATTN"}


@pytest.mark.parametrize("k", [4, 8])
def test_greedy_with_graphs(engines: Engines, prompts: list[str], k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engines(**OPTIONS).greedy(prompts[:64], 128)
    engine = engines(speculative(demo.ADAPTER, k, "quadratic", max_mask_rows=4096), **OPTIONS)
    manager, decodes = engine.runner.cudagraph_manager, []
    dispatch = manager.dispatch

    def dispatched(num_reqs: int, num_tokens: int, uniform: int | None, *args: Any, **kwargs: Any) -> Any:
        description = dispatch(num_reqs, num_tokens, uniform, *args, **kwargs)
        if uniform == k + 1:
            decodes.append(description.cg_mode.name)
        return description

    monkeypatch.setattr(manager, "dispatch", dispatched)
    for at_once in (1, 3, 8, 32):
        assert engine.greedy(prompts[:64], 128, at_once=at_once) == expected
    assert set(decodes) == {"FULL"}


def test_a_step_waits_for_nothing(engines: Engines, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA itself raises on every synchronisation while a step is planned and drafted."""
    engine = engines(speculative(demo.ADAPTER, 4, "quadratic"), **OPTIONS)
    speculator = engine.runner.speculator
    engine.greedy(prompts[:4], 16)  # what happens once per shape has happened

    def watched(work: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return work(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    monkeypatch.setattr(speculator.planner, "plan", watched(speculator.planner.plan))
    monkeypatch.setattr(speculator, "propose", watched(speculator.propose))
    engine.greedy(prompts[:4], 64)
