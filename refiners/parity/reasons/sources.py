"""Changes of what an operation reads: a residual from before another one, other rows of a table, another order."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from refiners.parity.operations import Operation
from refiners.parity.reasons import flow, unlike
from refiners.parity.reasons.candidates import UNKNOWN, Candidate, groups, name_of_value
from refiners.parity.reasons.replay import Edit, Program, is_close, with_arguments, with_scalar
from refiners.parity.reasons.trial import Making, Trial
from refiners.parity.reasons.ways import made_of

DEEPEST = 2
MOST_WINDOWS = 3
"""Pieces cut at one line that may all begin elsewhere."""
SHIFTS = (-2, -1, 0, 1, 2)


def residuals(port: Program, upstream: Program) -> Iterator[Candidate]:
    """An addition takes what its operand was made of: a residual from before it, not from behind."""
    ways = [way for depth in range(1, DEEPEST + 1) for way in itertools.product((0, 1), repeat=depth)]
    for group in groups(port):
        for place, way in itertools.product((0, 1), ways if all(map(flow.is_residual, group)) else ()):
            found = {op.index: _source(port, upstream, op.inputs[place], way) for op in group}
            numbers = [number for number in found.values() if number is not None]
            if len(numbers) == len(group):
                right = name_of_value(port, numbers[0], 2)
                right = name_of_value(upstream, numbers[0], 2) if right == UNKNOWN else right
                here = name_of_value(port, group[0].inputs[place], 2)
                text = f"when `{flow.name_of(group[0])}` at {group[0].source} takes {right}, not {here}"
                making = _reading(place, dict(zip(found, numbers, strict=True)))
                yield Candidate(text, making, (str(group[0].source), place))


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


def _reading(place: int, numbers: dict[int, int]) -> Making:
    def making(port: Program, upstream: Program) -> Edit:
        known = {**upstream.values, **port.values}

        def read(number: int) -> Callable[[Tensor], Tensor]:
            return lambda value: known[number].reshape(value.shape)

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


def _orders(value: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    size, rows = value.shape[-1], value.shape[-2]
    if size % 2 == 0:
        yield "the two halves of the last axis are exchanged", _halves
        yield "neighbours of the last axis stand in halves", lambda x: _apart(x, 2)
        yield "the halves of the last axis stand side by side", lambda x: _apart(x, size // 2)
    if size % 4 == 0:
        yield (
            "the halves of each half of the last axis are exchanged",
            lambda x: _halves(torch.unflatten(x, -1, (2, -1))).flatten(-2),
        )
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
