"""One cell: a variant of an operation at a shape, with its roofline."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .timing import Call

Make = Callable[[], list[Call]]


@dataclass(frozen=True)
class Cell:
    """What is timed.

    Attributes:
        operation, variant: the row of a table, and who computes it.
        shape: sizes by name.
        num_bytes: bytes that must move to and from device memory for one call.
        flops: floating point operations of one call, masked ones not counted.
        make: allocates inputs and returns calls over different input sets.
    """

    operation: str
    variant: str
    shape: dict[str, Any]
    num_bytes: float
    flops: float
    make: Make = field(compare=False)

    @property
    def key(self) -> str:
        """The cell's name in the output file."""
        return "/".join([self.operation, *(f"{name}={value}" for name, value in self.shape.items()), self.variant])


Cells = Iterator[Cell]
