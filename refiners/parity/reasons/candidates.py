"""Single changes of a program, one of which may be what is wrong with it.

Each is a text that completes "equal …", an edit, and what it is of: two changes of one thing are one cause. Nothing
here knows whether a change is right: that is tried (`refiners.parity.reasons.trial`).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refiners.parity.operations import Operation, tensors_in
from refiners.parity.reasons import flow, orders, unlike
from refiners.parity.reasons.replay import (
    HUGE,
    Change,
    Edit,
    Program,
    as_it_is,
    left_out,
    scalars,
    shaped_as,
    with_arguments,
    with_scalar,
)
from refiners.parity.reasons.trial import Making
from refiners.parity.reasons.ways import made_of

NUMBERS = (1e4, 1e5, 5e5, 1e6, 1e3, 5e3, 0.5, 1.0, 2.0, 0.0, 1e-5, 1e-6, 1e-8, 1e-12, 1e-3)
DEEPEST = 4
MOST_TRIED = 600
MOST_LEAVES = 8
MOST_NUMBERS = 4
EXTRA = " (a residual too much)"
UNKNOWN = "a value"
"""Of what has no name."""


_JOINS_AXES = frozenset(
    f"aten.{name}" for name in ("mul", "add", "bitwise_and", "bitwise_or", "logical_and", "logical_or")
)
_OTHER_BOUND = {"aten.lt": "le", "aten.le": "lt", "aten.gt": "ge", "aten.ge": "gt"}


@dataclass(frozen=True)
class Candidate:
    """A change."""

    text: str
    making: Making
    key: object
    """Of all that hold with one key the first is told."""


def exchanged(port: Program) -> Iterator[Candidate]:
    """Two values stand in each other's place: of those that the port starts from, or that it makes of one value."""
    leaves = sorted(number for number in port.leaves() if port.values[number].is_floating_point())[:MOST_LEAVES]
    for a, b in (*itertools.combinations(leaves, 2), *_twins(port)):
        if port.values[a].shape == port.values[b].shape and port.root not in (a, b):
            text = f"when {name_of_value(port, a)} and {name_of_value(port, b)} are exchanged"
            yield Candidate(text, _exchange(a, b), (a, b))


def _twins(program: Program) -> Iterator[tuple[int, int]]:
    """Values that two operations make of the same ones, as a sine and a cosine."""
    makers: dict[tuple[int, ...], list[int]] = {}
    for number, (operation, _) in program.made.items():
        if len(operation.inputs) == 1 and not unlike.is_move(operation) and program.values[number].is_floating_point():
            makers.setdefault(operation.inputs, []).append(number)
    for numbers in makers.values():
        yield from itertools.combinations(numbers[:2], 2)


def _exchange(a: int, b: int) -> Making:
    def making(port: Program, upstream: Program) -> Edit:
        first, second = port.values[a], port.values[b]
        return Edit(values={a: lambda _: second, b: lambda _: first})

    return making


def put(pairs: Sequence[tuple[int, int]]) -> Making:
    """Values of upstream's in the place of values of the port's."""

    def making(port: Program, upstream: Program) -> Edit:
        right = {a: shaped_as(upstream.values[b], port.values[a]) for a, b in pairs}
        return Edit(values={a: lambda _, value=value: value for a, value in right.items()})

    return making


def changed(program: Program, numbers: set[bool | int | float]) -> Iterator[Candidate]:
    """Another number or flag, or an operation less.

    Receives:
        program: to change.
        numbers: that are tried as well.
    """
    yield from _reduced(program, numbers)
    tried = 0
    for group in groups(program):
        operation = group[0]
        at = f"{operation.source}"
        if operation.inputs and not unlike.is_move(operation):
            text = orders.taken_behind(program, operation) if len(group) == 1 else ""
            text = text or f"without {flow.told(operation)} at {at}{residual(group, 'a residual too much')}"
            yield Candidate(text, everywhere(group, left_out), (operation.name, at, len(group)))
        for path, value, new in _scalars(operation, numbers):
            tried += 1
            if tried > MOST_TRIED:
                return
            name = _argument_of(operation, path)
            text = f"when in `{flow.name_of(operation)}` at {at} {name} is {flow.number(new)}, not {flow.number(value)}"
            yield Candidate(text, everywhere(group, with_value(path, new)), (operation.name, at, path))


def outer(program: Program) -> Iterator[Candidate]:
    """An operation less of those that join two values along axes that one of them lacks, as masks."""
    for group in groups(program):
        first = group[0]
        if first.name not in _JOINS_AXES or len(first.inputs) != 2 or first.outputs[0] is None:
            continue
        size = program.values[first.outputs[0]].numel()
        for place in range(2) if all(program.values[number].numel() < size for number in first.inputs) else ():
            text = f"without {flow.told(first)} at {first.source}"
            yield Candidate(text, everywhere(group, _repeated(place)), (first.name, str(first.source), len(group)))


def _repeated(place: int) -> Change:
    """One of the values alone, for each entry of the axes that the other one has."""

    def change(operation: Operation, given: list[Tensor]) -> Tensor:
        return given[place].expand(tensors_in(as_it_is(operation, given))[0].shape)

    return change


def tiled(program: Program) -> Iterator[Candidate]:
    """Heads that are repeated all together should be repeated one by one: groups of queries share a key."""
    tiled = [op for op in program.operations if op.name == "aten.repeat" and sum(n > 1 for n in op.template[0][1]) == 1]
    if not tiled:
        return
    repeats: list[int] = tiled[0].template[0][1]
    axis = next(axis for axis, count in enumerate(repeats) if count > 1)

    def one_by_one(operation: Operation, given: list[Tensor]) -> Tensor:
        return given[0].repeat_interleave(repeats[axis], dim=axis - len(repeats) + given[0].ndim)

    same = [operation for operation in tiled if operation.template[0][1] == repeats]
    text = (
        f"when in `repeat` at {tiled[0].source} each entry of axis {axis} is repeated by itself, as 0 0 1 1 "
        "(`repeat_interleave`): here all of them are in turn, as 0 1 0 1"
    )
    yield Candidate(text, everywhere(same, one_by_one), (tiled[0].name, axis))


def _reduced(program: Program, numbers: set[bool | int | float]) -> Iterator[Candidate]:
    """A mean is of another number of values: of each head by itself, or of all heads together."""
    sizes = {number for number in numbers if type(number) is int}
    for group in groups(program):
        first, arguments = group[0], group[0].template[0]
        if first.name != "aten.mean" or len(arguments) < 3 or not arguments[2] or len(arguments[1]) != 1:
            continue
        shape = first.tensors[0][1]
        axis = arguments[1][0] % len(shape)
        if axis != len(shape) - 1:
            continue
        text = f"when in `mean` at {first.source} the mean is of {{}} values, not of {shape[-1]}: {{}}"
        for other in range(1, len(shape) - 1):
            told = text.format(shape[other] * shape[-1], f"axes {other} and {axis} together, as all heads")
            axes = with_value((0, 1), [other, axis])
            yield Candidate(told, everywhere(group, axes), (first.name, str(first.source), other))
        for size in sorted(one for one in sizes if 1 < one < shape[-1] and shape[-1] % one == 0):
            told = text.format(size, "each part of the last axis by itself, as head by head")
            yield Candidate(told, everywhere(group, _in_parts(size)), (first.name, str(first.source), -size))


def _in_parts(size: int) -> Change:
    def change(operation: Operation, given: list[Tensor]) -> Tensor:
        parts = given[0].reshape(*given[0].shape[:-1], -1, size)
        return parts.mean(-1).repeat_interleave(size, dim=-1)

    return change


def bounds(program: Program) -> Iterator[Candidate]:
    """A comparison lets its limit in where it should not, or leaves it out: a window that is one too wide."""
    for group in groups(program):
        other = _OTHER_BOUND.get(group[0].name)
        if other is not None:
            at = f"{group[0].source}"
            text = f"when `{other}` is in the place of `{flow.name_of(group[0])}` at {at}, which is off by one"
            yield Candidate(text, everywhere(group, _compared_by(other)), (other, at))


def _compared_by(name: str) -> Change:
    def change(operation: Operation, given: list[Tensor]) -> object:
        function = getattr(getattr(torch.ops.aten, name), operation.function._overloadname)
        return with_arguments(replace(operation, function=function), operation.template, given)

    return change


def residual(operations: Sequence[Operation], what: str) -> str:
    """Says so where an operation adds two values of one shape."""
    return f" ({what})" if any(map(flow.is_residual, operations)) else ""


def with_value(path: tuple[object, ...], new: object) -> Change:
    """Another value of an argument that is no tensor, at a path in the template."""

    def change(operation: Operation, given: list[Tensor]) -> object:
        return with_arguments(operation, with_scalar(operation.template, path, new), given)

    return change


def groups(program: Program) -> Iterator[list[Operation]]:
    """Operations of one name at one line, which change together; then each by itself."""
    lines: dict[tuple[str, str], list[Operation]] = {}
    for operation in reversed(program.operations):
        lines.setdefault((operation.name, str(operation.source)), []).append(operation)
    yield from lines.values()
    yield from ([operation] for group in lines.values() if len(group) > 1 for operation in group)


def everywhere(group: Sequence[Operation], change: Change) -> Making:
    """One change at each of some operations."""
    return lambda port, upstream: Edit(changes={operation.index: change for operation in group})


def signs(program: Program, *, made: bool = False) -> Iterator[Candidate]:
    """Another mask, or a value of the other sign: of those that it starts from, or that it makes."""
    for number in program.made if made else sorted(program.leaves()):
        value, name = program.values[number], name_of_value(program, number)
        if value.dtype == torch.bool and value.ndim > 1:
            for words, change in _MASKS.items():
                yield Candidate(f"when the mask {name} {words}", _to_value(number, change), number)
        is_difference = number in program.made and program.made[number][0].name == "aten.sub"
        is_signed = value.is_floating_point() and not bool((value.abs() >= HUGE).any())
        if value.numel() > 1 and (is_signed or (is_difference and value.dtype != torch.bool)):
            yield Candidate(f"when {name} is of the other sign", _to_value(number, Tensor.neg), number)


def _to_value(number: int, change: Callable[[Tensor], Tensor]) -> Making:
    return lambda port, upstream: Edit(values={number: change})


_MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "is causal: a position sees itself and those before it": lambda mask: torch.ones_like(mask).tril(),
    "hides from a position what comes after it, and nothing else": lambda mask: torch.ones_like(mask).triu(1),
    "is inverted": lambda mask: ~mask,
    "is transposed": lambda mask: mask.transpose(-1, -2),
    "hides nothing": torch.ones_like,
}


def _scalars(
    operation: Operation, numbers: set[bool | int | float]
) -> Iterator[tuple[tuple[object, ...], object, object]]:
    if "as_strided" in operation.name:
        return  # it reads wherever it is told
    for path, value in scalars(operation.template):
        for new in _others(value, numbers):
            yield path, value, new
    names = {argument.name for argument in operation.function._schema.arguments}
    if operation.name.startswith("aten._scaled_dot_product") or operation.name == "aten.scaled_dot_product_attention":
        size = operation.tensors[0][1][-1]
        given = operation.template[1]
        for scale in (size**-0.5, 1.0, 1.0 / size, (size * operation.tensors[0][1][1]) ** -0.5):
            if "scale" in names and given.get("scale") != scale:
                yield (1, "scale"), given.get("scale"), scale


def _others(value: object, numbers: set[bool | int | float]) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        near = [value + 1, value - 1, -value, -1, -2, *(n for n in numbers if type(n) is int)]
        return [n for n in dict.fromkeys(near) if n != value]
    assert isinstance(value, float)
    known = [
        *(n for n in numbers if isinstance(n, float)),
        *(n for n in NUMBERS if _is_near(n, value)),
        *(math.log(n) for n in (1e4, 1e5, 1e3) if abs(value) > 5),
        1 / value if value else 1.0,
    ]
    return [n for n in dict.fromkeys([-value, *known, *(-n for n in known)]) if n != value]


def _is_near(number: float, value: float) -> bool:
    """Whether one may stand for the other: a base for a base, an eps for an eps."""
    if number >= 100:
        return abs(value) >= 100
    return abs(value) < 0.1 if 0 < number < 0.1 else True


def _argument_of(operation: Operation, path: tuple[object, ...]) -> str:
    first, second, *rest = path
    if first == 1:
        return f"`{second}`"
    names = [argument.name for argument in operation.function._schema.arguments]
    assert isinstance(second, int)
    return f"`{names[second]}[{rest[0]}]`" if rest else f"`{names[second]}`"


# Tables of angles


def bases(port: Program, upstream: Program) -> Iterator[Candidate]:
    """The base of rotary positions or sinusoids, read from the frequencies of both sides."""
    ours, theirs = _bases(port), _bases(upstream)
    for (here, given), (there, right) in itertools.product(ours.items(), theirs.items()):
        if given != right and port.values[here].numel() == upstream.values[there].numel():
            text = f"when the base of the frequencies is {right:g}: here it is {given:g}"
            if not _has_base(port, given) and _has_base(port, right):
                ratio = math.log(right) / math.log(given)
                text = (
                    f"when the exponents of the frequencies are times {ratio:g}: both sides have the base {right:g}, "
                    "and divide by another size"
                )
            yield Candidate(text, put([(here, there)]), text)


def _has_base(program: Program, base: float) -> bool:
    """Whether a base, or its logarithm, is among the numbers of a program."""
    numbers = {abs(float(value)) for operation in program.operations for _, value in scalars(operation.template)}
    return not {f"{one:.3g}" for one in numbers}.isdisjoint(f"{one:.3g}" for one in (base, math.log(base)))


def _bases(program: Program) -> dict[int, float]:
    found = ((number, base_of(value)) for number, value in program.values.items())
    return {number: base for number, base in found if base is not None}


def base_of(values: Tensor) -> float | None:
    """The base b of frequencies b^(-i/n) for i from 0 to n - 1; None for values that are something else."""
    flat = values.squeeze()
    if not flat.is_floating_point() or flat.ndim != 1 or flat.numel() < 2 or float(flat[0]) != 1.0:
        return None
    ratio = flat[1:].to(torch.float64) / flat[:-1].to(torch.float64)
    if (
        not bool((ratio > 0).all())
        or bool((ratio >= 1).any())
        or float(ratio.max() - ratio.min()) > float(ratio[0]) / 1e5
    ):
        return None
    base = float(ratio[0]) ** -flat.numel()
    return float(f"{base:.4g}")


# Words


def name_of_value(program: Program, number: object, depth: int = DEEPEST) -> str:
    """A value of a program as an expression."""
    assert isinstance(number, int)
    found = program.made.get(number)
    if found is None and number in program.names:
        return f"`{program.names[number]}`"
    if found is None:
        before = _before_moves(program, number)
        if before in program.names:
            return f"`{program.names[before]}`"
        paths = {call.path for call in program.trace.calls if call.path}
        return flow.origin(program.trace, number, paths) or _constant(program, number)
    if depth == 0:
        return "…"
    operation = found[0]
    if unlike.is_move(operation) and operation.inputs:
        return name_of_value(program, operation.inputs[0], depth)
    inner = [_laid_out(program, operation, n) or name_of_value(program, n, depth - 1) for n in operation.inputs]
    return f"{flow.name_of(operation)}({', '.join([*inner, *_plain(operation)])})"


def _constant(program: Program, number: int) -> str:
    given = program.given.get(number)
    few = [] if given is None or given.numel() > MOST_NUMBERS else [round(float(n), 4) for n in given.flatten()]
    return f"the numbers {few}" if few else UNKNOWN


def _before_moves(program: Program, number: int) -> int:
    """What a value was before it was cut and put into shape."""
    return made_of(number, program.trace_made, lambda operation: operation.is_view and len(operation.inputs) == 1)


def _laid_out(program: Program, operation: Operation, number: int) -> str:
    """What an operation moves the axes of, if it was put into that shape just before."""
    made = program.made.get(number)
    if made is None or made[0].name != "aten.view" or operation.name not in ("aten.permute", "aten.transpose"):
        return ""
    return f"{name_of_value(program, made[0].inputs[0], 1)} in the shape {list(made[0].template[0][1])}"


def _plain(operation: Operation) -> Sequence[str]:
    return [flow.number(value) for _, value in scalars(operation.template)][:5]
