"""The order of axes in which a port holds what upstream holds in another one.

A linear layer on rows of moments is a convolution over time, and keys may be made before the pixels of a video are
taken for its batch, or behind it. Which order it is no shape tells where several fit. A tensor that holds upstream's
elements tells, and what has the same two shapes elsewhere is taken for the same.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from refiners.parity.bits import same_bits

MOST_AXES = 5
MOST_LOOKS = 4
"""At tensors of two shapes, until one of them is the guess, or has an order."""
CLEARLY = 4.0
"""By how much more than by chance a tensor must be like another one in one order, for that to be believed: by chance,
n numbers are as like n others as 1/√n. A port that is wrong holds other numbers, which are like the right ones."""

_DIGITS = 9
"""Of a likeness; the others are rounding."""


@dataclass(frozen=True)
class Order:
    """A tensor is cut into axes, these are moved, and joined again."""

    axes: tuple[int, ...]
    moved: tuple[int, ...]

    def of(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor in the other order."""
        return tensor.reshape(self.axes).permute(self.moved).reshape(shape)

    def back(self) -> "Order":
        """From there to here."""
        moved = tuple(self.axes[axis] for axis in self.moved)
        return Order(moved, tuple(self.moved.index(axis) for axis in range(len(self.moved))))


@dataclass
class Orders:
    """The orders that were seen: shape of a tensor and of what it stands for → how one becomes the other.

    Receives:
        are_believed: whether they are kept to. A port that holds values in another order may be right, or be wrong in
            nothing else.
    """

    are_believed: bool = True
    _known: dict[tuple[torch.Size, torch.Size], Order] = field(
        default_factory=dict[tuple[torch.Size, torch.Size], Order]
    )
    _looks: Counter[tuple[torch.Size, torch.Size]] = field(default_factory=Counter[tuple[torch.Size, torch.Size]])

    def look(self, tensor: Tensor, other: Tensor, guess: Tensor) -> None:
        """Remembers the order in which a tensor is most like another one, if the one that is guessed is not.

        Receives:
            tensor, other: of as many elements.
            guess: the tensor in the shape of the other one, as it most often comes there.
        """
        pair = tensor.shape, other.shape
        if not self.are_believed or pair in self._known:
            return
        if not tensor.is_floating_point():
            self._look_at_whole_numbers(tensor, other, guess)
            return
        self._looks[pair] += 1
        held = _likeness(guess, other) if self._looks[pair] <= MOST_LOOKS else 1.0
        if held == 1.0:
            self._looks[pair] = MOST_LOOKS
            return
        found = {order: _likeness(order.of(tensor, other.shape), other) for order in orders(*pair)}
        best = max(found, key=lambda order: found[order], default=None)
        if best is not None and found[best] - held > (1 - held) * CLEARLY / math.sqrt(other.numel()):
            self._known[pair] = best
            self._known[other.shape, tensor.shape] = best.back()

    def _look_at_whole_numbers(self, tensor: Tensor, other: Tensor, guess: Tensor) -> None:
        """Ids are equal or say nothing: one that is further is no more like another one."""
        if tensor.dtype != other.dtype or torch.equal(guess, other):
            return
        pair = tensor.shape, other.shape
        found = (order for order in orders(*pair) if torch.equal(order.of(tensor, other.shape), other))
        best = next(found, None)
        if best is not None:
            self._known[pair] = best
            self._known[other.shape, tensor.shape] = best.back()

    def __bool__(self) -> bool:
        return bool(self._known)

    def known(self, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """A tensor in the order that was seen; None where none was."""
        order = self._known.get((tensor.shape, shape)) if self.are_believed else None
        return None if order is None else order.of(tensor, shape).contiguous()

    def same(self, tensor: Tensor, others: Mapping[int, Tensor]) -> int:
        """The first of several numbers of values, each made of the next by moving axes, that is in a tensor's order.

        Where nothing is known of the order, the first that has the tensor's axes, or fewer. The first of all if there
        is none.
        """
        first, whole = next(iter(others.items()))
        if not self.are_believed:
            return first
        order = self._known.get((whole.shape, tensor.shape))
        if order is None and whole.ndim == tensor.ndim:
            return first
        if order is None:
            return next((number for number, one in others.items() if _are_joined(tensor.shape, one.shape)), first)
        right = order.of(whole, tensor.shape)
        fits = (n for n, one in others.items() if one.numel() == right.numel())
        return next((n for n in fits if same_bits(others[n].reshape(right.shape), right)), first)


def orders(own: Sequence[int], other: Sequence[int]) -> Iterator[Order]:
    """All orders in which the axes of one shape, or pieces of them, make another one."""
    own, other = ([size for size in shape if size > 1] for shape in (own, other))
    if len(own) < len(other):
        yield from (order.back() for order in orders(other, own))
        return
    if len(own) > MOST_AXES:
        return
    axes = tuple(own)
    for moved in itertools.permutations(range(len(axes))):
        if list(moved) != sorted(moved) and _joins([axes[axis] for axis in moved], other):
            yield Order(axes, moved)
    if len(own) == len(other) == 3 and own[2] == other[2] and other[1] > 1 and own[0] % other[1] == 0:
        axes = (own[0] // other[1], other[1], own[1], own[2])  # each moment of all places, or each place of all moments
        if math.prod((axes[0], axes[2])) == other[0]:
            yield Order(axes, (0, 2, 1, 3))


def _are_joined(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether one shape is the other one with some of its axes joined to their neighbours."""
    more, fewer = sorted(([size for size in shape if size > 1] for shape in (first, second)), key=len, reverse=True)
    return _joins(more, fewer)


def _joins(axes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether axes, some of them joined to their neighbours, are those of a shape."""
    waiting = list(axes)
    for size in shape:
        held = 1
        while held < size and waiting:
            held *= waiting.pop(0)
        if held != size:
            return False
    return not waiting


def _likeness(first: Tensor, second: Tensor) -> float:
    """1 for two tensors that are one, about 0 for two that have nothing to do with each other."""
    one, two = first.to(torch.float64).flatten(), second.to(torch.float64).flatten()
    found = float(one @ two / ((one @ one) * (two @ two)).sqrt())
    return round(found, _DIGITS) if math.isfinite(found) else 0.0
