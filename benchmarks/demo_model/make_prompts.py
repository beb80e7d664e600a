"""Choose the demo's prompts: passages of held-out files and held-out problems, by a fixed seeded rule.

    python -m benchmarks.demo_model.make_prompts vllm_mtp/demo/prompts

A passage of code is whole lines from one file, 250 to 400 characters, cut inside an indented block after the last character of a
line, so that what follows is a new line of the same function; at least 600 characters follow. Files take turns until there are
enough passages, so every held-out file that is long enough is there, and no two passages overlap.

A passage of prose is as long and ends with a word inside a document. An arithmetic prompt is a question, with its answer beside it.
"""

import argparse
import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.demo_model import arithmetic
from benchmarks.demo_model.corpus import prose_split, split

NUM_PROMPTS = {"code": 120, "prose": 60, "arithmetic": 120}
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


def prose_passages(text: str, generator: random.Random) -> list[tuple[int, str]]:
    """(number of the first line, passage) of passages of prose that do not overlap, in a random order."""
    words = list(re.finditer(r"\S+", text))
    found: list[tuple[int, str]] = []
    first = 0
    while first < len(words):
        start, goal = words[first].start(), generator.randint(MIN_CHARACTERS, MAX_CHARACTERS - 50)
        last = next((i for i in range(first, len(words)) if words[i].end() - start >= goal), None)
        if last is None:
            break
        passage = text[start : words[last].end()]
        if len(passage) <= MAX_CHARACTERS and len(text) - words[last].end() >= MIN_FOLLOWING:
            found.append((text.count("\n", 0, start) + 1, passage))
        # The next passage begins with a paragraph.
        later = text.find("\n\n", words[last].end())
        first = next((i for i in range(last, len(words)) if words[i].start() > later), len(words)) if later >= 0 else len(words)
    generator.shuffle(found)
    return found


def choose(
    files: dict[str, str], wanted: int, find: Callable[[str, random.Random], list[tuple[int, str]]] = passages
) -> list[dict[str, str | int]]:
    """`wanted` prompts, each with the file and line where it begins."""
    generator = random.Random(0)
    waiting = {name: find(text, generator) for name, text in sorted(files.items())}
    chosen: list[dict[str, str | int]] = []
    while len(chosen) < wanted:
        turn = [name for name, found in waiting.items() if found]
        if not turn:
            raise ValueError(f"{len(files)} held-out files have {len(chosen)} passages, {wanted} are wanted")
        generator.shuffle(turn)
        for name in turn[: wanted - len(chosen)]:
            line, text = waiting[name].pop()
            chosen.append({"file": name, "line": line, "text": text})
    return chosen


def all_prompts() -> dict[str, list[dict[str, str | int]]]:
    """Every domain's prompts."""
    problems = itertools.islice(arithmetic.problems(held_out=True, seed=1), NUM_PROMPTS["arithmetic"])
    return {
        "code": choose(split()[1], NUM_PROMPTS["code"]),
        "prose": choose(prose_split()[1], NUM_PROMPTS["prose"], prose_passages),
        "arithmetic": [{"text": made.prompt, "answer": made.answer} for made in problems],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a folder; each domain gets a file")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for domain, prompts in all_prompts().items():
        (options.output / f"{domain}.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


if __name__ == "__main__":
    main()
