"""What becomes of a tensor when a part of it is written to, as one operation that makes the whole.

    table[:, 0::2] = angles.sin()

Torch makes a view and copies into it: nobody makes the new value of `table`, and the way back from it would end there.
So a trace is given the operation that torch knows for it: the whole, and the part in its place.

What `torch.empty` returns holds what lies in memory by chance, until all of its parts are written to. It is filled with
NaN while a model is watched, so whoever reads what nobody wrote is seen.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refiners.parity.operations import Operation, taken_apart

_ATEN = torch.ops.aten
_SCATTERS = {
    _ATEN.slice.Tensor: _ATEN.slice_scatter.default,
    _ATEN.select.int: _ATEN.select_scatter.default,
}
_FULL: dict[Any, Any] = {
    _ATEN.empty_like.default: _ATEN.full_like.default,
    _ATEN.empty.memory_format: _ATEN.full.default,
    _ATEN.new_empty.default: _ATEN.new_full.default,
}
MOST_BYTES = 1 << 20
"""Of a tensor that is read each time that a part of it is written to."""


class Cut(NamedTuple):
    """How a view was cut."""

    base: Any
    """A weak reference to what it was cut from."""
    function: Any
    arguments: Sequence[Any]
    """The plain ones."""


class Whole(NamedTuple):
    """A tensor a part of which is about to be written to."""

    tensor: Tensor
    number: int
    """Of its value before."""
    maker: int
    """The index of the operation that returned it."""
    function: Any
    """What puts a part into it."""
    arguments: Sequence[Any]
    """The plain ones, behind the whole and the part."""

    def joined(self, part: Tensor) -> tuple[list[Tensor], Any]:
        """The whole and the part, and a template of the arguments."""
        return taken_apart((self.tensor, part, *self.arguments), {})


def is_filled(operation: Operation, blank: Sequence[Tensor]) -> bool:
    """Fills what an operation has made of no values with NaN, and makes it one that does so; False for large ones."""
    function = _FULL.get(operation.function)
    if function is None or any(not tensor.is_floating_point() or tensor.nbytes > MOST_BYTES for tensor in blank):
        return False
    for tensor in blank:
        tensor.fill_(math.nan)
    args, kwargs = operation.template
    taken = {argument.name for argument in function._schema.arguments}
    operation.function, operation.name = function, str(function).rsplit(".", 1)[0]
    operation.template = (*args, math.nan), {name: value for name, value in kwargs.items() if name in taken}
    return True


def whole_of(part: Tensor, cut: Cut | None = None) -> Tensor | None:
    """What a view is a part of, if that is small, and lies in memory in its order or was cut by one operation."""
    base = part._base
    if base is None or base.nbytes > MOST_BYTES or base.dtype != part.dtype:
        return None
    is_in_order = base.is_contiguous() and base.storage_offset() == 0
    return base if is_in_order or _is_cut_from(base, cut) else None


def _is_cut_from(base: Tensor, cut: Cut | None) -> bool:
    return cut is not None and cut.base() is base and cut.function in _SCATTERS


def put_into(base: Tensor, part: Tensor, cut: Cut | None) -> tuple[Any, Sequence[Any]]:
    """The function that puts a part into the whole, and its plain arguments."""
    if cut is not None and _is_cut_from(base, cut):
        return _SCATTERS[cut.function], cut.arguments
    return _ATEN.as_strided_scatter.default, (list(part.shape), list(part.stride()), part.storage_offset())
