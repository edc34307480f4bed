"""Changes of how values are laid out: axes that are joined or cut, the side of a padding and what it holds."""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

from refiners.parity.operations import Operation
from refiners.parity.reasons import flow
from refiners.parity.reasons.candidates import Candidate, everywhere, groups, with_value
from refiners.parity.reasons.replay import Change, Program


def laid_out(program: Program) -> Iterator[Candidate]:
    """Two axes are exchanged before they are joined, or one is cut in the other order; a padding is another one."""
    yield from _joined(program)
    yield from _cut(program)
    yield from _padded(program)
    yield from _padded_with(program)


def _views(program: Program) -> Iterator[tuple[list[Operation], tuple[int, ...], tuple[int, ...]]]:
    """Operations that give a value another shape, those of one line together, with both shapes."""
    for group in groups(program):
        first = group[0]
        if first.name in ("aten.view", "aten._unsafe_view") and first.outputs[0] is not None:
            before, after = (program.values[number].shape for number in (first.inputs[0], first.outputs[0]))
            yield group, tuple(before), tuple(after)


def _joined(program: Program) -> Iterator[Candidate]:
    for group, before, after in _views(program):
        first, axis = group[0], joined_axis(before, after)
        if axis is not None:
            text = (
                f"when axes {axis} and {axis + 1} of the shape {list(before)} are exchanged before they are joined "
                f"at {first.source}"
            )
            yield Candidate(text, everywhere(group, _exchanged(axis)), (first.name, str(first.source), "joined"))


def joined_axis(before: Sequence[int], after: Sequence[int]) -> int | None:
    """The first of two axes that one shape has and the other has as one; None where the shapes differ otherwise."""
    if len(after) != len(before) - 1:
        return None
    for axis in range(len(after)):
        pair = before[axis : axis + 2]
        if (*before[:axis], pair[0] * pair[1], *before[axis + 2 :]) == tuple(after) and min(pair) > 1:
            return axis
    return None


def _exchanged(axis: int) -> Change:
    return lambda operation, given: given[0].transpose(axis, axis + 1).flatten(axis, axis + 1)


def _cut(program: Program) -> Iterator[Candidate]:
    """An axis that holds two things, as all frames of all videos, has them in the other order."""
    for group, before, after in _views(program):
        first, axis = group[0], joined_axis(after, before)
        if axis is not None:
            right = list(after[axis : axis + 2][::-1])
            whole = [*after[:axis], *right, *after[axis + 2 :]]
            text = (
                f"when in `view` at {first.source} the shape is {whole}, not {list(after)}, with axes {axis} and "
                f"{axis + 1} exchanged behind: what is cut holds the two in the other order"
            )
            yield Candidate(text, everywhere(group, _cut_as(axis, right)), (first.name, str(first.source), "cut"))


def _cut_as(axis: int, sizes: list[int]) -> Change:
    return lambda operation, given: torch.unflatten(given[0], axis, sizes).transpose(axis, axis + 1).contiguous()


_KINDS = {
    "replicate": "repeats the edge (`replicate`)",
    "reflect": "is a mirror of what is inside (`reflect`)",
    "circular": "goes on at the other side (`circular`)",
    "constant": "is of zeros",
}


def _padded_with(program: Program) -> Iterator[Candidate]:
    """What a padding holds: zeros, or what lies at the edge."""
    for group in groups(program):
        name = group[0].name.removeprefix("aten.")
        own = next((kind for start, kind in _PADS.items() if name.startswith(start)), "")
        for kind, words in _KINDS.items() if own else ():
            if kind != own:
                text = f"when the padding of `{name}` at {group[0].source} {words}: here it {_KINDS[own]}"
                yield Candidate(text, everywhere(group, _with_kind(kind)), ("pad kind", str(group[0].source)))


_PADS = {"constant_pad": "constant", "replication_pad": "replicate", "reflection_pad": "reflect"}


def _with_kind(kind: str) -> Change:
    def change(operation: Operation, given: list[Tensor]) -> object:
        pad: list[int] = operation.template[0][1]
        pad = pad[: max((i + 2 for i in range(0, len(pad), 2) if any(pad[i : i + 2])), default=2)]
        return padded(given[0], pad, kind)

    return change


def padded(x: Tensor, pad: Sequence[int], kind: str) -> Tensor:
    """A tensor with more at the ends of its last axes, zeros or what lies inside."""
    # Of other kinds torch pads all axes but the first two, or none.
    return functional.pad(x, [*pad, *[0] * (2 * (x.ndim - 2) - len(pad))], mode=kind)


def _padded(program: Program) -> Iterator[Candidate]:
    """All paddings of one size, as those of a cosine and of a sine."""
    sizes: dict[tuple[int, ...], list[Operation]] = {}
    for operation in program.operations:
        if operation.name == "aten.constant_pad_nd":
            sizes.setdefault(tuple(operation.template[0][1]), []).append(operation)
    for size, group in sizes.items():
        other = list(chain.from_iterable((size[i + 1], size[i]) for i in range(0, len(size), 2)))
        if other != list(size):
            text = (
                f"when in `{flow.name_of(group[0])}` at {group[0].source} `pad` is {other}, not {list(size)}, "
                "which is on the other side"
            )
            yield Candidate(text, everywhere(group, with_value((0, 1), other)), ("pad", size))
