"""Changes of what an operation reads: a residual from before another one, other rows of a table, another order."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from refiners.parity.operations import Operation
from refiners.parity.reasons import flow, unlike
from refiners.parity.reasons.axes import Order, orders
from refiners.parity.reasons.candidates import UNKNOWN, Candidate, groups, name_of_value
from refiners.parity.reasons.replay import Edit, Program, is_close, with_arguments, with_scalar
from refiners.parity.reasons.trial import Making, Trial
from refiners.parity.reasons.ways import gives_shape, made_of

DEEPEST = 2
_OF_TWO = frozenset({"aten.add", "aten.sub", "aten.mul", "aten.div", "aten.maximum", "aten.minimum"})
MOST_WINDOWS = 3
"""Pieces cut at one line that may all begin elsewhere."""
SHIFTS = (-2, -1, 0, 1, 2)


def residuals(port: Program, upstream: Program) -> Iterator[Candidate]:
    """An addition takes what its operand was made of: a residual from before it, not from behind."""
    ways = [way for depth in range(1, DEEPEST + 1) for way in itertools.product((0, 1), repeat=depth)]
    for group in groups(port):
        for place, way in itertools.product((0, 1), ways if all(map(flow.is_residual, group)) else ()):
            numbers = _from_before(port, upstream, group, place, way)
            if numbers:
                number = numbers[group[0].index]
                right = name_of_value(port, number, 2)
                right = name_of_value(upstream, number, 2) if right == UNKNOWN else right
                here = name_of_value(port, group[0].inputs[place], 2)
                text = f"when `{flow.name_of(group[0])}` at {group[0].source} takes {right}, not {here}"
                yield Candidate(text, _reading(place, numbers), (str(group[0].source), place))


def steps(port: Program, upstream: Program) -> Iterator[Candidate]:
    """A line takes what another one is given, not what that returns: a state that has not faded yet."""
    found: dict[tuple[str, ...], list[tuple[Operation, Operation]]] = {}
    for operation in port.operations:
        for place, number in enumerate(operation.inputs if operation.name in _OF_TWO else ()):
            maker = port.trace_made.get(number)
            if maker is not None and maker.name in _OF_TWO and len(maker.inputs) == 2:
                key = operation.name, str(operation.source), str(place), str(maker.source)
                found.setdefault(key, []).append((operation, maker))
    for (name, source, place, _), pairs in found.items():
        maker, group = pairs[0][1], [operation for operation, _ in pairs]
        for step, which in enumerate(("first", "second")):
            numbers = _from_before(port, upstream, group, int(place), (step,))
            here = f"`{flow.name_of(maker)}` at {maker.source}"
            text = f"when `{flow.name_of(group[0])}` at {source} takes the {which} tensor that {here} is given"
            if numbers:
                yield Candidate(f"{text}, not what that returns", _reading(int(place), numbers), (name, source, place))


def _from_before(
    port: Program, upstream: Program, group: Sequence[Operation], place: int, way: Sequence[int]
) -> dict[int, int]:
    """Index of each operation → the value that its operand was made of; nothing if that of one is not at hand."""
    found = {op.index: _source(port, upstream, op.inputs[place], way) for op in group}
    numbers = {index: number for index, number in found.items() if number is not None}
    return numbers if len(numbers) == len(found) else {}


def readings(port: Program, upstream: Program) -> Iterator[Candidate]:
    """A line reads a value that upstream has at another place: what one bias was added to, where another one belongs.

    Where one side has the moments first and the other one the batch, both values are in another order.
    """
    for group in groups(port):
        for place, number in enumerate(group[0].inputs):
            source = made_of(number, port.trace_made, gives_shape)
            is_known = number not in port.made and source in port.trace_made and number in upstream.trace_made
            if not is_known or any(op.inputs[place] != number for op in group):
                continue
            for other, (made, _) in upstream.made.items():
                if made.name == port.trace_made[source].name and other not in port.values:
                    yield from _read_instead(port, upstream, group, place, (source, other))


def _read_instead(
    port: Program, upstream: Program, group: Sequence[Operation], place: int, values: tuple[int, int]
) -> Iterator[Candidate]:
    source, other = values
    here, there = port.values[group[0].inputs[place]], upstream.values[other]
    if here.numel() != there.numel() or not there.is_floating_point():
        return
    wrong = flow.origin(port.trace, source, {call.path for call in port.trace.calls if call.path})
    right = name_of_value(upstream, other, 2)
    text = f"when `{flow.name_of(group[0])}` at {group[0].source} reads {right}, not {wrong}"
    plain = Order(tuple(there.shape), tuple(range(there.ndim)))
    for order in (plain, *orders(there.shape, here.shape)):
        yield Candidate(text, _reading(place, dict.fromkeys((op.index for op in group), other), order), (text, place))


def _source(port: Program, upstream: Program, operand: int, way: Sequence[int]) -> int | None:
    """The value that an operand was made of, some operations back; None where there is none of its size at hand."""
    number, made = operand, port.trace_made
    for step in way:
        number = made_of(number, made, unlike.is_move)
        if number not in made or step >= len(made[number].inputs):
            return None
        number = made[number].inputs[step]
    known = {**upstream.values, **port.values}
    return number if number in known and known[number].numel() == known[operand].numel() else None


def _reading(place: int, numbers: dict[int, int], order: Order | None = None) -> Making:
    def making(port: Program, upstream: Program) -> Edit:
        known = {**upstream.values, **port.values}

        def read(number: int) -> Callable[[Tensor], Tensor]:
            moved = Tensor.reshape if order is None else order.of
            return lambda value: moved(known[number], value.shape)

        return Edit(reads={(index, place): read(number) for index, number in numbers.items()})

    return making


def cuts(program: Program) -> Iterator[Candidate]:
    """An axis that holds several things is cut in another order, as queries, keys and values of all heads."""
    for operation in program.operations:
        if operation.name not in ("aten.view", "aten._unsafe_view") or operation.outputs[0] is None:
            continue
        joined, shape = program.values[operation.inputs[0]], program.values[operation.outputs[0]].shape
        count = next((n for n in range(3, len(shape)) if joined.ndim and math.prod(shape[-n:]) == joined.shape[-1]), 0)
        for place in range(count - 1):
            held = list(shape[-count:])
            right = [*held[:place], held[place + 1], held[place], *held[place + 2 :]]
            if 1 not in held[place : place + 2]:
                what = f"the last axis of {name_of_value(program, operation.inputs[0], 1)} is cut"
                apart = f"{right}, not as {held}"
                alike = f"{held} with axes {place + 1} and {place + 2} exchanged"
                told = f"{apart if right != held else alike}{_of_heads(right, place)}"
                text = f"when in `view` at {operation.source} {what} as {told}"
                change = partial(_cut, right=right, axis=place - count)
                yield Candidate(text, _read(operation.index, change), (str(operation.source), place))


def reversed_pieces(program: Program) -> Iterator[Candidate]:
    """Three values or more that one line cuts off are taken from the last to the first."""
    lines: dict[tuple[str, str, torch.Size], list[int]] = {}
    for number in program.values:
        made = program.trace_made.get(number)
        if made is not None and made.name in ("aten.slice", "aten.select"):
            lines.setdefault((made.name, str(made.source), program.values[number].shape), []).append(number)
    for (name, source, _), numbers in lines.items():
        pieces = sorted(numbers, key=lambda number: program.trace_made[number].index)
        if len(pieces) > 2:
            what = f"the {len(pieces)} pieces that `{name.removeprefix('aten.')}` at {source} returns"
            making = _put_for(dict(zip(pieces, pieces[::-1], strict=True)))
            yield Candidate(f"when {what} are taken from the last to the first", making, source)


def _put_for(numbers: dict[int, int]) -> Making:
    """Values of the port in the place of others."""

    def making(port: Program, upstream: Program) -> Edit:
        values = {a: port.values[b] for a, b in numbers.items()}
        return Edit(values={a: lambda _, value=value: value for a, value in values.items()})

    return making


def _of_heads(right: Sequence[int], place: int) -> str:
    if 3 not in right[place : place + 2]:
        return ""
    words = "one behind another", "head by head"
    if right[place] == right[place + 1]:
        return f" (queries, keys and values {words[0]} for {words[1]}, or the reverse)"
    right_words, held_words = words if right[place] == 3 else words[::-1]
    return f" (queries, keys and values {right_words}, not {held_words})"


def _cut(x: Tensor, *, right: list[int], axis: int) -> Tensor:
    return torch.unflatten(x, -1, right).transpose(axis, axis + 1).flatten(-len(right)).contiguous()


def _read(index: int, change: Callable[[Tensor], Tensor]) -> Making:
    return lambda port, upstream: Edit(reads={(index, 0): change})


def windows(program: Program) -> Iterator[Candidate]:
    """Pieces that are cut at one line begin and end some elements further, along each axis."""
    for group in groups(program):
        if len(group) > MOST_WINDOWS or not all(map(_is_piece, group)):
            continue
        for shifts in itertools.product(SHIFTS, repeat=len(group)):
            ends = [(op.template[0][2] + by, op.template[0][3] + by) for op, by in zip(group, shifts, strict=True)]
            if not any(shifts) or any(start < 0 for start, _ in ends):
                continue
            words = [
                f"`start` is {start}, not {op.template[0][2]} (axis {op.template[0][1]})"
                for op, by, (start, _) in zip(group, shifts, ends, strict=True)
                if by
            ]
            text = f"when in `slice` at {group[0].source} {' and '.join(words)}"
            yield Candidate(text, _cutting(dict(zip((op.index for op in group), ends, strict=True))), text)


def _is_piece(operation: Operation) -> bool:
    arguments = operation.template[0]
    return operation.name == "aten.slice" and len(arguments) > 3 and all(type(n) is int for n in arguments[2:4])


def _cutting(ends: dict[int, tuple[int, int]]) -> Making:
    def change(operation: Operation, given: list[Tensor]) -> object:
        start, end = ends[operation.index]
        template = with_scalar(with_scalar(operation.template, (0, 2), start), (0, 3), end)
        return with_arguments(operation, template, given)

    return lambda port, upstream: Edit(changes=dict.fromkeys(ends, change))


def reordered(trial: Trial, here: int, there: int) -> str:
    """That a value of the port holds upstream's elements in another order, in words; "" if it does not."""
    held, right = trial.port.values[here], trial.upstream.values[there]
    if held.numel() != right.numel() or not held.is_floating_point() or held.ndim < 2:
        return ""
    part = trial.part(here, there)
    for words, change in _orders(held):
        if is_close(change(held), right) and part.holds(_made(here, change)):
            return f"when in {name_of_value(trial.port, here)} {words}"
    return ""


def _made(number: int, change: Callable[[Tensor], Tensor]) -> Making:
    return lambda port, upstream: Edit(values={number: change})


def rearrangements(value: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Other orders of the last axis of a value, in words."""
    size = value.shape[-1]
    if size % 2 == 0:
        yield "the two halves of the last axis are exchanged", _halves
        yield "neighbours of the last axis stand in halves", lambda x: _apart(x, 2)
        yield "the halves of the last axis stand side by side", lambda x: _apart(x, size // 2)
    if size % 4 == 0:
        yield (
            "the halves of each half of the last axis are exchanged",
            lambda x: _halves(torch.unflatten(x, -1, (2, -1))).flatten(-2),
        )


def _orders(value: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The same, and of the rows."""
    size, rows = value.shape[-1], value.shape[-2]
    yield from rearrangements(value)
    for height in (n for n in range(2, rows) if rows % n == 0):
        words = f"rows of {rows // height} places stand as columns"
        yield words, lambda x, h=height: torch.unflatten(x, -2, (h, -1)).transpose(-2, -3).flatten(-3, -2)
    yield "the last axis is reversed", lambda x: x.flip(-1)
    yield "the rows are reversed", lambda x: x.flip(-2)
    if rows == size:
        yield "rows and columns are exchanged", lambda x: x.transpose(-1, -2)


def _halves(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, -1)[::-1], -1)


def _apart(x: Tensor, count: int) -> Tensor:
    """Every so many elements of the last axis side by side."""
    return torch.unflatten(x, -1, (-1, count)).transpose(-1, -2).flatten(-2)
