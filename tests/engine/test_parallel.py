"""Models split over tensor-parallel ranks, servers of several data-parallel ranks, and what is refused. fp32.

Two ranks a machine of two cores, one thread each; they import vLLM anew, which takes most of the time.
"""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.reader import get_metrics_snapshot

from tests.architectures import ARCHITECTURES
from vllm_mtp import demo
from vllm_mtp.plugin import register
from vllm_mtp.selection import ConfigurationError
from vllm_mtp.shaping import SHAPED

from .conftest import CACHE_BYTES, Engine, Engines, speculative
from .feature_models import random_adapter_for, random_model
from .test_failures import failing

Plain = Callable[[int, int], list[list[int]]]
pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def a_core_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own binding of threads wants a NUMA node for each rank. A step that hangs is to fail soon."""
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "60")


def record_drafts(worker: Any) -> None:
    """Keeps the drafts of every step."""
    proposer = worker.model_runner.drafter
    propose, worker.drafts = proposer.propose, []

    def recording(*args: Any, **kwargs: Any) -> list[list[int]]:
        worker.drafts.append(propose(*args, **kwargs))
        return worker.drafts[-1]

    proposer.propose = recording


def disturb_clock(worker: Any) -> None:
    """Makes steps seem ten times as fast or as slow as they are, on each rank in another way; keeps what was chosen."""
    drafter, clock, worker.layouts, worker.shapes = worker.model_runner.drafter, random.Random(worker.rank), [], []
    control, shaper = drafter.control, drafter.shaper
    observe, choose, shapes = control.observe, control.choose, shaper.shapes

    def choosing(num_requests: int, context: float) -> tuple[int, ...]:
        worker.layouts.append(choose(num_requests, context))
        return worker.layouts[-1]

    def shaping(*arguments: Any) -> tuple[tuple[int, ...], ...]:
        worker.shapes.append(shapes(*arguments))
        return worker.shapes[-1]

    control.observe = lambda tokens, rows, seconds, *more: observe(tokens, rows, seconds * clock.uniform(0.1, 10), *more)
    control.choose, shaper.shapes = choosing, shaping


@pytest.mark.feature("tensor parallelism", "works", "on CPUs; not tried on several devices")
def test_two_tensor_parallel_ranks_draft_and_answer_as_one(engines: Engines, prompts: list[str], plain: Plain) -> None:
    def run(engine: Engine) -> tuple[list[list[int]], float, list[list[list[int]]]]:
        engine.on_ranks(record_drafts)
        outputs, per_forward = engine.forwards(lambda: engine.greedy(prompts[:8], 48))
        return outputs, per_forward, engine.on_ranks(lambda worker: worker.drafts)

    expected = plain(8, 48)
    outputs, per_forward, (drafts,) = run(engines(speculative(demo.ADAPTER, 4)))
    engine = engines(speculative(demo.ADAPTER, 4), tensor_parallel_size=2)
    found, found_per_forward, found_drafts = run(engine)
    assert found == outputs == expected
    assert found_drafts == [drafts, drafts]
    assert found_per_forward == per_forward > 1.5
    # Candidates are scored where their rows of the unembedding are; without those, every draft would take a pass over all of it.
    drafters = engine.on_ranks(
        lambda worker: (
            worker.model_runner.drafter.drafter.candidates,
            tuple(worker.model_runner.drafter.drafter.unembedding.weight.shape),
        )
    )
    assert drafters == [(64, (1024, 384))] * 2


def test_ranks_whose_clocks_differ_run_the_same_layouts(engines: Engines, prompts: list[str]) -> None:
    expected = engines().greedy(prompts[:4], 160, ignore_eos=True)
    engine = engines(speculative(demo.ADAPTER, 4, "auto"), tensor_parallel_size=2)
    engine.on_ranks(disturb_clock)
    assert engine.greedy(prompts[:4], 160, ignore_eos=True) == expected
    first, second = engine.on_ranks(lambda worker: (worker.layouts, worker.shapes))
    assert first == second
    assert set(first[0]) == {SHAPED, (0,) * 5}
    assert len(set(first[1])) > 10


def fail_on_the_second_rank(worker: Any) -> None:
    """Its fifth plan raises."""
    if worker.rank == 1:
        planner = worker.model_runner.drafter.planner
        planner.plan, _ = failing(planner.plan, 4)


@pytest.mark.full
def test_a_failure_on_one_rank_ends_the_engine_and_does_not_hang(engines: Engines, prompts: list[str]) -> None:
    engine = engines(speculative(demo.ADAPTER, 4, max_mask_rows=80), tensor_parallel_size=2)  # an engine of its own: it ends
    engine.on_ranks(fail_on_the_second_rank)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"."):
        engine.greedy(prompts[:8], 48)
    assert time.monotonic() - begin < 40  # vLLM's own time limit for a step is 60 s here
    engines.close()


@pytest.mark.feature("data parallelism of dense models", "works", "on CPUs; not tried on several devices")
def test_two_data_parallel_ranks_answer_as_plain_vllm_idle_or_busy(engines: Engines, prompts: list[str], plain: Plain) -> None:
    def verified() -> Counter[str]:
        name = "vllm:spec_decode_num_drafts"
        return Counter({metric.labels["engine"]: int(metric.value) for metric in get_metrics_snapshot() if metric.name == name})

    async def serve() -> None:
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(demo.BASE),
                dtype="float32",
                enforce_eager=True,
                max_num_seqs=16,
                max_model_len=512,
                kv_cache_memory_bytes=CACHE_BYTES,
                data_parallel_size=2,
                distributed_executor_backend="uni",
                speculative_config=speculative(demo.ADAPTER, 4),
            )
        )

        async def greedy(ranks: list[int]) -> list[list[int]]:
            async def answer(i: int, rank: int) -> list[int]:
                params = SamplingParams(temperature=0.0, max_tokens=48)
                outputs = engine.generate(prompts[i], params, f"{i} on {ranks}", data_parallel_rank=rank)
                return list([output async for output in outputs][-1].outputs[0].token_ids)

            return await asyncio.gather(*(answer(i, rank) for i, rank in enumerate(ranks)))

        try:
            assert await greedy([0] * 8) == expected
            one_idle = verified()
            assert one_idle["0"] > one_idle["1"] == 0
            assert await greedy([1] * 7 + [0]) == expected  # one runs on when the other is done
            assert (verified() - one_idle)["1"] > (verified() - one_idle)["0"] > 0
        finally:
            engine.shutdown()

    expected = plain(8, 48)
    engines.close()  # its ranks would share the cores
    asyncio.run(serve())


@pytest.fixture
def experts(tmp_path: Path) -> tuple[Path, Path]:
    """A mixture of experts and an adapter for it."""
    base = random_model(tmp_path / "base", **ARCHITECTURES["qwen3_moe"].config)
    return base, random_adapter_for(base, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pipeline_parallel_size": 2}, r"--pipeline-parallel-size 2: .* one process; use --tensor-parallel-size"),
        (
            {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
            r"--decode-context-parallel-size 2: .* KV cache .*; use 1",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(arguments: dict[str, Any], message: str) -> None:
    register()
    with pytest.raises(ConfigurationError, match=message):
        EngineArgs(model=str(demo.BASE), speculative_config=speculative(demo.ADAPTER, 4), **arguments).create_engine_config()


@pytest.mark.feature("data parallelism of mixtures of experts", "refused")
def test_data_parallel_ranks_of_a_mixture_of_experts_are_refused(experts: tuple[Path, Path]) -> None:
    register()
    base, adapter = experts
    options: dict[str, Any] = {"model": str(base), "speculative_config": speculative(adapter, 4)}
    EngineArgs(**options).create_engine_config()
    with pytest.raises(
        ConfigurationError, match=r"--data-parallel-size 2 for a mixture of experts: .*; use --tensor-parallel-size"
    ):
        EngineArgs(**options, data_parallel_size=2).create_engine_config()


@pytest.mark.full
def test_two_compiled_tensor_parallel_ranks_answer_as_plain_vllm(engines: Engines, prompts: list[str], plain: Plain) -> None:
    expected = plain(8, 48)
    engine = engines(speculative(demo.ADAPTER, 4), tensor_parallel_size=2, enforce_eager=False)
    outputs, per_forward = engine.forwards(lambda: engine.greedy(prompts[:8], 48))
    assert outputs == expected
    assert per_forward > 1.5
