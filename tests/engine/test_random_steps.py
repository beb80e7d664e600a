"""Thousands of steps in which whatever may change does: requests come in bursts, go away, are preempted, and each step's layout is
drawn at random. fp32, greedy requests compared with plain vLLM's, and everything is handed back in the end.

A failure prints the seed; VLLM_MTP_TEST_SEED runs it again, VLLM_MTP_TEST_STEPS as many steps as it says.
"""

import os
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from vllm_mtp import cpu_attention, demo
from vllm_mtp.load import LoadControl
from vllm_mtp.shaping import SHAPED

from .conftest import Engine, Engines, speculative
from .test_failures import leftovers

pytestmark = pytest.mark.engine
K, MAX_TOKENS, BLOCK, MOST_LIVE = 4, 40, 32, 20
SEED = int(os.environ.get("VLLM_MTP_TEST_SEED", "0"))
SERVER: dict[str, Any] = {
    "max_num_seqs": 12,
    "max_model_len": 256,
    "block_size": BLOCK,
    "num_gpu_blocks_override": 24,  # 12 requests of up to seven
    "max_num_batched_tokens": 200,  # less than the combs of 12 requests
    "long_prefill_token_threshold": 48,
}
# By confidence, for it keeps drafts by request between steps; with tau = 2 nothing is taken without a match.
OURS = speculative(demo.ADAPTER, K, "auto", acceptance="confidence", tau=2)
PHASES = (0.05, 0.3, 0.8, 2.0)
"""Requests that come in a step, in the mean; another of them every 50 steps."""


class RandomControl(LoadControl):
    """Any layout, at any step, and groups of the requests' own at any price of a row."""

    def __init__(self, layouts: list[tuple[int, ...]], draw: random.Random) -> None:
        super().__init__(K)
        self.layouts = [SHAPED, *layouts]
        self.draw, self.now, self.switches = draw, layouts[0], 0
        self.chosen: Counter[tuple[int, ...]] = Counter()

    def choose(self, num_requests: int, context: float = 0.0) -> tuple[int, ...]:
        if self.draw.random() < 0.5:
            lengths = self.draw.choice(self.layouts)
            self.switches += lengths != self.now
            self.now, self.price = lengths, self.draw.choice([0.002, 0.03, 0.1, 0.4])
        self.chosen[self.now] += 1
        return self.now

    def observe(self, *_: Any) -> None:
        """Times would change what a seed draws."""


@dataclass
class Live:
    """A request that is under way."""

    prompt: int
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)


class Traffic:
    """Requests that come and go at random, step by step.

    Args:
        engine: serves them.
        prompts: token ids of each.
        expected: plain vLLM's greedy tokens of each.
        draw: decides everything.
    """

    def __init__(self, engine: Engine, prompts: list[list[int]], expected: list[list[int]], draw: random.Random) -> None:
        self.engine, self.prompts, self.expected, self.draw = engine, prompts, expected, draw
        self.live: dict[str, Live] = {}
        self.counts: Counter[str] = Counter()

    def arrive(self) -> None:
        """One request more."""
        draw, name = self.draw, f"random-{self.counts['arrivals']}"
        drafts = {"mtp_drafts": draw.randrange(K + 1)} if draw.random() < 0.2 else None
        temperature = 1.0 if draw.random() < 0.15 else 0.0
        params = SamplingParams(temperature=temperature, max_tokens=draw.randint(1, MAX_TOKENS), extra_args=drafts)
        request = Live(draw.randrange(len(self.prompts)), params)
        self.engine.llm.llm_engine.add_request(name, {"prompt_token_ids": self.prompts[request.prompt]}, params)
        self.live[name] = request
        self.counts["arrivals"] += 1

    def cancel(self) -> None:
        """A request less, wherever it stands."""
        name = self.draw.choice(list(self.live))
        self.engine.llm.llm_engine.abort_request([name])
        self._compare(name, self.live.pop(name), whole=False)
        self.counts["cancellations"] += 1

    def step(self) -> None:
        """One step of the engine."""
        for output in self.engine.llm.llm_engine.step():
            request = self.live[output.request_id]
            request.tokens = list(output.outputs[0].token_ids)
            if output.finished:
                self._compare(output.request_id, self.live.pop(output.request_id), whole=True)
                self.counts["finished"] += 1
        self.counts["steps"] += 1

    def run(self, steps: int) -> None:
        """So many steps, and as many more as it takes until nothing is under way."""
        for number in range(steps):
            if number % 50 == 0:
                rate = self.draw.choice(PHASES)
            while not self.live or (len(self.live) < MOST_LIVE and self.draw.random() < rate / (1 + rate)):
                self.arrive()
            self.step()
            if self.live and self.draw.random() < 0.1:
                self.cancel()
        while self.live:
            self.step()

    def _compare(self, name: str, request: Live, *, whole: bool) -> None:
        """Holds a request's tokens against plain vLLM's."""
        if request.params.temperature:
            return
        expected = self.expected[request.prompt][: request.params.max_tokens if whole else len(request.tokens)]
        assert request.tokens == expected, f"{name}, prompt {request.prompt}, {request.params}"
        self.counts["compared" if whole else "compared up to their cancellation"] += 1


@pytest.fixture
def texts(engines: Engines, prompts: list[str]) -> list[list[int]]:
    """Token ids of prompts of 1 to 160 tokens; some begin alike."""
    ids = engines(**SERVER).encode("\n".join(prompts[:8]))
    draw = random.Random(1)
    return [ids[first : first + draw.randint(1, 160)] for first in (draw.choice([0, 50, 100, 200, 300, 400]) for _ in range(24))]


@pytest.fixture
def in_scratch_blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bool:
    """Whether mask rows are forks with scratch blocks in the cache, as where no kernel of ours reads it in place."""
    if request.param:
        monkeypatch.setattr(cpu_attention, "supports", lambda *_: False)
    return request.param


@pytest.mark.parametrize(
    ("in_scratch_blocks", "prefix_caching", "steps"),
    [
        pytest.param(True, True, 150, id="150"),
        pytest.param(True, True, 5000, id="5000 with forks and prefix caching", marks=pytest.mark.full),
        pytest.param(False, False, 5000, id="5000", marks=pytest.mark.full),
    ],
    indirect=["in_scratch_blocks"],
)
def test_random_steps(
    engines: Engines,
    texts: list[list[int]],
    in_scratch_blocks: bool,
    prefix_caching: bool,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = int(os.environ.get("VLLM_MTP_TEST_STEPS", steps))
    print(f"VLLM_MTP_TEST_SEED={SEED} VLLM_MTP_TEST_STEPS={steps}")
    draw = random.Random(SEED)
    expected = engines(**SERVER).greedy([{"prompt_token_ids": ids} for ids in texts], MAX_TOKENS)
    engine = engines(OURS, **SERVER, enable_prefix_caching=prefix_caching)
    proposer = engine.proposer
    assert bool(proposer.num_scratch_blocks) == in_scratch_blocks
    control = proposer.control = RandomControl(proposer.layouts, draw)
    written = scratch_slots(engine, monkeypatch)
    counters = ("vllm:num_preemptions", "vllm:prefix_cache_hits", "vllm:spec_decode_num_accepted_tokens")
    before = {name: engine.metric(name) for name in counters}

    traffic = Traffic(engine, texts, expected, draw)
    traffic.run(steps)

    moved = {name.removeprefix("vllm:"): int(engine.metric(name) - before[name]) for name in counters}
    print(dict(traffic.counts), moved, f"switches {control.switches}", dict(control.chosen), f"forks {len(written)}")
    assert control.chosen.keys() == set(control.layouts)
    assert (0,) * (K + 1) in control.chosen
    counts = traffic.counts
    assert counts["arrivals"] == counts["finished"] + counts["cancellations"]
    assert min(counts["compared"], counts["cancellations"], control.switches) > 0
    assert min(moved["num_preemptions"], moved["spec_decode_num_accepted_tokens"]) > 0
    assert bool(moved["prefix_cache_hits"]) == prefix_caching

    engine.greedy(["The last one"], 3 * K)  # drafts are made, and those of requests that are gone let go
    assert len(proposer.given.drafted) <= 1
    assert leftovers(engine) == (0, 0)
    assert proposer.attention.step is None
    assert bool(written) == in_scratch_blocks
    first, size = proposer.first_scratch_block, proposer.num_scratch_blocks
    assert all(first * BLOCK <= low and high < (first + size) * BLOCK for low, high in written)
    blocks = engine.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks
    assert first == blocks == SERVER["num_gpu_blocks_override"]


def scratch_slots(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Lowest and highest slot that the forks of each step write; nothing where there are none."""
    attention, seen = engine.proposer.attention, []
    plan = attention.plan

    def recording(*args: Any) -> Any:
        planned = plan(*args)
        if engine.proposer.num_scratch_blocks:
            slots: torch.Tensor = planned.slots[planned.slots >= 0]
            seen.append((int(slots.min()), int(slots.max())))
        return planned

    monkeypatch.setattr(attention, "plan", recording)
    return seen
