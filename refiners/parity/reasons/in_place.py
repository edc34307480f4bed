"""In words what upstream's value in the place of the port's is, where that is all that is known."""

from collections.abc import Sequence

from refiners.parity.fingerprint import Sketch
from refiners.parity.operations import Operation
from refiners.parity.reasons import flow, turning, unlike
from refiners.parity.reasons.candidates import name_of_value
from refiners.parity.reasons.mending import is_alike
from refiners.parity.reasons.replay import Program, is_same, scalars
from refiners.parity.reasons.sources import reordered
from refiners.parity.reasons.trial import Trial

LONGEST = 8
"""Operations of an expression that is told."""


def not_given(trial: Trial, pairs: Sequence[tuple[int, int]]) -> str:
    """The one tensor that upstream gives to an operation, and the port, which gives all others, does not."""
    for here, there in pairs:
        ours, theirs = trial.port.made.get(here), trial.upstream.made.get(there)
        if ours and theirs and _inputs_are_alike(trial, ours[0], theirs[0]):
            told = flow.not_given(ours[0], theirs[0])
            if told:
                return told
    return ""


def instead_of_line(trial: Trial, pairs: Sequence[tuple[int, int]]) -> str:
    """In words what one line makes, or a value that a program starts from."""
    parts = [(trial.port.part(a), trial.upstream.part(b)) for a, b in pairs]
    if len({(len(ours.operations), len(theirs.operations)) for ours, theirs in parts}) == 1:
        told = instead(trial, *pairs[0])
        if told:
            return told
    return turning.layouts(trial, pairs)


def instead(trial: Trial, here: int, there: int) -> str:
    """In words a value of upstream's in the place of one of the port's; "" where they would be too long."""
    port, upstream = trial.port, trial.upstream
    ours, theirs = port.part(here).operations, upstream.part(there).operations
    told = turning.layouts(trial, [(here, there)]) or reordered(trial, here, there)
    if told:
        return told
    is_whole = here == port.root and there == upstream.root and ours and theirs
    if is_whole and len(theirs) > 1 and len(ours) + len(theirs) > LONGEST // 2:
        return ""
    if _is_in_root(upstream.part(there)) and _is_in_root(port.part(here)) is False:
        return f"when eps is added before the root is taken, as upstream at {theirs[-1].source}, not behind it"
    source = f" (upstream at {theirs[-1].source})" if theirs else ""
    names = _on_the_way(upstream.part(there), port.sketches[here])
    if 0 < len(names) <= LONGEST:
        return f"when {name_of_value(port, here)} goes through upstream's {', '.join(names)} first{source}"
    if len(ours) > LONGEST or len(theirs) > LONGEST:
        return ""
    return f"when {name_of_value(upstream, there)}{source} is in the place of {name_of_value(port, here)}"


def _is_in_root(program: Program) -> bool | None:
    """Whether a small number is added before a root is taken, or behind it; None if neither, or both."""
    roots = ("aten.sqrt", "aten.rsqrt")
    small = [op for op in program.operations if op.name == "aten.add" and any(0 < v < 0.1 for v in _numbers(op))]
    inside = any(set(op.inputs) & set(one.outputs) for op in program.operations if op.name in roots for one in small)
    behind = any(set(op.outputs) & set(one.inputs) for op in program.operations if op.name in roots for one in small)
    return None if inside == behind else inside


def _numbers(operation: Operation) -> list[float]:
    return [value for _, value in scalars(operation.template) if isinstance(value, float)]


def _inputs_are_alike(trial: Trial, ours: Operation, theirs: Operation) -> bool:
    """Whether what the port gives to an operation is what upstream gives, as far as it gives any."""
    pairs = list(zip(ours.inputs, theirs.inputs, strict=False))
    known = all(a in trial.port.values and b in trial.upstream.values for a, b in pairs)
    return known and all(is_alike(trial, a, b) for a, b in pairs)


def _on_the_way(upstream: Program, start: tuple[int, Sketch]) -> list[str]:
    """The names of upstream's operations that a value goes through; nothing if upstream does not start from it."""
    reached = {number for number in upstream.leaves() if is_same(upstream.sketches[number], start)}
    names: list[str] = []
    for operation in upstream.operations:
        if reached.intersection(operation.inputs):
            reached.update(number for number in operation.outputs if number is not None)
            names += [] if unlike.is_move(operation) else [flow.name_of(operation)]
    return list(dict.fromkeys(names))
