"""Rows that one side computes and nobody reads.

Tokens of padding are the most frequent: upstream may turn them by no angle, or leave them at 0, where a port turns them
like all others. What differs there is no fault, if no output of upstream's changes with it: upstream is run with other
numbers in those rows, and every bit of its outputs has to stay. Or rows are left out before a leaf in the port, and
behind it upstream.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from refiners.parity.bits import same_bits
from refiners.parity.inputs import map_tensors

Place = tuple[str, int]
"""The path of a leaf of upstream, and how often it ran before."""

Run = Callable[[], Mapping[str, Tensor]]

APART = 1e-4
"""Rows that differ by more than this share of the largest number may be such rows: rounding does not make them."""

SECONDS = 5.0
"""After which no more places are tried alone."""

_FAR = 64
"""Of a longer axis, pieces are looked for at its two ends only."""


@dataclass
class Unread:
    """The rows of what upstream's leaves receive that its outputs do not depend on, as far as they were met."""

    _seen: dict[Place, list[Tensor]] = field(default_factory=dict[Place, list[Tensor]])
    """What arrived in the port, and differs in some rows only."""
    _rows: dict[Place, list[Tensor]] = field(default_factory=dict[Place, list[Tensor]])
    """For each tensor that a leaf receives, where its unread rows are."""
    _is_settled: bool = False

    def look(self, place: Place, given: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        """Remembers what arrives in the port where only some rows differ."""
        if self._is_settled or place in self._seen or not _are_alike(given, right):
            return
        rows = [_rows_apart(ours, theirs) for ours, theirs in zip(given, right, strict=True)]
        if any(bool(some.any()) for some in rows) and not any(bool(some.all()) for some in rows if some.any()):
            self._seen[place] = [tensor.detach().clone() for tensor in given]

    def righted(self, place: Place, given: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
        """What arrives in the port, with upstream's numbers in rows that are known to be unread."""
        rows = self._rows.get(place)
        if rows is None or not _are_alike(given, right):
            return list(given)
        return [_put(theirs, some, into=ours) for ours, theirs, some in zip(given, right, rows, strict=True)]

    def settle(self, upstream: nn.Module, run: Run, outputs: Mapping[str, Tensor], calls: Mapping[str, Any]) -> bool:
        """Finds out which of the rows that were met are unread, and says whether there are any.

        Receives:
            upstream: in which other numbers are put there.
            run: runs it.
            outputs: what it returns otherwise.
            calls: path of a leaf → what it received in each call, under `received`.
        """
        seen, self._seen, self._is_settled = self._seen, {}, True
        rows = {
            place: [_rows_apart(a, b) for a, b in zip(given, calls[place[0]][place[1]].received, strict=True)]
            for place, given in seen.items()
        }
        if not rows:
            return False
        if _are_unread(rows, seen, upstream, run, outputs):
            self._rows.update(rows)
            return True
        started = time.monotonic()
        for place in rows if len(rows) > 1 else ():
            if time.monotonic() - started > SECONDS:
                break
            if _are_unread({place: rows[place]}, seen, upstream, run, outputs):
                self._rows[place] = rows[place]
        return not self._rows.keys().isdisjoint(rows)


def _are_unread(
    rows: Mapping[Place, list[Tensor]],
    seen: Mapping[Place, list[Tensor]],
    upstream: nn.Module,
    run: Run,
    outputs: Mapping[str, Tensor],
) -> bool:
    """Whether upstream returns the same bits with the port's numbers in some rows, and with any others."""
    drawn = torch.Generator().manual_seed(0)
    others = {
        place: [_drawn_like(tensor, drawn) for tensor in tensors] for place, tensors in seen.items() if place in rows
    }
    for numbers in (seen, others):
        with ExitStack() as stack:
            _put_in(rows, numbers, upstream, stack)
            try:
                made = run()
            except Exception:  # such numbers cannot be read at all
                return False
        if any(not same_bits(made[name], tensor) for name, tensor in outputs.items()):
            return False
    return True


def _put_in(
    rows: Mapping[Place, list[Tensor]], numbers: Mapping[Place, list[Tensor]], upstream: nn.Module, stack: ExitStack
) -> None:
    for path in {path for path, _ in rows}:
        leaf = upstream.get_submodule(path)
        stack.callback(leaf.register_forward_pre_hook(_exchanging(path, rows, numbers), with_kwargs=True).remove)


def _exchanging(
    path: str, rows: Mapping[Place, list[Tensor]], numbers: Mapping[Place, list[Tensor]]
) -> Callable[..., Any]:
    count = -1

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        nonlocal count
        count += 1
        place = path, count
        if place not in rows:
            return None
        waiting = iter(zip(numbers[place], rows[place], strict=True))
        return map_tensors((args, kwargs), lambda tensor: _put(*next(waiting), into=tensor))

    return enter


def _put(numbers: Tensor, rows: Tensor, *, into: Tensor) -> Tensor:
    """A tensor with other numbers in some of its rows."""
    return torch.where(rows[..., None], numbers, into) if rows.any() else into


def _drawn_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return (drawn * float(tensor.detach().double().std(correction=0))).to(tensor)


def _are_alike(given: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    pairs = [(tensor.shape, tensor.dtype) for tensor in given]
    return pairs == [(tensor.shape, tensor.dtype) for tensor in right]


def _rows_apart(tensor: Tensor, other: Tensor) -> Tensor:
    """Of two tensors of one shape, where rows along the last axis differ by more than rounding."""
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return torch.zeros(tensor.shape[:-1] if tensor.ndim else (), dtype=torch.bool, device=tensor.device)
    apart = (tensor.double() - other.double()).abs().amax(-1)
    return apart > APART * other.double().abs().max()


def is_cut_from(given: Sequence[Tensor], right: Sequence[Tensor], number_of: Callable[[Tensor], int]) -> bool:
    """Whether one tensor is a piece of another one along one axis.

    Receives:
        given, right: one tensor each, either of which may be the larger.
        number_of: gives numbers to values.
    """
    if len(given) != 1 or len(right) != 1 or given[0].ndim != right[0].ndim or given[0].dtype != right[0].dtype:
        return False
    small, large = sorted((given[0], right[0]), key=Tensor.numel)
    axes = [axis for axis in range(small.ndim) if small.shape[axis] != large.shape[axis]]
    if len(axes) != 1 or not small.numel():
        return False
    size, most = small.shape[axes[0]], large.shape[axes[0]] - small.shape[axes[0]]
    starts = range(most + 1) if most < _FAR else (0, most)
    return any(number_of(large.narrow(axes[0], start, size)) == number_of(small) for start in starts)
