"""Rotary positions that turn other pairs of elements, or another part of a head: told only where it is proved.

What both sides do looks much alike in every layout, and text that is joined in front of a picture looks like halves.
So the words are told if the port, on values in the other order, makes upstream's values in the other order.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from refiners.parity.reasons import flow
from refiners.parity.reasons.mending import first_that_mend, operations_of
from refiners.parity.reasons.replay import Edit, Program
from refiners.parity.reasons.trial import Making, Trial


def layouts(trial: Trial, pairs: Sequence[tuple[int, int]]) -> str:
    """That both sides turn other pairs of elements: told only where values in the other order are turned alike."""
    ours, theirs = operations_of(trial, pairs) if pairs else ([], [])
    if not (flow.turns(ours) and flow.turns(theirs)):
        return ""
    told = flow.rope_layouts(ours, theirs)
    whole = (trial.port.root, trial.upstream.root)
    for some in ([*pairs], [whole], first_that_mend(trial)):
        parts = [trial.part(*pair) for pair in some]
        if told and parts and all(map(_turns_in_another_order, parts)):
            return told
        words = {_turns_another_part(part) for part in parts}
        if len(words) == 1 and (other := words.pop()):
            return other
    return ""


def _turns_another_part(part: Trial) -> str:
    """That one side turns the first elements of each head, and the other the last ones."""
    root, shape = part.port.root, part.upstream.values[part.upstream.root].shape
    for leaves, size in _whole_rows(part):
        for turned, is_last in itertools.product((size // 2, size // 4, size - size // 4), (True, False)):
            if 0 < turned < size and part.holds(_rolled(leaves, root, shape, turned if is_last else -turned)):
                right, here = ("first", "last") if is_last else ("last", "first")
                return f"when rotary positions turn the {right} {turned} elements of a head: the port turns the {here}"
    return ""


def _rolled(leaves: Sequence[int], root: int, shape: torch.Size, by: int) -> Making:
    """The first elements come last before, and first again behind; by less than nothing, the reverse."""

    def making(port: Program, upstream: Program) -> Edit:
        pieces = [port.values[leaf] for leaf in leaves]
        values: dict[int, Callable[[Tensor], Tensor]] = {root: lambda x: x.reshape(shape).roll(by, -1)}
        rolled, start = torch.cat(pieces, -1).roll(-by, -1), 0
        for leaf, piece in zip(leaves, pieces, strict=True):
            values[leaf] = _constantly(rolled.narrow(-1, start, piece.shape[-1]))
            start += piece.shape[-1]
        return Edit(values=values)

    return making


def _constantly(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


def _whole_rows(part: Trial) -> Iterator[tuple[tuple[int, ...], int]]:
    """The same as `_rows`, and pairs of values that are the two pieces of one whose last axis is of that size."""
    port = part.port
    yield from (((leaf,), size) for leaf, size in _rows(part))
    pieces: dict[int, list[int]] = {}
    for leaf in sorted(port.leaves()):
        made = port.trace_made.get(leaf)
        if made is not None and made.is_view and made.name.endswith("slice") and len(made.inputs) == 1:
            pieces.setdefault(made.inputs[0], []).append(leaf)
    size = part.upstream.values[part.upstream.root].shape[-1]
    for two in (two for two in pieces.values() if len(two) == 2):
        if sum(port.values[leaf].shape[-1] for leaf in two) == size:
            yield from ((order, size) for order in itertools.permutations(two))


def _rows(part: Trial) -> Iterator[tuple[int, int]]:
    """The values that a program starts from whose last axis is that of what it makes, with its size."""
    port = part.port
    shape = part.upstream.values[part.upstream.root].shape
    for leaf in (n for n in port.leaves() if port.values[n].is_floating_point() and n != port.root):
        size = port.values[leaf].shape[-1] if port.values[leaf].ndim > 1 else 0
        if size and shape[-1:] == (size,):
            yield leaf, size


def _turns_in_another_order(part: Trial) -> bool:
    root, shape = part.port.root, part.upstream.values[part.upstream.root].shape
    for leaf, size in _rows(part):
        for turned, paired in itertools.product((size, size // 2, size // 4), (False, True)):
            if turned % 2 == 0 and part.holds(_reorder(leaf, root, shape, turned, paired)):
                return True
    return False


def _reorder(leaf: int, root: int, shape: torch.Size, turned: int, paired: bool) -> Making:
    """Pairs side by side in the place of halves, or the reverse, before; and back behind."""

    def order(x: Tensor, apart: bool) -> Tensor:
        first, rest = x[..., :turned], x[..., turned:]
        pairs = first.reshape(*first.shape[:-1], *((-1, 2) if apart else (2, -1))).transpose(-1, -2)
        return torch.cat((pairs.reshape(first.shape), rest), dim=-1)

    def before(x: Tensor) -> Tensor:
        return order(x, paired)

    def behind(x: Tensor) -> Tensor:
        return order(x.reshape(shape), not paired)

    return lambda port, upstream: Edit(values={leaf: before, root: behind})
