"""Measure two engines against each other, in turns."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_mtp.cli.engine import EngineProcess, Generation
from vllm_mtp.demo import DOMAINS
from vllm_mtp.outputs import Output, tokens_per_forward

FEWEST_ROUNDS = 2
"""That are run however long they take."""


@dataclass(frozen=True)
class Comparison:
    """Pairs of runs over the same prompts at one concurrency: `plain[i]` ran right before `ours[i]`."""

    concurrency: int
    plain: list[Generation]
    ours: list[Generation]

    @property
    def ratios(self) -> list[float]:
        """Output tokens a second of ours over plain's, pair by pair."""
        return [b.tokens_per_second / a.tokens_per_second for a, b in zip(self.plain, self.ours, strict=True)]

    def figures(self) -> dict[str, Any]:
        """Medians and every single run."""
        runs = {"plain": [g.tokens_per_second for g in self.plain], "ours": [g.tokens_per_second for g in self.ours]}
        return {
            "concurrency": self.concurrency,
            "num_prompts": len(self.plain[0].outputs),
            "output_tokens": {"plain": self.plain[0].num_tokens, "ours": self.ours[0].num_tokens},
            "tokens_per_forward": {name: tokens_per_forward(g.outputs) for name, g in self._first().items()},
            "tokens_per_second": {name: statistics.median(values) for name, values in runs.items()},
            "ratio": statistics.median(self.ratios),
            "ratio_range": [min(self.ratios), max(self.ratios)],
            "identical": num_identical(self.plain[0].outputs, self.ours[0].outputs),
            "runs": {**runs, "ratios": self.ratios},
        }

    def by_domain(self) -> dict[str, "Comparison"]:
        """Of prompts that came from the demo's domains in turns, one at a time: each domain's."""
        assert self.concurrency == 1, "requests in flight together share their seconds"
        return {domain: self._some(slice(i, None, len(DOMAINS))) for i, domain in enumerate(DOMAINS)}

    def _some(self, which: slice) -> "Comparison":
        plain, ours = ([run.some(which) for run in runs] for runs in (self.plain, self.ours))
        return Comparison(self.concurrency, plain, ours)

    def _first(self) -> dict[str, Generation]:
        return {"plain": self.plain[0], "ours": self.ours[0]}


def num_identical(plain: Sequence[Output], ours: Sequence[Output]) -> int:
    """How many completions have the same tokens."""
    return sum(a.tokens == b.tokens for a, b in zip(plain, ours, strict=True))


def compare(
    plain: EngineProcess,
    ours: EngineProcess,
    prompts: Sequence[str],
    *,
    concurrency: int,
    max_tokens: int,
    rounds: int,
    progress: Callable[[str], None],
    limit: float = math.inf,
) -> Comparison:
    """Pairs of runs, plain and ours in turns, after one of each that is not counted: `rounds` of them, or as many as `limit` allows
    (`in_turns`)."""

    def say(round_: str) -> None:
        progress(f"concurrency {concurrency}: {round_}")

    engines = {"plain": plain, "ours": ours}
    runs = in_turns(engines, prompts, concurrency=concurrency, max_tokens=max_tokens, rounds=rounds, progress=say, limit=limit)
    return Comparison(concurrency, runs["plain"], runs["ours"])


def in_turns(
    engines: Mapping[str, EngineProcess],
    prompts: Sequence[str],
    *,
    concurrency: int | list[int],
    max_tokens: int,
    rounds: int,
    progress: Callable[[str], None],
    limit: float = math.inf,
) -> dict[str, list[Generation]]:
    """`rounds` runs of each engine, in rounds of one run each, after a round that is not counted.

    Args:
        limit: seconds of all runs, the first round's too, after which no round is begun; `FEWEST_ROUNDS` are run in any case.
    """
    runs: dict[str, list[Generation]] = {name: [] for name in engines}
    taken = 0.0
    for number in range(rounds + 1):
        if number > FEWEST_ROUNDS and taken > limit:
            break
        for name, engine in engines.items():
            run = engine.generate(prompts, max_tokens=max_tokens, concurrency=concurrency)
            taken += run.seconds
            if number:
                runs[name].append(run)
        progress(f"round {number} of {rounds}" if number else "warm-up")
    return runs
