"""Changes of how values are laid out before more is done: axes before they are joined, the side of a padding."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from torch import Tensor

from refiners.parity import flow
from refiners.parity.candidates import Candidate, groups
from refiners.parity.operations import Operation
from refiners.parity.replay import Change, Edit, Program, with_arguments, with_scalar
from refiners.parity.trial import Making


def laid_out(program: Program) -> Iterator[Candidate]:
    """Two axes are exchanged before they are joined, or a padding stands on the other side."""
    yield from _joined(program)
    yield from _padded(program)


def _joined(program: Program) -> Iterator[Candidate]:
    for group in groups(program):
        first = group[0]
        if first.name not in ("aten.view", "aten._unsafe_view") or first.outputs[0] is None:
            continue
        before = tuple(program.values[first.inputs[0]].shape)
        axis = joined_axis(before, tuple(program.values[first.outputs[0]].shape))
        if axis is not None:
            text = (
                f"when axes {axis} and {axis + 1} of the shape {list(before)} are exchanged before they are joined "
                f"at {first.source}"
            )
            yield Candidate(text, _everywhere(group, _exchanged(axis)), (first.name, str(first.source), "joined"))


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
            yield Candidate(text, _everywhere(group, _with_pad(other)), ("pad", size))


def _with_pad(pad: list[int]) -> Change:
    def change(operation: Operation, given: list[Tensor]) -> object:
        return with_arguments(operation, with_scalar(operation.template, (0, 1), pad), given)

    return change


def _everywhere(group: Sequence[Operation], change: Callable[[Operation, list[Tensor]], object]) -> Making:
    return lambda port, upstream: Edit(changes={operation.index: change for operation in group})
