"""Decode steps that vLLM replays as CUDA graphs, with the graph played by Python.

There is no CUDA here, but what makes a replay right can be tested without: the graph manager, its captures, its dispatch and its
padding are vLLM's own, and a replay knows of the step only what stands in the tensors that its capture read. `Replay` runs the
captured forward again and gives it nothing else.
"""

from typing import Any

import pytest
from vllm.config import CUDAGraphMode
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from tests.engine.conftest import Engine, Engines, speculative
from vllm_mtp import demo

pytestmark = pytest.mark.engine
K = 4


class Replay:
    """A captured forward, its plan and the metadata that it was captured with."""

    def __init__(self, engine: Engine, forward: Any) -> None:
        self.speculator, self.forward = engine.runner.speculator, forward
        self.captured = self.speculator.planned
        self.count = 0

    def replay(self) -> None:
        self.count += 1
        planned, self.speculator.planned = self.speculator.planned, self.captured
        # A CPU kernel takes its work split from the metadata, made on the host; a GPU's has it in a tensor. Made from the
        # captured tensors, it holds what they hold now.
        self.captured.metadata = self.speculator.attention.prepare(self.captured.sequences)
        try:
            self.forward(CUDAGraphMode.NONE)
        finally:
            self.speculator.planned = planned


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that start now believe in CUDA graphs of decode steps of 1, 2 and 4 requests."""
    check = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: type[CpuPlatform], config: Any) -> None:
        check(cls, config)
        config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        config.compilation_config.cudagraph_capture_sizes = [K + 1, 2 * (K + 1), 4 * (K + 1)]
        config.compilation_config.max_cudagraph_capture_size = 4 * (K + 1)

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))
    monkeypatch.setattr(CpuPlatform, "get_global_graph_pool", lambda self: None)
    support = classmethod(lambda *_: AttentionCGSupport.UNIFORM_BATCH)
    monkeypatch.setattr(CPUAttentionMetadataBuilder, "get_cudagraph_support", support)


def capture(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> CudaGraphManager:
    """Captures as vLLM's runner does, Python forwards in the place of graphs."""

    def captures(manager: CudaGraphManager, create_forward: Any, *_: Any) -> None:
        for description in manager._capture_descs[CUDAGraphMode.FULL]:
            create_forward(description, warmup=True)(CUDAGraphMode.NONE)
            forward = create_forward(description, warmup=False)
            forward(CUDAGraphMode.NONE)
            manager.graphs[description] = Replay(engine, forward)
        manager._graphs_captured = True

    monkeypatch.setattr(CudaGraphManager, "capture", captures)
    runner = engine.runner
    manager = runner.cudagraph_manager
    manager.capture(
        runner.model,
        runner.model_state,
        runner.input_buffers,
        runner.intermediate_tensors,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
    )
    return manager


@pytest.mark.usefixtures("graphs", "asynchronous")
def test_replayed_decode_steps(engines: Engines, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 320}
    with monkeypatch.context() as v1:
        v1.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        engines.close()
        expected = engines(**options).greedy(prompts[:4], 24)
        engines.close()
    engine = engines(speculative(demo.ADAPTER, K), **options)
    manager = capture(engine, monkeypatch)
    dispatch, decodes = manager.dispatch, []

    def dispatched(num_reqs: int, num_tokens: int, uniform: int | None, *args: Any, **kwargs: Any) -> Any:
        description = dispatch(num_reqs, num_tokens, uniform, *args, **kwargs)
        if uniform == K + 1:
            decodes.append((num_reqs, description))
        return description

    monkeypatch.setattr(manager, "dispatch", dispatched)
    outputs, per_forward = engine.forwards(lambda: engine.greedy(prompts[:3], 24))  # three, in a graph of four
    assert outputs == expected[:3]
    assert per_forward > 1.4
    assert engine.greedy(prompts[:4], 24, at_once=1) == expected
    assert {(num_reqs, description.num_reqs) for num_reqs, description in decodes} >= {(3, 4), (1, 1)}
    assert all(description.cg_mode == CUDAGraphMode.FULL for _, description in decodes)
    assert sum(graph.count for graph in manager.graphs.values()) == len(decodes)
    engines.close()
