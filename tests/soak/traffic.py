"""A fixed cycle of requests: what is asked and when, the same in every cycle, so that any two spans of whole cycles compare."""

import random
from dataclasses import dataclass, field
from typing import Any

from vllm_mtp import demo

CYCLE_SECONDS = 150.0
"""Four cycles are ten minutes."""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"enum": ["class", "def"]}, "line": {"type": "integer"}},
    "required": ["name", "kind", "line"],
}
WEIGHTS = {
    "short": 24,
    "long": 10,
    "long prompt": 10,
    "streamed": 8,
    "json": 7,
    "regex": 5,
    "choice": 3,
    "penalties": 4,
    "logprobs": 3,
    "stop": 3,
    "sampled": 9,
    "several": 3,
    "cancelled": 9,
    "refused": 2,
}


@dataclass
class Asked:
    """One request.

    Attributes:
        kind: of WEIGHTS.
        at: seconds after the cycle begins.
        body: of /v1/completions.
        cancel_after: chunks of a stream after which the client goes away; 0: before the first. None: it stays.
        compared: whether the answer must be plain vLLM's.
    """

    kind: str
    at: float
    body: dict[str, Any] = field(default_factory=dict)
    cancel_after: int | None = None

    @property
    def compared(self) -> bool:
        return self.kind != "refused" and self.cancel_after is None and self.body["temperature"] == 0


def cycle(seed: int, requests_per_minute: float) -> list[Asked]:
    """Requests of one cycle, by time: bursts at random moments, most of a few requests, every tenth of 28."""
    rng, texts = random.Random(seed), demo.prompts()
    count = round(requests_per_minute * CYCLE_SECONDS / 60)
    kinds = [kind for kind, weight in WEIGHTS.items() for _ in range(round(weight * count / 100))]
    rng.shuffle(kinds)
    asked: list[Asked] = []
    burst = 0
    while kinds:
        size = 28 if burst % 10 == 9 else rng.choice((1, 1, 2, 2, 3, 4, 6))
        start = rng.uniform(0, CYCLE_SECONDS)
        asked += [_request(kinds.pop(), start + rng.uniform(0, 0.3), rng, texts) for _ in range(min(size, len(kinds)))]
        burst += 1
    return sorted(asked, key=lambda request: request.at)


def _request(kind: str, at: float, rng: random.Random, texts: list[str]) -> Asked:  # noqa: PLR0912
    text = rng.choice(texts)
    body: dict[str, Any] = {"prompt": text[-rng.randrange(40, 250) :], "temperature": 0.0, "max_tokens": rng.randint(8, 64)}
    request = Asked(kind, at, body)
    match kind:
        case "short":
            body["max_tokens"] = rng.randint(1, 24)
        case "long":
            body |= {"max_tokens": rng.randint(160, 300), "ignore_eos": True}
        case "long prompt":
            body["prompt"] = "\n".join(rng.sample(texts, 3))[-700:]
        case "streamed":
            body["stream"] = True
        case "json":
            body |= {"structured_outputs": {"json": SCHEMA}, "max_tokens": 96}
        case "regex":
            body |= {"structured_outputs": {"regex": r"def [a-z_]{3,12}\(self(, [a-z]{1,8}){0,3}\):"}}
        case "choice":
            body |= {"structured_outputs": {"choice": ["return None", "raise ValueError", "pass"]}}
        case "penalties":
            body |= {"presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
        case "logprobs":
            body["logprobs"] = 3
        case "stop":
            body |= {"stop": ["\n\n", "return"], "max_tokens": 96}
        case "sampled":
            body |= {"temperature": rng.choice((0.6, 0.8, 1.0)), "top_p": rng.choice((0.9, 1.0)), "seed": rng.randrange(2**31)}
        case "several":
            body |= {"temperature": 1.0, "n": 2, "seed": rng.randrange(2**31)}
        case "cancelled":
            body |= {"stream": True, "max_tokens": 300, "ignore_eos": True, "temperature": rng.choice((0.0, 0.0, 1.0))}
            request.cancel_after = rng.choice((0, 0, 1, 3, 10, 30))
        case "refused":
            body |= {"min_p": 0.2, "temperature": 1.0}
    body["return_token_ids"] = True
    return request
