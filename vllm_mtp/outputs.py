"""Completions and what they say of an adapter: tokens per forward, acceptance by position, and how many loop."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Output:
    """One completion: its tokens, the number that each forward gave, the prompt's first, and their text and time if known."""

    tokens: list[int]
    steps: list[int]
    pieces: list[str] = field(default_factory=list)
    seconds: float = 0.0


def tokens_per_forward(outputs: Sequence[Output]) -> float:
    """Output tokens for each forward that a request took part in and got tokens from.

    The forward that ends the prompt counts as one: it gives one token, with and without speculation. Plain decoding has 1.
    """
    return sum(len(output.tokens) for output in outputs) / max(1, sum(len(output.steps) for output in outputs))


def acceptance_length(outputs: Sequence[Output]) -> float | None:
    """Tokens of each forward after the one that ends the prompt."""
    steps = [step for output in outputs for step in output.steps[1:]]
    return sum(steps) / len(steps) if steps else None


def acceptance_by_position(outputs: Sequence[Output]) -> list[float]:
    """Of the forwards after the prompt's, the share that accepted draft 1, 2, .. and all before it."""
    steps = [step for output in outputs for step in output.steps[1:]]
    return [sum(step > i for step in steps) / len(steps) for i in range(1, max(steps, default=1))]


def loops(text: list[int], n: int = 8, times: int = 3) -> bool:
    """Whether some n-gram occurs at least so often: text that repeats itself is easy to draft and flatters a mean."""
    return max(Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1)).values(), default=0) >= times


def novel_length(text: list[int], n: int = 8) -> int:
    """Tokens before the one that completes an n-gram for the second time: where text begins to repeat itself."""
    seen = set()
    for i in range(len(text) - n + 1):
        gram = tuple(text[i : i + n])
        if gram in seen:
            return i + n - 1
        seen.add(gram)
    return len(text)


def novel(output: Output) -> Output:
    """`output` up to where it begins to repeat itself, as if it had been stopped there."""
    length = novel_length(output.tokens)
    steps: list[int] = []
    while sum(steps) < length:
        steps.append(min(output.steps[len(steps)], length - sum(steps)))
    return Output(output.tokens[:length], steps, output.pieces[: len(steps)])


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def agreement(outputs: Sequence[Output], greedy: Sequence[Output]) -> dict[str, float]:
    """What is left of the greedy texts of the same prompts: outputs that are the same, and the share of tokens that stand before an
    output's first difference."""
    pairs = [(output.tokens, wanted.tokens) for output, wanted in zip(outputs, greedy, strict=True)]
    tokens = sum(len(output) for output, _ in pairs)
    return {
        "same_outputs": sum(output == wanted for output, wanted in pairs) / len(pairs),
        "tokens_before_the_first_difference": sum(common_prefix(*pair) for pair in pairs) / tokens,
    }


def figures(outputs: Sequence[Output]) -> dict[str, Any]:
    """Figures of all outputs, of their novel beginnings, of those that loop and of those that do not."""
    parts = {
        "all": list(outputs),
        "novel": [novel(output) for output in outputs],
        "looping": [output for output in outputs if loops(output.tokens)],
        "not_looping": [output for output in outputs if not loops(output.tokens)],
    }
    return {
        name: {
            "outputs": len(part),
            "output_tokens": sum(len(output.tokens) for output in part),
            "tokens_per_forward": tokens_per_forward(part) if part else None,
            "acceptance_length": acceptance_length(part),
            "acceptance_by_position": acceptance_by_position(part),
        }
        for name, part in parts.items()
    }
