"""An exception in code of ours ends speculation and nothing else: requests get plain vLLM's tokens, the log says why, once."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vllm_mtp import breaker, demo, verifier

from .conftest import Engine, Engines, speculative

pytestmark = pytest.mark.engine
NUM_PROMPTS, NUM_TOKENS = 4, 16
DRAFTS = "vllm:spec_decode_num_drafts"


class Log(logging.Handler):
    """Keeps the plugin's errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def log() -> Iterator[Log]:
    handler = Log()
    logging.getLogger("vllm.mtp").addHandler(handler)
    yield handler
    logging.getLogger("vllm.mtp").removeHandler(handler)


@pytest.fixture
def engine(engines: Engines) -> Iterator[Engine]:
    """Speculates; whatever ended that in a test is forgotten after it."""
    engine = engines(speculative(demo.ADAPTER, 4))
    opened, before = engine.proposer.breaker, breaker.failures.copy()
    yield engine
    opened.cause, breaker.failures[:] = None, before


@pytest.fixture(scope="module")
def expected(engines: Engines, prompts: list[str]) -> list[list[int]]:
    """Tokens of an engine that nothing happens to."""
    engine = engines(speculative(demo.ADAPTER, 4))
    tokens, per_forward = engine.forwards(lambda: engine.greedy(prompts[:NUM_PROMPTS], NUM_TOKENS))
    assert per_forward > 1.4
    return tokens


def failing(function: Callable[..., Any], after: int) -> tuple[Callable[..., Any], list[int]]:
    """`function`, but its call number `after` does its work and then raises; and a list that grows with every call."""
    calls: list[int] = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        result = function(*args, **kwargs)
        if len(calls) > after:
            raise RuntimeError("injected")
        return result

    return fails, calls


PARTS: dict[str, tuple[Callable[[Any], Any], str, int]] = {
    "planning a step": (lambda proposer: proposer.planner, "plan", 4),
    "running a forward with mask rows": (lambda proposer: proposer.expansion, "expanded", 4),
    "running a forward with mask rows: a kernel, in the second layer": (lambda proposer: proposer.attention, "kernel", 17),
    "drafting": (lambda proposer: proposer, "draft", 4),
    "verifying drafts": (lambda proposer: verifier, "greedy_tokens", 4),
}


def leftovers(engine: Engine) -> tuple[int, int]:
    """Requests that the runner still knows of beside the last one, and blocks that are not free."""
    engine.greedy(["last"], 1)  # a step tells the runner of the requests that ended before it
    pool = engine.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return len(engine.runner.requests) - 1, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is never handed out


@pytest.mark.parametrize("part", PARTS)
def test_requests_go_on_without_drafts(
    engine: Engine, prompts: list[str], expected: list[list[int]], log: Log, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    owner, name, after = PARTS[part][0](engine.proposer), *PARTS[part][1:]
    fails, calls = failing(getattr(owner, name), after)
    monkeypatch.setattr(owner, name, fails)
    assert engine.greedy(prompts[:NUM_PROMPTS], NUM_TOKENS) == expected
    assert len(calls) == after + 1
    drafts = engine.metric(DRAFTS)
    assert engine.greedy(prompts[:NUM_PROMPTS], NUM_TOKENS) == expected
    assert engine.metric(DRAFTS) == drafts
    (record,) = log.records
    assert f"failed while {part.partition(':')[0]} and is off" in record.getMessage()
    assert record.exc_info is not None
    assert "injected" in str(record.exc_info[1])
    assert leftovers(engine) == (0, 0)


def test_a_step_that_a_kv_connector_has_seen_does_not_run_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.proposer.config, "kv_transfer_config", object())
    with pytest.raises(RuntimeError, match="KV connector"):
        engine.proposer.expansion.rewind()


def test_what_vllm_raises_itself_is_vllms(
    engines: Engines, engine: Engine, prompts: list[str], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure of the base comes again when the step runs without us, and goes where it would go."""
    layer = engine.runner.model.model.layers[2]
    monkeypatch.setattr(layer, "forward", failing(layer.forward, 8)[0])
    with pytest.raises(RuntimeError, match="injected"):
        engine.greedy(prompts[:NUM_PROMPTS], NUM_TOKENS)
    assert len(log.records) == 1
    engines.close()  # it stands in the middle of a step
