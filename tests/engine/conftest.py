"""Real vLLM engines in the test's own process, so that a test can look inside; one lives at a time and is kept while it is
asked for again."""

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import pytest
import torch
from vllm import LLM, SamplingParams, envs

from vllm_mtp import breaker, demo
from vllm_mtp.adapter import LoRAWeights, base_facts, linear_shapes, write_adapter
from vllm_mtp.config import AdapterConfig
from vllm_mtp.sampler_head import SamplerHead

CACHE_BYTES = 512 << 20
Outputs = TypeVar("Outputs")


class Engine:
    """A vLLM engine and, where the plugin is on, the parts of it that tests look at."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    @property
    def runner(self) -> Any:
        """vLLM's model runner."""
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner

    @property
    def proposer(self) -> Any:
        """Our proposer."""
        return self.runner.drafter

    def on_ranks(self, function: Callable[[Any], Any]) -> list[Any]:
        """What `function` returns of each tensor-parallel rank's worker; it runs in the worker's process."""
        return self.llm.collective_rpc(function)

    def greedy(self, prompts: list[Any], max_tokens: int, *, at_once: int | None = None, **sampling: Any) -> list[list[int]]:
        """Greedy tokens of each prompt (text, or a dictionary with `prompt_token_ids`); `at_once` = 1 runs them one after
        the other."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, **sampling)
        batches = [prompts] if at_once is None else [prompts[i : i + at_once] for i in range(0, len(prompts), at_once)]
        outputs = [output for batch in batches for output in self.llm.generate(batch, params, use_tqdm=False)]
        return [list(output.outputs[0].token_ids) for output in outputs]

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, as the engine sees them."""
        return list(self.llm.get_tokenizer().encode(prompt))

    def metric(self, name: str) -> float:
        """A counter of vLLM's metrics."""
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)

    def forwards(self, work: Callable[[], Outputs]) -> tuple[Outputs, float]:
        """What `work` returned, and its output tokens for each forward of a request: 1 + accepted drafts per verification."""
        before = {name: self.metric(name) for name in ("vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_drafts")}
        outputs = work()
        accepted, drafts = (self.metric(name) - before[name] for name in before)
        return outputs, 1 + accepted / max(1.0, drafts)


def speculative(adapter: Path | str, k: int, layout: Any = "quadratic", **options: Any) -> dict[str, Any]:
    """The JSON that an operator pastes."""
    return {"method": "mtp", "model": str(adapter), "num_speculative_tokens": k, "layout": layout, **options}


class Engines:
    """Starts engines; the last one is kept, so tests that ask for the same one in a row share it."""

    def __init__(self) -> None:
        self.key = ""
        self.engine: Engine | None = None

    def __call__(self, speculative_config: dict[str, Any] | None = None, **overrides: Any) -> Engine:
        arguments: dict[str, Any] = {
            "model": str(demo.BASE),
            "dtype": "float32",
            "enforce_eager": True,
            "max_num_seqs": 16,
            "max_model_len": 512,
            "kv_cache_memory_bytes": CACHE_BYTES,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "speculative_config": speculative_config,
            **overrides,
        }
        key = json.dumps(arguments, sort_keys=True)
        if key != self.key or self.engine is None:
            self.close()
            self.engine, self.key = Engine(LLM(**arguments)), key
        return self.engine

    def close(self) -> None:
        """Ends the engine, if there is one. Its teardown takes down the process's distributed groups, so it must come before
        the next start."""
        if self.engine is not None:
            # Before 0.31 an engine in this process that is merely let go keeps its cache for ever: vLLM has frozen its objects.
            self.engine.llm.llm_engine.engine_core.shutdown()
            del self.engine.llm
        self.engine, self.key = None, ""
        gc.collect()
        envs.disable_envs_cache()  # the next engine reads the environment anew, whether this one's teardown has run or not


@pytest.fixture(autouse=True)
def nothing_fails() -> Iterator[None]:
    """Speculation goes on to the end of every test: outputs would be plain vLLM's without it too."""
    before = breaker.failures.copy()
    yield
    assert breaker.failures == before


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """Starts engines on the demo model in fp32, eager unless asked otherwise."""
    engines = Engines()
    yield engines
    engines.close()


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """The demo's held-out prompts."""
    return demo.prompts()


@pytest.fixture(scope="session")
def random_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of random weights for the demo base: strong enough to change everything that it is let at."""
    generator = torch.Generator().manual_seed(0)
    shapes = linear_shapes(demo.BASE)
    assert shapes is not None
    facts = base_facts(demo.BASE)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    lora = {name: LoRAWeights(normal(8, d_in), normal(d_out, 8), 1.0) for name, (d_out, d_in) in shapes.items()}
    folder = tmp_path_factory.mktemp("random") / "adapter"
    config = AdapterConfig(num_mask_tokens=8, base=facts)
    write_adapter(folder, config, lora, normal(8, facts.hidden_size), SamplerHead(facts.hidden_size))
    return folder


@pytest.fixture(scope="session")
def plain(engines: Engines, prompts: list[str]) -> Callable[[int, int], list[list[int]]]:
    """(number of prompts, tokens) -> what plain vLLM gives, all requests at once; end of text stops."""
    known: dict[tuple[int, int], list[list[int]]] = {}

    def outputs(count: int, max_tokens: int) -> list[list[int]]:
        if (count, max_tokens) not in known:
            known[count, max_tokens] = engines().greedy(prompts[:count], max_tokens)
        return known[count, max_tokens]

    return outputs
