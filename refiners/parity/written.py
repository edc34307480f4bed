"""What becomes of a tensor when a part of it is written to, as one operation that makes the whole.

    table[:, 0::2] = angles.sin()

Torch makes a view and copies into it: nobody makes the new value of `table`, and the way back from it would end there.
So a trace is given the operation that torch knows for it: the whole, and the part in its place.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refiners.parity.operations import taken_apart

_ATEN = torch.ops.aten
_SCATTERS = {
    _ATEN.slice.Tensor: _ATEN.slice_scatter.default,
    _ATEN.select.int: _ATEN.select_scatter.default,
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


def whole_of(part: Tensor) -> Tensor | None:
    """What a view is a part of, if that is small and lies in memory in its order."""
    base = part._base
    if base is None or base.nbytes > MOST_BYTES or base.dtype != part.dtype:
        return None
    return base if base.is_contiguous() and base.storage_offset() == 0 else None


def put_into(base: Tensor, part: Tensor, cut: Cut | None) -> tuple[Any, Sequence[Any]]:
    """The function that puts a part into the whole, and its plain arguments."""
    if cut is not None and cut.base() is base and cut.function in _SCATTERS:
        return _SCATTERS[cut.function], cut.arguments
    return _ATEN.as_strided_scatter.default, (list(part.shape), list(part.stride()), part.storage_offset())
