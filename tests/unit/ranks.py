"""Ranks of a parallel run as threads, with the collective operations that our parts take as functions."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass
class Rank:
    """One of several ranks that run at the same time."""

    index: int
    barrier: Barrier
    slots: list[Any]

    def _everyones(self, value: Any) -> list[Any]:
        self.slots[self.index] = value
        self.barrier.wait(30)
        values = list(self.slots)
        self.barrier.wait(30)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce."""
        return torch.stack(self._everyones(tensor)).sum(0)

    def max(self, value: float) -> float:
        """The same of a number."""
        return max(self._everyones(value))


def on_ranks(num_ranks: int, work: Callable[[Rank], T]) -> list[T]:
    """What `work` returns on each rank. Ranks that do not call the same operations as often end in BrokenBarrierError."""
    barrier, slots = Barrier(num_ranks), [None] * num_ranks
    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(work, [Rank(i, barrier, slots) for i in range(num_ranks)]))
