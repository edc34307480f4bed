"""Masks that hide a position from itself, where upstream's do not: a token that is padding sees itself there."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from refiners.parity.operations import Operation
from refiners.parity.reasons import flow
from refiners.parity.reasons.candidates import Candidate, groups
from refiners.parity.reasons.replay import HUGE, Edit, Program
from refiners.parity.reasons.trial import Making


def diagonals(program: Program) -> Iterator[Candidate]:
    """No position is hidden from itself by a mask of squares."""
    for group in groups(program):
        place = _place_of_mask(program, group[0])
        size = _size(group[0])
        if place is None or size is None or any(_size(operation) != size for operation in group):
            continue
        text = f"when the mask of `{flow.name_of(group[0])}` at {group[0].source} hides no position from itself"
        making = _with_diagonal(group, place, size, _seen(program, group[0], place))
        yield Candidate(text, making, (str(group[0].source), place))


def _place_of_mask(program: Program, operation: Operation) -> int | None:
    """Which of its tensors is a mask over scores; None if none is."""
    given = [program.values[number] for number in operation.inputs]
    place = None
    match operation.name:
        case "aten.masked_fill":
            place = 1
        case "aten.where":
            place = 0 if any(map(_is_huge, given[1:])) else None
        case "aten.add" | "aten.sub":
            place = 1 if any(map(_is_huge, given[1:])) else None
        case name:
            place = 3 if "scaled_dot_product" in name else None
    return place if place is not None and len(given) > place and given[place].ndim > 1 else None


def _size(operation: Operation) -> int | None:
    """How many positions see as many; None where they see others."""
    shapes = [shape for _, shape in operation.tensors]
    if "scaled_dot_product" in operation.name:
        seen = shapes[0][-2], shapes[1][-2]
    else:
        ends = [(1, *shape)[-2:] for shape in shapes if shape]
        seen = max((a for a, _ in ends), default=0), max((b for _, b in ends), default=1)
    return seen[0] if seen[0] == seen[1] > 1 else None


def _seen(program: Program, operation: Operation, place: int) -> bool | float:
    """What stands in the mask where a position is seen."""
    if program.values[operation.inputs[place]].dtype != torch.bool:
        return 0.0
    return operation.name == "aten.where" and not _is_huge(program.values[operation.inputs[1]])


def _is_huge(value: Tensor) -> bool:
    return value.is_floating_point() and bool((value.abs() >= HUGE).any())


def _with_diagonal(group: list[Operation], place: int, size: int, value: bool | float) -> Making:
    def change(mask: Tensor) -> Tensor:
        whole = mask.expand(*mask.shape[:-2], size, size).clone()
        torch.diagonal(whole, dim1=-2, dim2=-1).fill_(value)
        return whole

    reads: dict[tuple[int, int], Callable[[Tensor], Tensor]] = {(op.index, place): change for op in group}
    return lambda port, upstream: Edit(reads=reads)
