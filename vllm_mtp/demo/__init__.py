"""The demo's files: a small base model, its adapter, and prompts from files that neither was trained on."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
ADAPTER = FOLDER / "adapter"


def prompts() -> list[str]:
    """The 120 held-out prompts, in their fixed order (`benchmarks/demo_model/make_prompts.py` chose them)."""
    with (FOLDER / "prompts.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]
