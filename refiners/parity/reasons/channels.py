"""Two programs in one layout, where a leaf of the port has its channels at the other end than upstream's.

A convolution of 1x1 over the tokens of a sequence is a linear layer on its transpose. What such a leaf is taught, and
what it returns, is upstream's with two axes exchanged: no element of the one stands against its own of the other.
Axes are moved at both ends of the port's program, so that what lies between is compared.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from refiners.parity.operations import Operation, Slot
from refiners.parity.reasons.replay import Program, is_close

_FAR = 1 << 40
"""Beyond the numbers of values and operations of a trace."""


def in_one_layout(port: Program, upstream: Program) -> Program:
    """The port's program from upstream's values to one in upstream's layout; as it is where nothing is to be moved."""
    if not port.operations:
        return port
    program = port
    alone = [number for number in upstream.given if number not in port.given]
    for number, value in port.given.items():
        source = next((one for one in alone if _moved(upstream.given[one], value) is not None), None)
        if number in upstream.given or source is None:
            continue
        given = upstream.given[source]
        move = _move(program.operations[0], given, _axes(given, value), source, number, -1 - len(program.operations))
        rest = {one: tensor for one, tensor in program.given.items() if one != number}
        program = replace(program, operations=[move, *program.operations], given={**rest, source: given})
    value, right = port.recorded, upstream.recorded
    axes = () if value is None or right is None else _axes(value, right)
    if value is not None and axes:
        end = _move(program.operations[-1], value, axes, port.root, _FAR, _FAR)
        recorded = value.permute(axes).contiguous()
        program = replace(program, operations=[*program.operations, end], root=_FAR, recorded=recorded)
    return program


def exchanged(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The tensors of both sides that have the same number of axes, and other sizes along them."""
    pairs = zip(actual, expected, strict=False)
    return [(ours, theirs) for ours, theirs in pairs if ours.ndim == theirs.ndim > 2 and ours.shape != theirs.shape]


def _axes(tensor: Tensor, other: Tensor) -> tuple[int, ...]:
    """The order in which a tensor's axes have another one's sizes, its channels at the other end; nothing if none."""
    if tensor.shape == other.shape or tensor.ndim != other.ndim or tensor.ndim < 3 or tensor.dtype != other.dtype:
        return ()
    rest = tuple(range(2, tensor.ndim))
    orders = ((0, *rest, 1), (0, rest[-1], 1, *rest[:-1]), (1, 0, *rest))
    return next((axes for axes in orders if [tensor.shape[axis] for axis in axes] == list(other.shape)), ())


def _moved(tensor: Tensor, other: Tensor) -> Tensor | None:
    """A tensor in another one's layout, if it is that one then."""
    axes = _axes(tensor, other)
    moved = tensor.permute(axes).contiguous() if axes else tensor
    return moved if axes and is_close(moved, other) else None


def _move(beside: Operation, value: Tensor, axes: Sequence[int], source: int, number: int, index: int) -> Operation:
    """An operation that moves axes, at the place of another one."""
    return Operation(
        index=index,
        name="aten.permute",
        call=beside.call,
        source=beside.source,
        inputs=(source,),
        outputs=(number,),
        tensors=((value.dtype, tuple(value.shape)),),
        given=(value.dtype,) if value.is_floating_point() else (),
        made=value.dtype if value.is_floating_point() else None,
        is_view=True,
        function=torch.ops.aten.permute_copy.default,
        template=((Slot(0), list(axes)), {}),
    )
