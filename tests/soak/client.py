"""Sends requests and says what became of each."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.soak.traffic import Asked

TIMEOUT = 600.0


@dataclass
class Answer:
    """What became of a request.

    Attributes:
        outcome: answered, cancelled, refused or failed.
        detail: why it failed.
        choices: (tokens, text, why it ended) of each completion.
    """

    outcome: str
    detail: str = ""
    choices: list[Any] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Output tokens that were received."""
        return sum(len(tokens) for tokens, *_ in self.choices)


async def send(session: aiohttp.ClientSession, url: str, request: Asked, salt: str, timeout: float = TIMEOUT) -> Answer:
    """Sends one request.

    Args:
        salt: requests share cached prefixes with those of the same salt only.
        timeout: seconds after which it has failed.
    """
    try:
        async with asyncio.timeout(timeout):
            return await _send(session, url, request, salt)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError) as error:
        return Answer("failed", f"{type(error).__name__}: {error}")


async def _send(session: aiohttp.ClientSession, url: str, request: Asked, salt: str) -> Answer:
    if request.cancel_after == 0:  # the connection is closed while the server still reads the prompt
        task = asyncio.create_task(_post(session, url, request, salt))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return Answer("cancelled")
    return await _post(session, url, request, salt)


async def _post(session: aiohttp.ClientSession, url: str, request: Asked, salt: str) -> Answer:
    async with session.post(f"{url}/v1/completions", json={**request.body, "cache_salt": salt}) as response:
        if request.kind == "refused":
            text = await response.text()
            as_expected = response.status == 400 and "min_p" in text
            return (
                Answer("refused") if as_expected else Answer("failed", f"expected a refusal, got {response.status}: {text[:300]}")
            )
        if response.status != 200:
            return Answer("failed", f"{response.status}: {(await response.text())[:300]}")
        if request.body.get("stream"):
            return await _stream(response, request)
        answer = await response.json()
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return Answer("answered", "", [[c["token_ids"], c["text"], c["finish_reason"]] for c in choices])


async def _stream(response: aiohttp.ClientResponse, request: Asked) -> Answer:
    tokens: list[int] = []
    text, reason, chunks = "", None, 0
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            if reason is None:
                raise ValueError("the stream ended without a reason")
            return Answer("answered", "", [[tokens, text, reason]])
        chunk: dict[str, Any] = json.loads(line[6:])
        if "error" in chunk:
            return Answer("failed", str(chunk["error"])[:300])
        choice = chunk["choices"][0]
        tokens += choice.get("token_ids") or []
        text += choice["text"]
        reason = choice["finish_reason"] or reason
        chunks += 1
        if request.cancel_after is not None and chunks >= request.cancel_after:
            response.close()
            return Answer("cancelled", "", [[tokens, text, None]])
    raise ValueError("the stream broke off")
