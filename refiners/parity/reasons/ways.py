"""The way back from a value, through the operations that made it, to values that the other side knows too."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

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


def counterpart(path: str, pairing: Mapping[str, str]) -> str:
    """The innermost node of the port that holds all leaves which stand for those of a module of upstream.

    Receives:
        path: of the module.
        pairing: path of a leaf of the port → path of the leaf of upstream.
    """
    inside = [ours for ours, other in pairing.items() if path and other.startswith(f"{path}.")]
    return reduce(common_path, inside) if len(inside) > 1 else ""


_CUTS = frozenset({"aten.slice", "aten.select", "aten.narrow", "aten.split", "aten.split_with_sizes", "aten.unbind"})


def uncut(weights: set[int], made: dict[int, Operation]) -> set[int]:
    """Weights and views of them, without pieces: which piece is taken may be what is wrong."""
    return {number for number in weights if number not in made or made[number].name not in _CUTS}


def producers(trace: Trace) -> dict[int, Operation]:
    """Number of a value → the first operation that made it of other ones."""
    return made_by(trace.operations)


def made_by(operations: Sequence[Operation]) -> dict[int, Operation]:
    """The same of some operations, in order."""
    found: dict[int, Operation] = {}
    for operation in operations:
        for number in operation.outputs:
            if number is not None and number not in operation.inputs:
                found.setdefault(number, operation)
    return found


def moved_from(number: int, made: Mapping[int, Operation]) -> Iterator[int]:
    """A value, and what it was before it was put into that shape and order, back to the operation that computed it."""
    seen = set[int]()
    while number not in seen:
        yield number
        seen.add(number)
        operation = made.get(number)
        if operation is not None and len(operation.inputs) == 1 and gives_shape(operation):
            number = operation.inputs[0]


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


def walk(
    made: dict[int, Operation], start: int, known: set[int], operations: Sequence[Operation] = (), maker: int = -1
) -> Walk:
    """The way back from a value.

    Receives:
        made: from `producers`.
        start: the number of the value.
        known: where to stop.
        operations: of the trace. Of several that made one value, as each layer its table of positions, the one that
            really returned what is read is taken then.
        maker: the index of the one that returned the value; -1 where that is not known.
    """
    if start in known:
        return Walk([], [])
    frontier: dict[int, Operation] = {}
    visited: dict[int, Operation] = {}
    waiting = [(start, maker)]
    while waiting:
        number, index = waiting.pop()
        operation = _maker(number, index, operations) or made.get(number)
        if operation is None or operation.index in visited:
            continue
        visited[operation.index] = operation
        # A constant that nobody makes, as a tensor in an attribute, is where a way starts.
        makers = operation.makers or (-1,) * len(operation.inputs)
        unknown = [
            pair for pair in zip(operation.inputs, makers, strict=False) if pair[0] not in known and pair[0] in made
        ]
        if not unknown:
            frontier[operation.index] = operation
        waiting += unknown
    return Walk([frontier[i] for i in sorted(frontier)], [visited[i] for i in sorted(visited)])


def maker_at(trace: Trace, path: str, count: int, number: int) -> int:
    """The index of the operation that returned what a module receives when it has run so often; -1 if not known."""
    calls = [call for call in trace.calls if call.path == path]
    given = calls[count] if count < len(calls) else None
    return dict(zip(given.inputs, given.makers, strict=False)).get(number, -1) if given else -1


def _maker(number: int, index: int, operations: Sequence[Operation]) -> Operation | None:
    """The operation that made a value, from the one that returned it: it may have given back what it was given."""
    seen = set[int]()
    while 0 <= index < len(operations) and index not in seen:
        seen.add(index)
        operation = operations[index]
        if number not in operation.inputs:
            return operation if number in operation.outputs else None
        makers = operation.makers or (-1,) * len(operation.inputs)
        index = dict(zip(operation.inputs, makers, strict=False)).get(number, -1)
    return None


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


_Operations = tuple[Operation, ...]


def first_unlike(theirs: Sequence[Operation], ours: Sequence[Operation]) -> tuple[_Operations, _Operations]:
    """The first operations of two sides that differ, else the last ones."""
    for a, b in zip(theirs, ours, strict=False):
        if a.name != b.name or a.arguments != b.arguments or a.outputs != b.outputs:
            return (a,), (b,)
    return tuple(theirs[-1:]), tuple(ours[-1:])
