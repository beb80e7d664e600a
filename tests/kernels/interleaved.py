"""Triton's interpreter with programs that run at the same time, in an order and with a memory that no kernel may lean on.

The interpreter runs one program to its end before the next begins, so it shows no race. Here a seed draws which of the resident
programs takes the next step; steps end where memory is touched. What programs see of each other follows the GPU's memory model
(PTX ISA, memory consistency model) from its weak side:

- a store waits in its program until a release that a barrier stands in front of (the threads of a program are many, and the one
  that releases vouches for the others' stores only behind a barrier), or until some later time;
- once out, it is seen by other programs when they acquire, or at some later time;
- programs begin in any order, a limited number at a time.
"""

import inspect
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from triton._C.libtriton import interpreter as memory
from triton._C.libtriton import ir
from triton.runtime import interpreter

MOST_STEPS = 200_000
RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)


class NoProgressError(RuntimeError):
    """Programs wait for something that does not come."""


@dataclass(eq=False)
class Store:
    """A store on its way: pointers, values and mask of its elements."""

    pointers: Any
    values: Any
    mask: Any
    behind_barrier: bool = False

    def addresses(self) -> list[int]:
        return [int(pointer) for pointer in self.pointers[self.mask]]


@dataclass(eq=False)
class Program:
    """A program of the grid.

    Attributes:
        at: its place in the grid.
        pending: its stores that nobody else has seen.
        old: values that it still sees where others have stored, by address.
    """

    at: tuple[int, int, int]
    pending: list[Store] = field(default_factory=list)
    old: dict[int, Any] = field(default_factory=dict)
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ended: bool = False


class Interleaving:
    """Runs grids; stands in the place of the interpreter's executor and of its memory operations.

    Args:
        seed: of the order.
        resident: most programs at a time.
    """

    def __init__(self, seed: int, resident: int) -> None:
        self.random, self.resident = random.Random(seed), resident
        self.current: Program | None = None
        self.live: list[Program] = []
        self.back = threading.Semaphore(0)
        self.error: BaseException | None = None

    def run(self, function: Any, arguments: dict[str, Any], grid: tuple[int, ...]) -> None:
        waiting = [Program((x, y, z)) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        self.random.shuffle(waiting)
        self.live, self.error, steps = [], None, 0
        while waiting or self.live:
            while waiting and len(self.live) < self.resident:
                self._begin(waiting.pop(), function, arguments)
            program = self.random.choice(self.live)
            self._step(program)
            if program.ended:
                self.live.remove(program)
            steps += 1
            if self.error is None and steps > MOST_STEPS:
                self.error = NoProgressError(f"{len(self.live)} programs run on after {steps} steps, {len(waiting)} have not begun")
            if self.error is not None:
                for left in self.live:  # each raises at its next step
                    while not left.ended:
                        self._step(left)
                raise self.error

    def _begin(self, program: Program, function: Any, arguments: dict[str, Any]) -> None:
        def body() -> None:
            program.go.acquire()
            try:
                function(**arguments)
                while program.pending:
                    self._pause()
            except BaseException as error:
                self.error = self.error or error
            program.ended = True
            self.back.release()

        self.live.append(program)
        threading.Thread(target=body, daemon=True).start()

    def _step(self, program: Program) -> None:
        interpreter.interpreter_builder.grid_idx, self.current = program.at, program
        program.go.release()
        self.back.acquire()

    def _pause(self) -> Program:
        """Lets others run; returns the program that has come here."""
        program = self.current
        assert program is not None
        self.back.release()
        program.go.acquire()
        if self.error is not None:
            raise self.error
        for store in list(program.pending):
            if self.random.random() < 0.1:
                self._let_out(program, store)
        for address in list(program.old):
            if self.random.random() < 0.02:
                del program.old[address]
        return program

    def _let_out(self, program: Program, store: Store) -> None:
        program.pending.remove(store)
        for other in self.live:
            if other is not program and self.random.random() < 0.5:
                before = memory.load(store.pointers, store.mask, np.zeros_like(store.values), store.values.dtype)
                for address, value in zip(store.addresses(), before[store.mask], strict=True):
                    other.old.setdefault(address, value)
        memory.store(store.pointers, store.values, store.mask)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        program = self._pause()
        wanted = {int(pointer) for pointer in pointers[mask]}
        for store in list(program.pending):  # a program sees its own stores
            if not wanted.isdisjoint(store.addresses()):
                self._let_out(program, store)
                for address in store.addresses():
                    program.old.pop(address, None)
        found = memory.load(pointers, mask, other, dtype)
        if not wanted.isdisjoint(program.old):
            for index in np.ndindex(pointers.shape):
                if mask[index] and int(pointers[index]) in program.old:
                    found[index] = program.old[int(pointers[index])]
        return found

    def store(self, pointers: Any, values: Any, mask: Any) -> None:
        program = self._pause()
        program.pending.append(Store(pointers.copy(), values.copy(), mask.copy()))

    def barrier(self) -> None:
        assert self.current is not None
        for store in self.current.pending:
            store.behind_barrier = True

    def atomic(self, semantic: Any, pointers: Any) -> None:
        """What comes with an atomic operation."""
        program = self._pause()
        touched = {int(pointer) for pointer in np.ravel(pointers)}
        for store in list(program.pending):
            if (store.behind_barrier and semantic in RELEASES) or not touched.isdisjoint(store.addresses()):
                self._let_out(program, store)
        if semantic in ACQUIRES:
            program.old.clear()


@contextmanager
def interleaved(seed: int, resident: int) -> Iterator[Interleaving]:
    """Kernels that are launched in this context run so."""
    order, builder, executor = Interleaving(seed, resident), interpreter.InterpreterBuilder, interpreter.GridExecutor
    atomic_rmw = builder.create_atomic_rmw

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        named = {name: value for name, value in kwargs.items() if name in inspect.getfullargspec(self.fn).args}
        scope = interpreter._patch_lang(self.fn)
        try:
            arguments = inspect.getcallargs(self.fn, *args, **named)
            grid = (*self.grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            order.run(
                self.fn,
                {name: value if name in self.constexprs else interpreter._implicit_cvt(value) for name, value in arguments.items()},
                grid,
            )
        finally:
            scope.restore()

    def load(self: Any, pointers: Any, mask: Any, other: Any, *_: Any) -> Any:
        kind = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        data = np.zeros_like(pointers.data, dtype=dtype) if other is None else other.data
        return interpreter.TensorHandle(order.load(pointers.data, mask.data, data, dtype), kind)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> None:
        order.store(pointers.data, value.data, mask.data)

    def atomic(self: Any, operation: Any, pointer: Any, value: Any, mask: Any, semantic: Any, scope: Any) -> Any:
        order.atomic(semantic, pointer.data)
        return atomic_rmw(self, operation, pointer, value, mask, semantic, scope)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "__call__", run)
        patch.setattr(builder, "create_masked_load", load)
        patch.setattr(builder, "create_masked_store", store)
        patch.setattr(builder, "create_atomic_rmw", atomic)
        patch.setattr(builder, "create_barrier", lambda _: order.barrier())
        yield order
