"""In words an operation at another place: behind another one, or on what a leaf returns, not on what it receives."""

from collections import Counter
from collections.abc import Callable, Iterator

from refiners.parity.operations import Operation
from refiners.parity.reasons import flow, unlike
from refiners.parity.reasons.replay import Program

_Next = Callable[[Operation], Iterator[Operation]]


def moved(port: Program, upstream: Program, ours: Operation, theirs: Operation) -> str:
    """That an operation comes before another one, where upstream's comes behind it, or the reverse; "" if neither.

    Receives:
        port, upstream: in which it stands.
        ours, theirs: the operation in each.
    """
    sides = (
        (_behind(port), _before(upstream), "behind", "before"),
        (_before(port), _behind(upstream), "before", "behind"),
    )
    for here, there, right, wrong in sides:
        names = {flow.name_of(one) for one in here(ours)}
        other = next((one for one in there(theirs) if flow.name_of(one) in names), None)
        if other is not None:
            place = f"{right} `{flow.name_of(other)}`, as upstream at {other.source}, not {wrong} it"
            return f"when `{flow.name_of(ours)}` at {ours.source} comes {place}"
    return _moved_far(port, upstream, ours, theirs)


def _moved_far(port: Program, upstream: Program, ours: Operation, theirs: Operation) -> str:
    """The same of an operation some steps away, if both sides do it once."""
    counts = [Counter(flow.name_of(one) for one in program.operations) for program in (port, upstream)]
    sides = (
        (_behind(port), _before(upstream), "behind", "before"),
        (_before(port), _behind(upstream), "before", "behind"),
    )
    for here, there, right, wrong in sides:
        names = {flow.name_of(one) for one in _reached(here, ours)}
        for other in _reached(there, theirs):
            name = flow.name_of(other)
            if name in names and all(count[name] == 1 for count in counts):
                place = f"{right} `{name}`, as upstream at {theirs.source}, not {wrong} it"
                return f"when `{flow.name_of(ours)}` at {ours.source} comes {place}"
    return ""


def _reached(step: _Next, start: Operation) -> list[Operation]:
    """All operations that steps lead to, the nearest first."""
    found: dict[int, Operation] = {}
    waiting = [start]
    while waiting:
        for one in step(waiting.pop(0)):
            if one.index not in found:
                found[one.index] = one
                waiting.append(one)
    return list(found.values())


def factor_of(operation: Operation) -> float | None:
    """The number that an operation multiplies by; None where it does not."""
    arguments = operation.template[0]
    number = arguments[1] if operation.name in ("aten.mul", "aten.div") and len(arguments) == 2 else None
    if isinstance(number, bool) or not isinstance(number, int | float) or not number:
        return None
    return number if operation.name == "aten.mul" else 1 / number


def _behind(program: Program) -> _Next:
    """What reads the result of an operation."""

    def readers(operation: Operation) -> Iterator[Operation]:
        for other in program.operations:
            if set(other.inputs) & set(operation.outputs):
                yield from readers(other) if _is_move(other) else (other,)

    return readers


def _before(program: Program) -> _Next:
    """What makes the values that an operation reads."""

    def makers(operation: Operation) -> Iterator[Operation]:
        for number in operation.inputs:
            if number in program.made:
                other = program.made[number][0]
                yield from makers(other) if _is_move(other) else (other,)

    return makers


def _is_move(operation: Operation) -> bool:
    return operation.is_view or unlike.is_move(operation)


def taken_behind(program: Program, operation: Operation) -> str:
    """That something takes what a leaf returns, and should take what it receives; "" if nothing else reads the leaf.

    Receives:
        program: that is right without the operation.
        operation: of the leaf.
    """
    number, trace = operation.outputs[0], program.trace
    leaf = next((call.path for call in trace.calls if call.path and number in call.outputs), "")
    inside = {one.index for one in program.operations}
    readers = [one for one in trace.operations if number in one.inputs]
    reader = next(_behind(program)(operation), None)
    if not leaf or reader is None or all(one.index in inside for one in readers):
        return ""
    before = flow.origin(trace, operation.inputs[0], {call.path for call in trace.calls if call.path})
    right = before or f"what `{leaf}` receives"
    return f"when `{flow.name_of(reader)}` at {reader.source} takes {right}, not what `{leaf}` returns"
