"""The demo's files: a small base model, its adapter, and prompts from files that neither was trained on."""

import itertools
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
ADAPTER = FOLDER / "adapter"
PROMPTS = FOLDER / "prompts"
DOMAINS = ("code", "prose", "arithmetic")


def prompts(domain: str = "code") -> list[str]:
    """The held-out prompts of one of `DOMAINS`, in their fixed order (`benchmarks/demo_model/make_prompts.py` chose them)."""
    return [line["text"] for line in _lines(domain)]


def answers() -> list[int]:
    """The right answers of the arithmetic prompts, in their order."""
    return [line["answer"] for line in _lines("arithmetic")]


def _lines(domain: str) -> list[dict[str, Any]]:
    with (PROMPTS / f"{domain}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def mixed_prompts() -> list[str]:
    """Prompts of all domains in turns, as many of each."""
    return list(itertools.chain.from_iterable(zip(*map(prompts, DOMAINS), strict=False)))
