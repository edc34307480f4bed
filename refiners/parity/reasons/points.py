"""Places of a forward at which both sides are compared."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from torch import Tensor

from refiners.parity.bits import Worst


class Where(StrEnum):
    """What is compared at a point."""

    RECEIVES = "receives"
    RETURNS = "returns"
    OUTPUT = "output"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A place of the forward at which both sides were compared."""

    where: Where
    port: str
    """Path of the leaf, or the name of the output."""
    upstream: str
    call: int = 0
    """How often the leaf ran before."""
    agrees: bool
    expected: tuple[int, ...]
    """Numbers of upstream's values."""
    actual: tuple[int, ...]
    shapes: tuple[str, str] = ("", "")
    """Of both sides, upstream's first, where they disagree."""
    worst: Worst | None = None
    is_other_size: bool = False
    """Whether both sides hold other numbers of elements."""
    is_other_rank: bool = False
    """Whether they have other numbers of axes as well."""
    turned: tuple[tuple[int, int], ...] = ()
    """Where both sides agree: numbers of values of the port and of upstream that hold one in another order of axes."""
    is_way: bool = False
    """Whether a leaf does a part of what upstream's does: what it returns is judged with the way to it."""

    @property
    def place(self) -> tuple[str, str, int]:
        """What identifies the point in another run."""
        return self.where, self.port, self.call

    @property
    def module(self) -> str:
        """The path of upstream's leaf; of an output, all of upstream."""
        return "" if self.where is Where.OUTPUT else self.upstream


def agreeing(point: Point) -> Point:
    """The same place, where nothing differs after all."""
    return replace(point, agrees=True, actual=point.expected, shapes=("", ""), worst=None)


def shapes_of(tensors: Sequence[Tensor]) -> str:
    """Dtypes and shapes, in words."""
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors) or "nothing"


def in_other_shape(point: Point, given: Sequence[Tensor], right: Sequence[Tensor]) -> Point:
    """The same place, where the same numbers arrive in a shape that is another."""
    return replace(point, agrees=False, shapes=(shapes_of(right), shapes_of(given)), turned=())
