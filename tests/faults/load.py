"""Requests for servers that something happens to, and the count of what became of them."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

from tests.server import Server
from tests.soak.client import Answer, send
from tests.soak.traffic import Asked
from vllm_mtp import demo

ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "24")
NUM_DRAFTS, TIMEOUT = 4, 180.0
PROMPTS = demo.prompts()


def speculative(adapter: Any = demo.ADAPTER, layout: str = "quadratic") -> dict[str, Any]:
    """What selects the plugin."""
    return {"method": "mtp", "model": str(adapter), "num_speculative_tokens": NUM_DRAFTS, "layout": layout}


def short(count: int) -> list[Asked]:
    """Greedy requests of up to 16 tokens; number i is the same for every count."""
    return [
        Asked(
            "short",
            0,
            {
                "prompt": PROMPTS[i % len(PROMPTS)][-120:],
                "temperature": 0.0,
                "max_tokens": 4 + i % 13,
                "return_token_ids": True,
            },
        )
        for i in range(count)
    ]


def long(count: int, tokens: int = 300) -> list[Asked]:
    """Greedy streams that run for seconds."""
    return [
        Asked(
            "long",
            0,
            {
                "prompt": PROMPTS[i % len(PROMPTS)][-120:],
                "temperature": 0.0,
                "max_tokens": tokens,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
            },
        )
        for i in range(count)
    ]


def leaving(count: int, seed: int = 0) -> list[Asked]:
    """Streams whose clients go away, some before the first token."""
    rng, requests = random.Random(seed), long(count)
    for request in requests:
        request.cancel_after = rng.choice((0, 0, 1, 2, 5, 10, 20))
    return requests


def ask(
    server: Server,
    requests: Sequence[Asked],
    meanwhile: Callable[[], Awaitable[None]] | None = None,
    at_once: int = 1000,
    timeout: float = TIMEOUT,
) -> list[Answer]:
    """Answers to all requests, `at_once` of them at a time, while something else happens; each fails after `timeout` seconds."""

    async def run() -> list[Answer]:
        gate = asyncio.Semaphore(at_once)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:

            async def one(request: Asked) -> Answer:
                async with gate:
                    return await send(session, server.url, request, "faults", timeout)

            tasks = [asyncio.create_task(one(request)) for request in requests]
            if meanwhile is not None:
                await meanwhile()
            return list(await asyncio.gather(*tasks))

    return asyncio.run(run())


def failure(answer: Answer) -> str:
    """What an answer is, for comparing servers: answered, an error that the client sees at once, or silence until it gives up."""
    return answer.outcome if answer.outcome != "failed" else "silence" if "TimeoutError" in answer.detail else "error"


@dataclass
class Outcome:
    """What became of a fault.

    Attributes:
        sent: requests.
        answered: as plain vLLM answers them.
        left: by their client.
        failed: with an error that their client saw, where the documentation says so; without a word, where plain vLLM's fail so.
        lost: none of these: wrong, without an end, or failed without a reason.
        restarts: of the server, or its death where it must live.
        blocks_leaked: KV blocks in use when nothing runs.
        requests_leaked: that the scheduler holds when nothing runs.
        facts: further ones.
        missed: what is not as documented.
    """

    sent: int = 0
    answered: int = 0
    left: int = 0
    failed: int = 0
    lost: int = 0
    restarts: int = 0
    blocks_leaked: int = 0
    requests_leaked: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)

    def take(self, answers: Sequence[Answer], expected: Sequence[Any] | None = None, may_fail: Collection[str] = ()) -> None:
        """Counts answers.

        Args:
            answers: to count.
            expected: choices of each; None: any answer will do.
            may_fail: kinds of failure (`failure`) that are as documented.
        """
        for i, answer in enumerate(answers):
            self.sent += 1
            if answer.outcome == "cancelled":
                self.left += 1
            elif answer.outcome == "answered" and (expected is None or answer.choices == expected[i]):
                self.answered += 1
            elif failure(answer) in may_fail:
                self.failed += 1
            else:
                self.lost += 1
                self.facts.setdefault("lost", []).append(f"{answer.outcome} {answer.detail} {answer.choices}"[:400])

    def look_for_leaks(self, server: Server, seconds: float = 30) -> None:
        """Counts what the server holds, after at most `seconds` in which it becomes idle."""
        self.restarts += not server.healthy()
        if self.restarts:
            return
        info = server.wait_until_idle(seconds)
        self.requests_leaked += int(info["vllm:num_requests_running"] + info["vllm:num_requests_waiting"])
        self.blocks_leaked += round(info["vllm:kv_cache_usage_perc"] * server.num_blocks())

    def check(self, condition: bool, otherwise: str) -> None:
        """Notes what is not as documented."""
        if not condition:
            self.missed.append(otherwise)

    @property
    def as_documented(self) -> bool:
        """Whether nothing was lost, leaked or missed."""
        return not (self.lost or self.restarts or self.blocks_leaked or self.requests_leaked or self.missed)

    def row(self) -> dict[str, Any]:
        """All figures."""
        return {**asdict(self), "as_documented": self.as_documented}
