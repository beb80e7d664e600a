"""The server on our Triton kernels, as on a GPU: with vLLM's Triton attention backend, its cache and metadata.

vLLM's CPU platform is told to choose that backend, which only GPUs have; the rest is what a GPU would run, under the interpreter.
fp32.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.attention.ops import triton_reshape_and_cache_flash

from tests.architectures import ARCHITECTURES
from tests.engine.conftest import Engine, Engines, speculative
from tests.engine.feature_models import random_adapter_for, random_model
from tests.engine.test_states import record_groups
from tests.engine.v2.test_graphs import K, capture, graphs
from vllm_mtp import demo, gpu_linear, kernel_trial
from vllm_mtp.gpu_attention import GpuCombAttention
from vllm_mtp.mask_attention import ForkedSequences
from vllm_mtp.reference import ReferenceModel

pytestmark = pytest.mark.engine
SMALL: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 160, "block_size": 16}
__all__ = ["graphs"]
LikeAGpu = Callable[..., Engine]
Tiny = Callable[[str], tuple[Path, Path]]


@pytest.fixture
def like_a_gpu(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> Iterator[LikeAGpu]:
    """Starts an engine on vLLM's Triton attention backend; `packed`: its linear layers keep no weight of their own, as quantized
    ones."""

    def start(*arguments: Any, packed: bool = False, **options: Any) -> Engine:
        path = f"{TritonAttentionBackend.__module__}.{TritonAttentionBackend.__name__}"
        monkeypatch.setattr(CpuPlatform, "get_attn_backend_cls", classmethod(lambda *_, **__: path))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        if not packed:
            for name in ("_cpu_skip_gemm_dispatch", "skip_weight_relayout"):  # since 0.31, and in 0.30
                monkeypatch.setattr(LinearBase, name, True, raising=False)
        engines.close()
        return engines(*arguments, **{**SMALL, **options})

    yield start
    engines.close()


@pytest.fixture(scope="module")
def short(prompts: list[str]) -> list[str]:
    return [prompt[-60:] for prompt in prompts[:3]]


@pytest.fixture(scope="module")
def plain(engines: Engines, short: list[str]) -> list[list[int]]:
    """What plain vLLM gives on the attention backend for CPUs."""
    return engines(max_num_seqs=4, max_model_len=160).greedy(short, 12)


def fused(engine: Engine) -> set[bool]:
    """Whether linear layers with a LoRA run in one launch."""
    applied = [module.quant_method.apply.__closure__ for module in engine.runner.model.modules() if isinstance(module, LinearBase)]
    return {any(isinstance(cell.cell_contents, gpu_linear.OneLaunch) for cell in cells) for cells in applied if cells}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A base of random weights and an adapter of random weights, by the name of its architecture."""
    made: dict[str, tuple[Path, Path]] = {}

    def folders(name: str) -> tuple[Path, Path]:
        if name not in made:
            base = random_model(tmp_path_factory.mktemp(name) / "base", **ARCHITECTURES[name].config)
            made[name] = base, random_adapter_for(base, base.with_name("adapter"))
        return made[name]

    return folders


def test_greedy(plain: list[list[int]], short: list[str], like_a_gpu: LikeAGpu) -> None:
    engine = like_a_gpu(speculative(demo.ADAPTER, 2), packed=True)
    speculator = engine.runner.speculator
    assert isinstance(speculator.attention, GpuCombAttention)
    assert speculator.num_scratch_blocks == 0
    assert fused(engine) == {False}
    outputs, per_forward = engine.forwards(lambda: engine.greedy(short, 12))
    assert outputs == plain
    assert per_forward > 1.3


@pytest.mark.parametrize(("name", "mask_window"), [("llama", None), ("gemma2", None), ("qwen2", 32)])
def test_states_and_tokens(
    name: str,
    mask_window: int | None,
    tiny: Tiny,
    short: list[str],
    engines: Engines,
    like_a_gpu: LikeAGpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Grouped heads; windows, a soft cap and a bias. On the V1 runner, whose batch is on the host to be looked at."""
    base, adapter = tiny(name)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    engines.close()
    expected = engines(model=str(base), **SMALL | {"block_size": 32}).greedy(short, 8, ignore_eos=True)
    engine = like_a_gpu(speculative(adapter, 3, mask_window=mask_window), model=str(base))
    assert isinstance(engine.proposer.attention, GpuCombAttention)
    assert fused(engine) == {True}
    seen = record_groups(engine, monkeypatch)
    assert engine.greedy(short, 8, ignore_eos=True) == expected
    reference = ReferenceModel.from_folder(base, adapter, mask_window=mask_window)
    assert max(len(ids) for ids, _ in seen) > 32  # past every window, and in the third block
    assert max((reference.mask_states(ids, len(states)) - states).abs().max().item() for ids, states in seen) < 1e-4


@pytest.mark.usefixtures("graphs")
def test_replayed_decode_steps(tiny: Tiny, short: list[str], like_a_gpu: LikeAGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay finds its groups and blocks where its capture did."""
    base, adapter = tiny("llama")
    expected = like_a_gpu(model=str(base)).greedy(short, 8, ignore_eos=True)
    engine = like_a_gpu(speculative(adapter, K), model=str(base))
    manager = capture(engine, monkeypatch)
    assert engine.greedy(short, 8, ignore_eos=True) == expected  # three, in a graph of four
    assert engine.greedy(short, 8, ignore_eos=True, at_once=1) == expected
    assert sum(graph.count for graph in manager.graphs.values()) > 8


def test_an_eight_bit_cache(tiny: Tiny, short: list[str], like_a_gpu: LikeAGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask rows read what the server's backend wrote."""
    base, adapter = tiny("llama")
    monkeypatch.setattr(triton_reshape_and_cache_flash, "_is_supported_kv_cache_dtype", lambda *_: True)
    expected = like_a_gpu(model=str(base), kv_cache_dtype="fp8").greedy(short, 8, ignore_eos=True)
    engine = like_a_gpu(speculative(adapter, 2), model=str(base), kv_cache_dtype="fp8")
    assert isinstance(engine.runner.speculator.attention, GpuCombAttention)
    assert engine.greedy(short, 8, ignore_eos=True) == expected


def test_without_kernels(tiny: Tiny, short: list[str], like_a_gpu: LikeAGpu) -> None:
    base, adapter = tiny("llama")
    expected = like_a_gpu(model=str(base)).greedy(short[:1], 8, ignore_eos=True)
    engine = like_a_gpu(speculative(adapter, 2, kernels="torch"), model=str(base))
    assert isinstance(engine.runner.speculator.attention, ForkedSequences)
    assert fused(engine) == {False}
    assert engine.greedy(short[:1], 8, ignore_eos=True) == expected


@pytest.mark.parametrize("fault", ["wrong", "no compiler"])
def test_a_kernel_that_fails_its_trial_does_not_run(
    fault: str, tiny: Tiny, like_a_gpu: LikeAGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any, **options: Any) -> torch.Tensor:
        if fault == "wrong":
            return right(*arguments, **options) * 1.1
        raise RuntimeError("no compiler\nof that kind")

    base, adapter = tiny("llama")
    right = kernel_trial.comb_attention_
    monkeypatch.setattr(kernel_trial, "comb_attention_", broken)
    engine = like_a_gpu(speculative(adapter, 2), model=str(base))
    assert isinstance(engine.runner.speculator.attention, ForkedSequences)
    assert fused(engine) == {False}
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING and each.name == "vllm.mtp"]
    assert len(warnings) == 1
    assert "no compiler. " in warnings[0] or "is off by 0.1 of" in warnings[0]
    assert '"kernels": "torch"' in warnings[0]


def test_a_failed_gpu_ends_the_start(tiny: Tiny, like_a_gpu: LikeAGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    base, adapter = tiny("llama")
    monkeypatch.setattr(kernel_trial, "try_linears", broken)
    with pytest.raises(RuntimeError, match=r"illegal memory access.*kernels"):
        like_a_gpu(speculative(adapter, 2), model=str(base))
