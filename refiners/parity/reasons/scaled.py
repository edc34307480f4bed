"""An addition on the wrong side of a multiplication: (a + b) · s for a · s + b, or the reverse.

As where a bias is added to scores that are scaled behind it, or a residual to what is scaled before it. Nothing is
moved to try it: b is read divided by s, or times s.
"""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from refiners.parity.operations import Operation
from refiners.parity.reasons import flow
from refiners.parity.reasons.candidates import Candidate, groups, name_of_value
from refiners.parity.reasons.replay import Edit, Program, scalars
from refiners.parity.reasons.trial import Making
from refiners.parity.reasons.unlike import is_move

DEEPEST = 3
"""Additions between the two."""

_Factor = Callable[[Program], float | Tensor]
_Way = tuple[Operation, _Factor, bool]
"""A multiplication, what it multiplies by, and whether it divides."""


def scaled(program: Program) -> Iterator[Candidate]:
    """What is added is scaled as well, or is not."""
    for group in groups(program):
        if group[0].name != "aten.add" or any(len(operation.inputs) != 2 for operation in group):
            continue
        for place in (1, 0):
            for by, words in ((_behind, "behind"), (_before, "before")):
                ways = [list(by(program, operation, place)) for operation in group]
                for some in zip(*ways, strict=False):
                    scale = some[0][0]
                    added = name_of_value(program, group[0].inputs[place], 1)
                    place_of = f"{words} `{flow.name_of(scale)}` at {scale.source}"
                    other = "before" if words == "behind" else "behind"
                    text = f"when {added} is added {place_of}, not {other} it (`add` at {group[0].source})"
                    reads = {
                        (operation.index, place): (factor, divides == (words == "before"))
                        for operation, (_, factor, divides) in zip(group, some, strict=True)
                    }
                    yield Candidate(text, _reading(reads), (str(group[0].source), place, words, scale.index))


def _reading(reads: dict[tuple[int, int], tuple[_Factor, bool]]) -> Making:
    def making(port: Program, upstream: Program) -> Edit:
        return Edit(reads={at: partial(_times, factor=factor(port), divides=by) for at, (factor, by) in reads.items()})

    return making


def _times(value: Tensor, *, factor: float | Tensor, divides: bool) -> Tensor:
    return value / factor if divides else value * factor


def _behind(program: Program, addition: Operation, place: int) -> Iterator[_Way]:
    """The multiplications behind an addition: in their place, it would not be scaled."""
    waiting = [(addition, 0)]
    while waiting:
        operation, depth = waiting.pop(0)
        for reader in program.operations if depth <= DEEPEST else ():
            if not set(reader.inputs) & set(operation.outputs):
                continue
            way = _scale(program, reader, set(operation.outputs))
            if way is not None:
                yield way
            elif is_move(reader) or reader.is_view or reader.name == "aten.add":
                waiting.append((reader, depth + (reader.name == "aten.add")))


def _before(program: Program, addition: Operation, place: int) -> Iterator[_Way]:
    """The multiplications before what something is added to: before them, it would be scaled too."""
    waiting = [(addition.inputs[1 - place], 0)]
    while waiting:
        number, depth = waiting.pop(0)
        if number not in program.made or depth > DEEPEST:
            continue
        operation = program.made[number][0]
        way = _scale(program, operation, None)
        if way is not None:
            yield way
        elif is_move(operation) or operation.is_view:
            waiting += [(one, depth) for one in operation.inputs[:1]]
        elif operation.name == "aten.add":
            waiting += [(one, depth + 1) for one in operation.inputs]


def _scale(program: Program, operation: Operation, scaled: set[int | None] | None) -> _Way | None:
    """What an operation multiplies or divides by, where it does; a tensor that is not what it scales."""
    if operation.name not in ("aten.mul", "aten.div"):
        return None
    divides = operation.name == "aten.div"
    if len(operation.inputs) == 1:
        found: list[float] = [value for _, value in scalars(operation.template) if not isinstance(value, bool)]
        return (operation, lambda _: found[0], divides) if len(found) == 1 and found[0] else None
    first, second = operation.inputs
    is_smaller = program.values[second].numel() > program.values[first].numel()
    swapped = is_smaller if scaled is None else second in scaled
    if divides and swapped:
        return None
    number = first if swapped else second
    return operation, lambda draw: draw.values[number], divides
