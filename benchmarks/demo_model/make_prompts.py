"""Choose the demo's prompts: passages of held-out files, by a fixed seeded rule.

    python -m benchmarks.demo_model.make_prompts vllm_mtp/demo/prompts.jsonl

A passage is whole lines from one file, 250 to 400 characters, cut inside an indented block after the last character of a line, so
that what follows is a new line of the same function; at least 600 characters follow. Files take turns until there are
enough passages, so every held-out file that is long enough is there, and no two passages overlap.
"""

import argparse
import json
import random
from pathlib import Path

from benchmarks.demo_model.corpus import split

NUM_PROMPTS = 120
MIN_CHARACTERS, MAX_CHARACTERS = 250, 400
MIN_FOLLOWING = 600  # room for 128 tokens of continuation


def passages(text: str, generator: random.Random) -> list[tuple[int, str]]:
    """(number of the first line, passage) of passages of `text` that do not overlap, in a random order."""
    lines = text.splitlines(keepends=True)
    found: list[tuple[int, str]] = []
    start = generator.randrange(10)
    while start < len(lines):
        size, end, goal = 0, start, generator.randint(MIN_CHARACTERS, MAX_CHARACTERS - 50)
        while end < len(lines) and size < goal:
            size += len(lines[end])
            end += 1
        passage = "".join(lines[start:end]).rstrip()
        follows = "".join(lines[end:])
        inside = bool(lines[start].strip()) and follows[:1] in (" ", "\t") and bool(follows.split("\n", 1)[0].strip())
        if inside and MIN_CHARACTERS <= len(passage) <= MAX_CHARACTERS and len(follows) >= MIN_FOLLOWING:
            found.append((start + 1, passage))
            start = end
        else:
            start += 1
    generator.shuffle(found)
    return found


def choose(files: dict[str, str]) -> list[dict[str, str | int]]:
    """The prompts, each with the file and line where it begins."""
    generator = random.Random(0)
    waiting = {name: passages(text, generator) for name, text in sorted(files.items())}
    chosen: list[dict[str, str | int]] = []
    while len(chosen) < NUM_PROMPTS:
        turn = [name for name, found in waiting.items() if found]
        if not turn:
            raise ValueError(f"{len(files)} held-out files have {len(chosen)} passages, {NUM_PROMPTS} are wanted")
        generator.shuffle(turn)
        for name in turn[: NUM_PROMPTS - len(chosen)]:
            line, text = waiting[name].pop()
            chosen.append({"file": name, "line": line, "text": text})
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    options.output.write_text("".join(json.dumps(prompt) + "\n" for prompt in choose(split()[1])))


if __name__ == "__main__":
    main()
