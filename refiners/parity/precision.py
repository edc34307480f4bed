"""Which dtype computes what: both sides have to cast at the same places, also where no bit shows it.

Bits cannot tell. A kernel of bfloat16 often computes in float32 by itself, so an upcast that is moved by one operation
changes nothing on one processor and something on the next; and an island of float32 in a float64 lane changes nothing
where its values happen to be exact. So both sides are traced once more, and their dtypes are held together.

What is compared: every value that both sides have (one number, see `fingerprint`), every output of a leaf that is
paired by its weights, and every named output. Between such a value and the ones before it, the *set* of dtypes in which
the side computes has to be upstream's, and so has the set of casts that narrow. So the order and the number of
operations are free, as are three products for one that is split, a softmax written out, a cast that torch makes by
itself or one that widens (what computes with it tells). Views and moves (`clone`, `cat`, an index, a mask filled in)
compute nothing, and where one side does no more than that, the other may compute in the value's own dtype: adding a
mask of 0 and -inf is filling one in, taking a row of a table is computing it. A value that one side was given ready, as
a buffer, a part of one or a constant, is not compared, nor is a number without axes that no input and no weight
reaches: a formula may be computed beforehand.
"""

import sys
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from refiners.parity.case import Case, Inputs, Outputs
from refiners.parity.fingerprint import Values
from refiners.parity.influence import some
from refiners.parity.inputs import copy_for_one_side, named_tensors, place_inputs
from refiners.parity.lanes import Lane
from refiners.parity.leaves import Pairing, keys_of_same, pairings
from refiners.parity.modules import modules
from refiners.parity.operations import Operation, Trace
from refiners.parity.torch_state import seed_torch
from refiners.parity.trace import record

_MOVES = frozenset(
    {"clone", "copy_", "copy", "contiguous", "cat", "stack", "index", "index_select", "gather", "scatter"}
    | {"index_put", "index_put_", "take_along_dim", "take", "embedding", "repeat", "repeat_interleave", "roll"}
    | {"flip", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d"}
    | {"replication_pad2d", "replication_pad3d", "where", "masked_fill", "masked_fill_", "masked_select", "tril"}
    | {"triu", "select_scatter", "slice_scatter", "unfold", "im2col", "pixel_shuffle", "pixel_unshuffle"}
    | {"channel_shuffle", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_unsafe_view"}
    | {"_reshape_alias", "_reshape_copy", "lift_fresh", "_to_copy", "expand_copy", "fill_", "zero_", "full", "zeros"}
    | {"ones", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "full_like", "zeros_like"}
    | {"ones_like", "new_full", "new_zeros", "new_ones", "arange", "scalar_tensor", "eye", "tril_indices"}
    | {"triu_indices", "resize_", "set_", "_local_scalar_dense", "detach", "alias", "bernoulli_"}
    | {"split_with_sizes_copy"}
)
"""Operations that compute no number: they move numbers, or make them of nothing."""

MAX_TOLD = 6


@dataclass(frozen=True, order=True)
class Kind:
    """A dtype that computes, or a cast that narrows."""

    dtype: str
    to: str = ""

    def __str__(self) -> str:
        return f"{self.dtype} rounded to {self.to}" if self.to else self.dtype


@dataclass(frozen=True)
class Mismatch:
    """A value that both sides have and compute in other dtypes."""

    upstream: tuple[Operation, ...]
    port: tuple[Operation, ...]
    """What each side does between this value and those before it, as far as it computes."""
    text: str

    def __str__(self) -> str:
        return self.text


def kinds_of(operation: Operation) -> frozenset[Kind]:
    """In which dtypes an operation computes, and how it narrows; nothing for a view or a move."""
    return _kinds_of(operation.name, operation.given, operation.made, operation.is_view)


@cache
def _kinds_of(name: str, given: tuple[torch.dtype, ...], made: torch.dtype | None, is_view: bool) -> frozenset[Kind]:
    widest = max(given, key=_width, default=None)
    narrows = widest is not None and made is not None and made != widest and _width(made) <= _width(widest)
    rounded = [Kind(_name(widest), _name(made))] if narrows and widest is not None and made is not None else []
    if is_view or name.removeprefix("aten.") in _MOVES:
        return frozenset(rounded if "copy" in name else [])
    if widest is None and made is None:
        return frozenset()
    computes = max((dtype for dtype in (widest, made) if dtype is not None), key=_width)
    return frozenset({Kind(_name(computes)), *rounded})


def _width(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def outside(trace: Trace, dtype: torch.dtype) -> list[Operation]:
    """The operations of a trace that compute in another dtype than the lane's, or round to one."""
    name = _name(dtype)
    return [op for op in trace.operations if any(kind != Kind(name) for kind in kinds_of(op))]


def listed(trace: Trace, operations: list[Operation]) -> list[str]:
    """Operations as lines: what, in which dtypes, in which module, at which line of code; equal ones once."""
    lines: dict[str, int] = {}
    for operation in operations:
        line = _told(trace, operation)
        lines[line] = lines.get(line, 0) + 1
    return [f"{line}{f' (x{count})' if count > 1 else ''}" for line, count in lines.items()]


def _told(trace: Trace, operation: Operation) -> str:
    kinds = " and ".join(str(kind) for kind in sorted(kinds_of(operation)))
    return f"`{operation.name.removeprefix('aten.')}` {kinds} in {trace.place_of(operation)}"


class _Side:
    """One trace, with the way back from each value.

    Receives:
        inputs: the numbers of the values that the model is called with.
    """

    def __init__(self, trace: Trace, inputs: AbstractSet[int]) -> None:
        self.trace = trace
        self.makers: dict[int, list[Operation]] = {}
        for operation in _without_constants(trace, inputs):
            for number in operation.outputs:
                if number is not None and number not in operation.inputs:
                    self.makers.setdefault(number, []).append(operation)

    def outputs(self, path: str) -> list[tuple[int, ...]]:
        """What each call of a module returned."""
        return [call.outputs for call in self.trace.calls if call.path == path]

    def region(self, number: int, anchors: set[int]) -> list[Operation] | None:
        """All that was done between a value and the anchors before it; None where it is not known how it was made."""
        found: dict[int, Operation] = {}
        waiting, seen = [number], {number}
        while waiting:
            at = waiting.pop()
            makers = self.makers.get(at, [])
            if not makers and at not in self.trace.weights:
                return None
            for operation in makers:
                if not operation.inputs and at == number:
                    return None
                found[operation.index] = operation
                more = [n for n in operation.inputs if n not in anchors and n not in seen]
                seen.update(more)
                waiting += more
        return [found[index] for index in sorted(found)]


def _without_constants(trace: Trace, inputs: AbstractSet[int]) -> Iterator[Operation]:
    """The operations, but for those on numbers without axes that no input and no weight reaches."""
    reached = {*inputs, *trace.weights}
    for operation in trace.operations:
        is_drawn = not operation.inputs and operation.name.removeprefix("aten.") not in _MOVES
        is_constant = not is_drawn and reached.isdisjoint(operation.inputs)
        if not is_constant:
            reached.update(number for number in operation.outputs if number is not None)
        if not (is_constant and operation.inputs) or any(shape for _, shape in operation.tensors):
            yield operation


def compare_precision(
    upstream: Trace, port: Trace, pairing: Pairing, dtype: torch.dtype, inputs: AbstractSet[int]
) -> list[Mismatch]:
    """Where two sides compute the same in other dtypes.

    Receives:
        upstream, port: traces with shared numbers.
        pairing: of the leaves.
        dtype: of the lane.
        inputs: the numbers of the values that both are called with.

    Returns:
        One mismatch for each pair of places, in the order of the port's forward.
    """
    ours, theirs = _Side(upstream, inputs), _Side(port, inputs)
    anchors = _anchors(ours, theirs, pairing)
    there, here = {pair[0] for pair in anchors}, {pair[1] for pair in anchors}
    found: dict[tuple[str, ...], Mismatch] = {}
    for number, other in sorted(anchors, key=lambda pair: _first(theirs, pair[1])):
        if number in upstream.weights or other in port.weights:
            continue
        regions = _both_known(number == other, number, ours.region(number, there), theirs.region(other, here), dtype)
        if regions is None:
            continue
        kinds = _kinds(regions[0]), _kinds(regions[1])
        if kinds[0] != kinds[1] and not _is_a_move(regions, kinds):
            places = {*_places(upstream, regions[0]), *_places(port, regions[1])}
            found.setdefault(tuple(sorted(places)), _mismatch((upstream, port), regions, kinds, dtype))
    return list(found.values())


def _both_known(
    is_same: bool, number: int, ours: list[Operation] | None, theirs: list[Operation] | None, dtype: torch.dtype
) -> "_Regions | None":
    """What both sides do to make a value; None where one of them was given it ready, and it came back to nobody."""
    if ours is not None and theirs is not None:
        return ours, theirs
    made = ours if ours is not None else theirs
    if not made or not is_same or not any(number in operation.inputs for operation in made):
        return None
    # Both were given it, and one of them makes it again of itself: a cast there and back.
    casts = [operation for operation in made if kinds_of(operation) - {Kind(_name(dtype))}]
    return (casts, []) if ours is not None else ([], casts)


def _is_a_move(regions: "_Regions", kinds: "_BothKinds") -> bool:
    """Whether one side moves what the other computes in no dtype but the value's own: no cast is anywhere."""
    if all(kinds):
        return False
    own = {Kind(_name(operation.made)) for region in regions for operation in region[-1:] if operation.made is not None}
    return kinds[0] | kinds[1] <= own


def _places(trace: Trace, operations: list[Operation]) -> list[str]:
    return [f"{trace.path_of(op)} {op.source}" for op in operations if kinds_of(op)]


def _first(side: _Side, number: int) -> int:
    makers = side.makers.get(number)
    return makers[0].index if makers else -1


def _anchors(ours: _Side, theirs: _Side, pairing: Pairing) -> set[tuple[int, int]]:
    """Values of upstream and of the port that stand for each other."""
    common = ours.trace.known() & theirs.trace.known()
    anchors = {(number, number) for number in common}
    pairs = [
        (ours.trace.outputs[name], other) for name, other in theirs.trace.outputs.items() if name in ours.trace.outputs
    ]
    for path, other in pairing.items():
        there, here = ours.outputs(other), theirs.outputs(path)
        if len(there) == len(here):
            pairs += [(a[0], b[0]) for a, b in zip(there, here, strict=True) if a and b]
    return anchors | {(a, b) for a, b in pairs if a not in common and b not in common}


def _kinds(operations: list[Operation]) -> frozenset[Kind]:
    return frozenset(kind for operation in operations for kind in kinds_of(operation))


_Both = tuple[Trace, Trace]
_Regions = tuple[list[Operation], list[Operation]]
_BothKinds = tuple[frozenset[Kind], frozenset[Kind]]


def _mismatch(traces: _Both, regions: _Regions, kinds: _BothKinds, dtype: torch.dtype) -> Mismatch:
    sides: list[str] = []
    kept: list[tuple[Operation, ...]] = []
    for trace, operations, own, other in zip(traces, regions, kinds, reversed(kinds), strict=True):
        computing = [op for op in operations if kinds_of(op)]
        kept.append(tuple(computing))
        alone = [op for op in computing if kinds_of(op) & (own - other)] or computing[-1:]
        sides.append(", ".join(listed(trace, alone)[:3]) if alone else "nothing")
    told = f"the same value is computed in other dtypes in {_name(dtype)}: upstream {sides[0]}; the port {sides[1]}"
    return Mismatch(kept[0], kept[1], told)


@dataclass(frozen=True)
class Precision:
    """What looking at the dtypes of both sides shows."""

    faults: tuple[str, ...] = ()
    """Where they differ, a sentence each."""
    notes: tuple[str, ...] = ()
    """What runs in float64 lanes outside of float64, a line for each side."""
    unread: tuple[str, ...] = ()
    """Entries of the port's state dict that its forward never reads; once judged, a sentence about them."""
    islands: tuple[Trace, Trace] | None = None
    """The traces of both sides, if in a float64 lane both compute the same things, some of them, in float32."""


def look_at_precision(case: Case, lane: Lane, models: tuple[nn.Module, nn.Module], inputs: Inputs) -> Precision:
    """Traces a forward of both sides, as they are run for their verdict, and holds their dtypes together.

    Receives:
        models: upstream, then the port, which share their storages.
        inputs: of the case, as drawn.
    """
    upstream, port = trace_both(case, lane, models, inputs, values := Values())
    given = {values.number_of(tensor) for _, tensor in named_tensors(place_inputs(inputs, lane.dtype, lane.device))}
    keys = keys_of_same(models[0], case.key_map.convert(models[0].state_dict(), models[1]))
    pairing = pairings(*models, keys)[0]
    told = [str(mismatch) for mismatch in compare_precision(upstream, port, pairing, lane.dtype, given)]
    faults = told if len(told) <= MAX_TOLD else [*told[:MAX_TOLD], f"and {len(told) - MAX_TOLD} more values"]
    notes = _islands(upstream, port, lane.dtype) if lane.is_truth else []
    notes += _borrowed(upstream, port, models[0])
    has_islands = lane.is_truth and all(outside(trace, lane.dtype) for trace in (upstream, port))
    return Precision(tuple(faults), tuple(notes), port.unread, (upstream, port) if has_islands and not faults else None)


def _borrowed(upstream: Trace, port: Trace, model: nn.Module) -> list[str]:
    """A note where the port runs the very lines of upstream's package: there it is compared with itself."""
    names = {type(module).__module__ for module in modules(model) if not type(module).__module__.startswith("torch.")}
    files = {str(getattr(sys.modules.get(name), "__file__", "")) for name in names}
    homes = {file for file in files if "-packages" in file}  # a loop that a case wraps around both sides is no package
    lines = {op.source: None for op in port.operations if op.source and op.source.file in homes}
    shared = [str(line) for line in lines if line in {op.source for op in upstream.operations}]
    told = f"the port runs upstream's own code, which proves nothing about it: {some(shared, limit=3)}"
    return [told] if shared else []


def trace_both(
    case: Case, lane: Lane, models: tuple[nn.Module, nn.Module], inputs: Inputs, values: Values | None = None
) -> tuple[Trace, Trace]:
    """One forward of each side, upstream's first."""
    values = Values() if values is None else values
    placed = place_inputs(inputs, lane.dtype, lane.device)

    def traced(model: nn.Module, run: Callable[[nn.Module, Inputs], Outputs]) -> Trace:
        own = copy_for_one_side(placed, gradients=case.gradients)
        seed_torch(case.seed)
        with torch.set_grad_enabled(case.gradients):
            return record(model, lambda: run(model, own), values)[0]

    return traced(models[0], case.run_upstream), traced(models[1], case.run_port)


def _islands(upstream: Trace, port: Trace, dtype: torch.dtype) -> list[str]:
    notes: list[str] = []
    for side, trace in (("upstream", upstream), ("the port", port)):
        lines = listed(trace, outside(trace, dtype))
        notes += [f"outside of {_name(dtype)}, {side}: {'; '.join(lines)}"] if lines else []
    return notes
