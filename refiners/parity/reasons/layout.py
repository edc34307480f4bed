"""Changes of how values are laid out: axes that are joined or cut, the side of a padding and what it holds."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from refiners.parity.operations import Operation
from refiners.parity.reasons import flow
from refiners.parity.reasons.candidates import Candidate, everywhere, groups, with_value
from refiners.parity.reasons.replay import Change, Edit, Program, is_close, makes_bits, natively
from refiners.parity.reasons.sources import rearrangements
from refiners.parity.reasons.trial import Making, Trial, Varies
from refiners.parity.reasons.ways import gives_shape, made_of


def laid_out(program: Program) -> Iterator[Candidate]:
    """Two axes are exchanged before they are joined, or one is cut in the other order; a padding is another one."""
    yield from _tabled(program)
    yield from _joined(program)
    yield from _cut(program)
    yield from _joined_in_order(program)
    yield from _padded(program)
    yield from _padded_with(program)


def _tabled(program: Program) -> Iterator[Candidate]:
    """Cosines and sines stand in another order, all of them: each twice for its two neighbours, or all once more."""
    tables: dict[torch.Size, list[int]] = {}
    varies = Varies(program)
    for number, value in program.values.items():
        source = program.trace_made.get(made_of(number, program.trace_made, gives_shape))
        if source is not None and source.name in ("aten.cos", "aten.sin") and value.ndim > 1 and not varies(number):
            tables.setdefault(value.shape, []).append(number)
    for shape, numbers in tables.items():
        for words, change in rearrangements(program.values[numbers[0]]):
            told = f"{words}{_twice(program.values[numbers[0]], change)}"
            text = f"when in the tables of cosines and sines, {list(shape)}, {told}"
            yield Candidate(text, _at_values(dict.fromkeys(numbers, change)), ("tables", shape))


def _twice(held: Tensor, change: Callable[[Tensor], Tensor]) -> str:
    """What another order means, where each angle is there twice."""
    right = change(held)
    if _is_repeated(held) and _is_doubled(right):
        return ": each angle twice, as 0 0 1 1 (`repeat_interleave`), not all of them once more, as 0 1 0 1"
    if _is_doubled(held) and _is_repeated(right):
        return ": all angles once more, as 0 1 0 1, not each of them twice, as 0 0 1 1 (`repeat_interleave`)"
    return ""


def _is_repeated(table: Tensor) -> bool:
    return torch.equal(*table.chunk(2, -1))


def _is_doubled(table: Tensor) -> bool:
    return torch.equal(table[..., ::2], table[..., 1::2])


def _at_values(changes: dict[int, Callable[[Tensor], Tensor]]) -> Making:
    return lambda port, upstream: Edit(values=changes)


def laid_out_in_bits(trial: Trial) -> str:
    """Why, where one side starts from what the other computes, so that float64 cannot tell: the bits are equal."""
    port, upstream = trial.port, trial.upstream
    with natively():
        return next((one.text for one in laid_out(port) if makes_bits(port, one.making(port, upstream), upstream)), "")


def in_another_shape(port: Program, upstream: Program) -> str:
    """In words that both sides make the same numbers in the same order, and the port in another shape; "" if not."""
    here, there = port.values[port.root], upstream.values[upstream.root]
    lengths = [[size for size in value.shape if size > 1] for value in (here, there)]
    is_picture = here.ndim == there.ndim > 3 and here.shape[:2] == there.shape[:2]  # tokens may be one axis or several
    if not is_picture or lengths[0] == lengths[1] or not port.operations:
        return ""
    if here.numel() != there.numel() or not is_close(here.flatten(), there.flatten()):
        return ""
    last = port.operations[-1]
    at = f" at {last.source}" if last.source else ""
    return f"when what `{flow.name_of(last)}`{at} makes has the shape {list(there.shape)}, not {list(here.shape)}"


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


def _joined_in_order(program: Program) -> Iterator[Candidate]:
    """Two or three tensors that are joined stand in another order."""
    for group in groups(program):
        first = group[0]
        count = len(first.inputs) if first.name == "aten.cat" else 0
        for order in itertools.permutations(range(count)) if count in (2, 3) else ():
            if order != tuple(range(count)):
                at = f" at {first.source}" if first.source else ""
                text = f"when in `cat`{at} the tensors stand in the order {[place + 1 for place in order]}"
                yield Candidate(text, everywhere(group, _in_order(order)), ("cat", str(first.source), order))


def _in_order(order: Sequence[int]) -> Change:
    def change(operation: Operation, given: list[Tensor]) -> object:
        arguments, options = operation.template
        axis = arguments[1] if len(arguments) > 1 else options.get("dim", 0)
        return torch.cat([given[place] for place in order], axis)

    return change


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
        other = list(itertools.chain.from_iterable((size[i + 1], size[i]) for i in range(0, len(size), 2)))
        if other != list(size):
            text = (
                f"when in `{flow.name_of(group[0])}` at {group[0].source} `pad` is {other}, not {list(size)}, "
                "which is on the other side"
            )
            yield Candidate(text, everywhere(group, with_value((0, 1), other)), ("pad", size))
