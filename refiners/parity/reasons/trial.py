"""A cause is tried on what both sides were given, and on other values: only what holds on both draws is told.

On one draw a wrong change may happen to give the right values, as where a factor is 1 or a mask hides what is wrong.
On the second draw all that depends on weights or inputs is another, the same on both sides. Tables, masks and whole
numbers stay as they are, since one side may hold ready what the other computes.
"""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch
from torch import Tensor

from refiners.parity.operations import Operation
from refiners.parity.reasons.replay import HUGE, Edit, Program, is_close

MOVED_BY = 0.3
"""How far an element is moved, about: a share of it."""
_MIXING = (-4658895280553007687, -7723592293110705685)
_BITS = (1 << 53) - 1

_UNTIL: ContextVar[tuple[float, float]] = ContextVar("until", default=(math.inf, math.inf))

Making = Callable[[Program, Program], Edit]
"""An edit of the first program, which may take values of the second."""


@contextmanager
def limited(until: float, seconds: float) -> Generator[None, None, None]:
    """Inside, `Trial.holds` raises a TimeoutError after a time of the monotonic clock, or so much of the processor."""
    token = _UNTIL.set((until, time.thread_time() + seconds))
    try:
        yield
    finally:
        _UNTIL.reset(token)


class Trial:
    """The programs of both sides, on each draw.

    Receives:
        port, upstream: on what the models were given.
    """

    def __init__(self, port: Program, upstream: Program) -> None:
        self.port, self.upstream = port, upstream
        self.touched: list[Operation] = []
        """Where in the port the last change that held is: for one of upstream, what makes the value."""
        again = redrawn(port, upstream)
        self.draws = [(port, upstream)] if again is None else [(port, upstream), again]

    def holds(self, making: Making, *, of_upstream: bool = False) -> bool:
        """Whether the port with an edit makes upstream's value on each draw, or upstream with one the port's."""
        until, worked = _UNTIL.get()
        if time.monotonic() > until or time.thread_time() > worked:
            raise TimeoutError
        holds = all(_makes(making, *(draw[::-1] if of_upstream else draw)) for draw in self.draws)
        if holds:
            sides = (self.upstream, self.port) if of_upstream else (self.port, self.upstream)
            edited = _touched(making(*sides), sides[0])
            self.touched[:] = _before(edited, *sides) if of_upstream else edited
        return holds

    def part(self, ours: int, theirs: int) -> "Trial":
        """The same up to other values."""
        return PartOfTrial([(port.part(ours), upstream.part(theirs)) for port, upstream in self.draws], self.touched)


class PartOfTrial(Trial):
    """A trial of parts of the programs."""

    def __init__(self, draws: list[tuple[Program, Program]], touched: list[Operation]) -> None:
        self.port, self.upstream = draws[0]
        self.draws, self.touched = draws, touched


def _touched(edit: Edit, program: Program) -> list[Operation]:
    """The operations that an edit changes, or what they make or read; none where it puts another value at the end."""
    indices = {*edit.changes, *(index for index, _ in edit.reads)}
    makers = [program.made[number][0] for number in edit.values if number in program.made and number != program.root]
    return [*(operation for operation in program.operations if operation.index in indices), *makers]


def _before(edited: Sequence[Operation], upstream: Program, port: Program) -> list[Operation]:
    """Where in the port something of upstream's is missing: what makes its value, less what upstream does behind it."""
    reached = {number for operation in edited for number in operation.outputs}
    behind: set[str] = set()
    for operation in upstream.operations:
        if operation not in edited and not reached.isdisjoint(operation.inputs):
            reached.update(operation.outputs)
            behind.add(operation.name)
    last = port.operations[-1:]
    while last and last[0].name in behind:
        makers = [port.made[number][0] for number in last[0].inputs if number in port.made]
        if not makers or makers[0].index >= last[0].index:
            break
        last = makers[:1]
    return list(last)


def _makes(making: Making, changed: Program, right: Program) -> bool:
    try:
        made = changed.run(making(changed, right))[changed.root]
    except TimeoutError:
        raise
    except Exception:  # a guess that does not fit an operation
        return False
    return is_close(made, right.values[right.root])


def redrawn(port: Program, upstream: Program) -> tuple[Program, Program] | None:
    """Both programs on other values; None where they start from constants alone.

    Raises:
        ValueError: each side starts from a value that the other one makes.
    """
    given = {**port.given, **upstream.given}
    varies = Varies(port, upstream)
    fresh = {
        number: _moved(tensor)
        for number, tensor in given.items()
        if tensor.is_floating_point()
        and varies(number)
        and number not in port.made
        and number not in upstream.made
        and not bool((tensor == 1).all())  # as e to the power of 0 is
    }
    if not fresh:
        return None
    first, second = (upstream, port) if port.given.keys() & upstream.made.keys() else (port, upstream)
    if first.given.keys() & second.made.keys():
        raise ValueError("each side starts from a value that the other one makes")
    one = replace(first, given={number: fresh.get(number, tensor) for number, tensor in first.given.items()})
    known: Mapping[int, Tensor] = {**{n: one.values[n] for n in first.made}, **fresh}
    two = replace(second, given={number: known.get(number, tensor) for number, tensor in second.given.items()})
    return (one, two) if first is port else (two, one)


def _moved(tensor: Tensor) -> Tensor:
    """Each element times a factor that is read from its own bits.

    So pieces of one tensor, and a tensor that is joined of others, move alike on both sides: a port may hold in one
    weight what upstream holds in three.
    """
    wide = tensor.to(torch.float64)
    mixed = wide.abs().contiguous().view(torch.int64)
    for factor in _MIXING:
        mixed = (mixed ^ (mixed >> 29)) * factor
    uniform = ((mixed >> 11) & _BITS).to(torch.float64) / _BITS
    return torch.where(wide.abs() < HUGE, wide * (1 + MOVED_BY * (4 * uniform - 2)), wide)


class Varies:
    """Whether a value depends on weights that are learnt, or on what the model is given."""

    def __init__(self, *programs: Program) -> None:
        self._made = [program.trace_made for program in programs]
        self._constants = set[int]().union(*(program.trace.weights for program in programs))
        self._learnt = frozenset[int]().union(*(program.parameters for program in programs))

    def __call__(self, number: int) -> bool:
        waiting, seen = [number], {number}
        while waiting:
            one = waiting.pop()
            inputs = self._inputs(one)
            if one in self._learnt or (inputs is None and one not in self._constants):
                return True
            new = set(inputs or ()) - seen
            seen |= new
            waiting += new
        return False

    def _inputs(self, number: int) -> Sequence[int] | None:
        """What it is made of; None if nobody made it."""
        for made in self._made:
            if number in made:
                return made[number].inputs
        return None
