"""The way back from a value, through the operations that made it, to values that the other side knows too."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from refiners.parity.operations import Operation, Trace

RESHAPES = frozenset({"aten.view", "aten._unsafe_view", "aten.unsqueeze", "aten.squeeze", "aten.alias"})
"""What gives the same values in the same order."""


def common_path(first: str, second: str) -> str:
    """The path of the innermost node that holds two others."""
    shared: list[str] = []
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    return ".".join(shared)


_CUTS = frozenset({"aten.slice", "aten.select", "aten.narrow", "aten.split", "aten.split_with_sizes", "aten.unbind"})


def uncut(weights: set[int], made: dict[int, Operation]) -> set[int]:
    """Weights and views of them, without pieces: which piece is taken may be what is wrong."""
    return {number for number in weights if number not in made or made[number].name not in _CUTS}


def producers(trace: Trace) -> dict[int, Operation]:
    """Number of a value → the first operation that made it of other ones."""
    found: dict[int, Operation] = {}
    for operation in trace.operations:
        for number in operation.outputs:
            if number is not None and number not in operation.inputs:
                found.setdefault(number, operation)
    return found


def made_of(number: int, made: Mapping[int, Operation], passes: Callable[[Operation], bool]) -> int:
    """What a value was before the operations that are passed, along the first value that each reads.

    A value that is put into another shape and back again has one number, and is made of itself: there the way ends.
    """
    seen = set[int]()
    while number not in seen and number in made and made[number].inputs and passes(made[number]):
        seen.add(number)
        number = made[number].inputs[0]
    return number


@dataclass(frozen=True)
class Walk:
    """The way back from a value to values that the other side knows."""

    frontier: list[Operation]
    """The operations that made unknown values out of known ones."""
    visited: list[Operation]
    """All operations on the way, in order."""


def walk(made: dict[int, Operation], start: int, known: set[int]) -> Walk:
    """The way back from a value.

    Receives:
        made: from `producers`.
        start: the number of the value.
        known: where to stop.
    """
    if start in known:
        return Walk([], [])
    frontier: dict[int, Operation] = {}
    visited: dict[int, Operation] = {}
    waiting, seen = [start], {start}
    while waiting:
        operation = made.get(waiting.pop())
        if operation is None:
            continue
        visited[operation.index] = operation
        # A constant that nobody makes, as a tensor in an attribute, is where a way starts.
        unknown = [number for number in operation.inputs if number not in known and number in made]
        if not unknown:
            frontier[operation.index] = operation
        for number in unknown:
            if number not in seen:
                seen.add(number)
                waiting.append(number)
    return Walk([frontier[i] for i in sorted(frontier)], [visited[i] for i in sorted(visited)])


_SHAPES = frozenset(
    {"view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "transpose", "permute", "clone", "slice"}
)


def gives_shape(operation: Operation) -> bool:
    """Whether an operation computes nothing, and gives values another shape or order, or repeats them."""
    return operation.is_view or operation.name.removeprefix("aten.").split(" ")[-1] in _SHAPES


def passes_on(here: Walk, there: Walk) -> int | None:
    """The one value that the port only takes a view of, where upstream computes something with it first."""
    read = {number for operation in here.frontier for number in operation.inputs}
    if len(read) != 1 or not all(operation.is_view for operation in here.visited):
        return None
    works = any(not op.is_view and read & set(op.inputs) for op in there.frontier)
    return next(iter(read)) if works else None


def only_lacks(here: Walk, there: Walk) -> bool:
    """Whether the port does nothing that upstream does not do as well: else it computes in a way of its own."""
    ours, theirs = (
        Counter(op.name for op in side.visited if op.name.removeprefix("aten.") not in _SHAPES)
        for side in (here, there)
    )
    return ours <= theirs
