"""What both sides compute between the values that they share, as two small programs that can be run again.

A program is the operations between known values and one that differs, as a trace has them. It is run on what those
operations were given, in float64, so that rounding hides nothing and excuses nothing, and no module is needed: the
program of a port that is one function of a hundred lines can be changed operation by operation all the same.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from refiners.parity import rounding
from refiners.parity.bits import same_bits
from refiners.parity.fingerprint import Sketch, sketch
from refiners.parity.operations import Operation, Slot, Trace, draws, fill_template, tensors_in
from refiners.parity.reasons.ways import producers
from refiners.parity.torch_state import default_dtype
from refiners.parity.unchecked import refuse

MOST_ELEMENTS = 1 << 24
"""Of all values of a program together; larger ones are not run again."""

HUGE = 1e30
"""As large as in a mask."""

_IS_WIDE: ContextVar[bool] = ContextVar("is wide", default=True)

_BOUND: ContextVar[float] = ContextVar("bound", default=rounding.FLOAT64_AGREEMENT)

Change = Callable[[Operation, list[Tensor]], Any]
"""What is done in place of an operation, on its tensors."""


@dataclass(frozen=True)
class Edit:
    """What is done otherwise when a program is run.

    Receives:
        changes: index of an operation → what is done in its place.
        values: number of a value → what is made of it.
        reads: index of an operation and place of a tensor → what is made of what it reads there.
    """

    changes: Mapping[int, Change] = field(default_factory=dict[int, Change])
    values: Mapping[int, Callable[[Tensor], Tensor]] = field(default_factory=dict[int, Callable[[Tensor], Tensor]])
    reads: Mapping[tuple[int, int], Callable[[Tensor], Tensor]] = field(
        default_factory=dict[tuple[int, int], Callable[[Tensor], Tensor]]
    )


@dataclass(frozen=True)
class Program:
    """How one side makes a value.

    Receives:
        trace: of the side.
        operations: between known values and `root`, in order.
        root: the number of the value.
        given: the values that the operations read and do not make.
        names: of those that are weights or tables.
        parameters: the numbers of the weights that are learnt.
        recorded: the value that the model made, if it was kept.
        is_proved: whether it is known to make it.
    """

    trace: Trace
    operations: Sequence[Operation]
    root: int
    given: Mapping[int, Tensor] = field(repr=False)
    names: Mapping[int, str] = field(default_factory=dict[int, str], repr=False)
    parameters: frozenset[int] = frozenset()
    recorded: Tensor | None = field(default=None, repr=False)
    is_proved: bool = False

    @cached_property
    def made(self) -> dict[int, tuple[Operation, int]]:
        """Number of a value → the operation that makes it, and its place among the results."""
        found: dict[int, tuple[Operation, int]] = {}
        for operation in self.operations:
            for place, number in enumerate(operation.outputs):
                if number is not None and number not in operation.inputs and number not in self.given:
                    found.setdefault(number, (operation, place))
        return found

    @cached_property
    def trace_made(self) -> dict[int, Operation]:
        """The same of the whole trace."""
        return producers(self.trace)

    @cached_property
    def values(self) -> dict[int, Tensor]:
        """All values of the program, in float64."""
        return self.run()

    @cached_property
    def sketches(self) -> dict[int, tuple[int, Sketch]]:
        """What identifies each of them, whatever its shape."""
        return {number: (value.numel(), sketch(value)) for number, value in self.values.items()}

    def part(self, root: int) -> "Program":
        """The same up to another value."""
        kept: dict[int, Operation] = {}
        waiting, seen = [root], {root}
        while waiting:
            found = self.made.get(waiting.pop())
            if found is not None:
                kept[found[0].index] = found[0]
                waiting += [number for number in found[0].inputs if number not in seen]
                seen.update(found[0].inputs)
        operations = [kept[index] for index in sorted(kept)]
        return Program(self.trace, operations, root, self.given, self.names, self.parameters)

    def leaves(self) -> set[int]:
        """The values that it starts from."""
        return {number for op in self.operations for number in op.inputs if number not in self.made} or {self.root}

    def run(self, edit: Edit | None = None) -> dict[int, Tensor]:
        """Runs it with an edit: in float64, or inside of `natively` in the dtypes of the model.

        In float64 what an edit does not reach is not computed again.
        """
        is_wide = _IS_WIDE.get()
        known = self.values if edit is not None and is_wide else {}
        edit = edit or Edit()
        values = {number: _edited(edit.values.get(number), _wide(tensor)) for number, tensor in self.given.items()}
        reached = {*edit.values}
        readers = {*edit.changes, *(index for index, _ in edit.reads)}
        with torch.no_grad(), default_dtype(torch.float64 if is_wide else torch.get_default_dtype()):
            for operation in self.operations:
                numbers = (*operation.inputs, *operation.outputs)
                if known and operation.index not in readers and reached.isdisjoint(numbers):
                    values.update((number, known[number]) for number in operation.outputs if number in known)
                    continue
                reached.update(number for number in operation.outputs if number is not None)
                reads = (edit.reads.get((operation.index, place)) for place in itertools.count())
                given = [_edited(read, values[number]) for read, number in zip(reads, operation.inputs, strict=False)]
                results = tensors_in(edit.changes.get(operation.index, as_it_is)(operation, given))
                for number, result in self._first_made(operation, results):
                    values[number] = _edited(edit.values.get(number), result)
        return values

    def is_faithful(self) -> bool:
        """Whether it makes, as it is and in the model's own dtypes, the very value that the model made."""
        if self.recorded is None:
            return self.is_proved
        with natively():
            values = self.run()
        made = values[self.root]
        return same_bits(made, self.recorded) or (made.dtype == torch.float64 and is_close(made, self.recorded))

    def starting_from(self, given: Mapping[int, Tensor]) -> "Program":
        """The same on other values, as those are that the model made wrong before."""
        if not given:
            return self
        like = {number: shaped_as(value, self.given[number]) for number, value in given.items()}
        return replace(self, given={**self.given, **like}, recorded=None, is_proved=self.is_faithful())

    def _first_made(self, operation: Operation, results: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        for place, (number, result) in enumerate(zip(operation.outputs, results, strict=False)):
            if number is not None and self.made.get(number) == (operation, place):
                yield number, result


def shaped_as(value: Tensor, like: Tensor) -> Tensor:
    """A value in the shape of another one, heads and positions in its order if they are in the other one."""
    if value.shape != like.shape and value.ndim == like.ndim == 4 and value.transpose(1, 2).shape == like.shape:
        return value.transpose(1, 2)
    return value.reshape_as(like)


def makes_bits(program: Program, edit: Edit, right: Program) -> bool:
    """Whether a program with an edit makes the very value that another one's model made; to be asked `natively`."""
    try:
        made = program.run(edit)[program.root]
    except Exception:  # a guess that does not fit an operation
        return False
    return right.recorded is not None and same_bits(made, right.recorded)


def _edited(change: Callable[[Tensor], Tensor] | None, value: Tensor) -> Tensor:
    return value if change is None else change(value)


def _own(operation: Operation, given: list[Tensor]) -> list[Tensor]:
    """What an operation may read and write: a copy that changes no value is no operation of a program."""
    if operation.function._schema.is_mutable:
        return [tensor.clone() for tensor in given]
    if operation.name in ("aten.view", "aten._unsafe_view", "aten.as_strided_scatter"):
        return [tensor.contiguous() for tensor in given]
    return given


def as_it_is(operation: Operation, given: list[Tensor]) -> Any:
    """An operation, in float64."""
    return with_arguments(operation, operation.template, given)


def with_arguments(operation: Operation, template: Any, given: list[Tensor]) -> Any:
    """An operation with other arguments."""
    if operation.before is not None:
        given = tensors_in(as_it_is(operation.before, given))
    function, own = operation.function, _own(operation, given)

    def put(slot: Slot) -> Tensor:
        return own[slot.place]

    wide = fill_template(template, torch.dtype, _wide_dtype)
    args, kwargs = cast(tuple[Any, Any], fill_template(wide, Slot, put))
    refuse(operation.name, args, own)
    return function(*args, **kwargs)


def left_out(operation: Operation, given: list[Tensor]) -> Any:
    """Nothing: the first tensor of the size of the result passes."""
    result = tensors_in(as_it_is(operation, given))[0]
    return next(tensor.reshape(result.shape) for tensor in given if tensor.numel() == result.numel())


@contextmanager
def natively() -> Generator[None, None, None]:
    """Inside, programs run in the dtypes of the model."""
    token = _IS_WIDE.set(False)
    try:
        yield
    finally:
        _IS_WIDE.reset(token)


@contextmanager
def coarsely() -> Generator[None, None, None]:
    """Inside, values are taken for equal that the rounding of float32 may part: tables are often made in it."""
    token = _BOUND.set(rounding.ELEMENT_RATIO * torch.finfo(torch.float32).eps)
    try:
        yield
    finally:
        _BOUND.reset(token)


def is_same(first: tuple[int, Sketch], second: tuple[int, Sketch], times: float = 1.0) -> bool:
    """Whether two values are equal but for rounding, or some times as much, whatever their shapes."""
    (size, one), (other_size, other) = first, second
    apart = max(abs(one.norm - other.norm), abs(one.product - other.product))
    return size == other_size and one.huge == other.huge and apart <= times * _BOUND.get() * max(one.norm, other.norm)


def is_close(made: Tensor, right: Tensor) -> bool:
    """Whether no element of a value is further from the one that is sought than rounding allows."""
    if made.numel() != right.numel():
        return False
    made, right = (_wide(t if t.is_floating_point() else t.to(torch.float64)).flatten() for t in (made, right))
    ordinary = right.isfinite() & (right.abs() < HUGE)
    if not torch.equal(made[~ordinary], right[~ordinary]):
        return False
    made, right = made[ordinary], right[ordinary]
    return not made.numel() or float((made - right).abs().max()) <= _BOUND.get() * float(right.abs().max())


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64) if tensor.is_floating_point() and _IS_WIDE.get() else tensor


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point and _IS_WIDE.get() else dtype


def needed(operations: Sequence[Operation], root: int) -> set[int]:
    """The numbers of the values that operations read before they make them, if they do."""
    made: set[int] = set()
    read: set[int] = set()
    for operation in operations:
        read |= set(operation.inputs) - made
        made |= {number for number in operation.outputs if number is not None} - set(operation.inputs)
    return read | ({root} - made)


def can_run(operations: Sequence[Operation]) -> bool:
    """Whether operations give the same once more, and are few and small enough."""
    if any(draws(operation.function) or _has_parts(operation.before) for operation in operations):
        return False
    return elements_of(operations) <= MOST_ELEMENTS


def _has_parts(before: Operation | None) -> bool:
    """Whether a view is of one of several pieces, and nobody noted of which."""
    return before is not None and (len(before.outputs) > 1 or _has_parts(before.before))


def elements_of(operations: Sequence[Operation]) -> int:
    """How many numbers operations read."""
    return sum(torch.Size(shape).numel() for operation in operations for _, shape in operation.tensors)


# Arguments that are no tensors

Path = tuple[Any, ...]


def scalars(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The numbers and flags of a template, each with the way to it."""
    if isinstance(value, bool | int | float):
        yield path, value
    elif isinstance(value, list | tuple):
        for place, item in enumerate(cast(Sequence[Any], value)):
            yield from scalars(item, (*path, place))
    elif isinstance(value, Mapping):
        for key, item in cast(Mapping[Any, Any], value).items():
            yield from scalars(item, (*path, key))


def with_scalar(template: Any, path: Path, new: Any) -> Any:
    """A template with another number or flag."""
    if not path:
        return new
    first, *rest = path
    if isinstance(template, Mapping):
        known = dict(cast(Mapping[Any, Any], template))
        return {**known, first: with_scalar(known.get(first), tuple(rest), new)}
    items = list(cast(Sequence[Any], template))
    items[first] = with_scalar(items[first], tuple(rest), new)
    return items if isinstance(template, list) else tuple(items)
