"""Whether two sides compute the same things in float32, where every value is known on both.

As they are, two right programs agree about hardly any value behind their first island of float32. In float64 they
agree about all that they have in common. So the numbers of values are taken from traces with the islands widened, the
dtypes from traces of the models as they are, and `refiners.parity.precision` holds them together: an island that only
one side has lies between two values that both have.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from refiners.parity.case import Case, Inputs
from refiners.parity.fingerprint import Values
from refiners.parity.inputs import named_tensors, place_inputs
from refiners.parity.lanes import Lane
from refiners.parity.leaves import Pairing, keys_of_same, pairings
from refiners.parity.operations import Operation, Trace
from refiners.parity.precision import compare_precision, trace_both

_CAST = "aten._to_copy"


@dataclass(frozen=True)
class WideTraces:
    """Both sides, traced with the islands widened; values that are close in float64 count as one."""

    traces: tuple[Trace, Trace]
    pairing: Pairing
    inputs: frozenset[int]


def trace_wide(case: Case, lane: Lane, models: tuple[nn.Module, nn.Module], inputs: Inputs) -> WideTraces:
    """Traces both sides, which were built widened and run so."""
    values = Values(by_closeness=True)
    traces = trace_both(case, lane, models, inputs, values)
    given = {values.number_of(tensor) for _, tensor in named_tensors(place_inputs(inputs, lane.dtype, lane.device))}
    keys = keys_of_same(models[0], case.key_map.convert(models[0].state_dict(), models[1]))
    return WideTraces(traces, pairings(*models, keys)[0], frozenset(given))


def unlike_islands(as_they_are: tuple[Trace, Trace], wide: WideTraces, dtype: torch.dtype) -> str:
    """What only one side computes in float32, in words; "" if there is nothing."""
    merged = [_merged(trace, own) for trace, own in zip(wide.traces, as_they_are, strict=True)]
    upstream, port = merged
    if upstream is None or port is None:
        return "a side runs other operations there, so that dtypes cannot be compared"
    found = compare_precision(upstream, port, wide.pairing, dtype, wide.inputs)
    return str(found[0]) if found else ""


def _merged(wide: Trace, own: Trace) -> Trace | None:
    """The wide trace with the dtypes that the model has by itself; None where the two are not the same operations."""
    waiting = iter([op for op in own.operations if op.name != _CAST])
    operations: list[Operation] = []
    for operation in wide.operations:
        if operation.name != _CAST:
            other = next(waiting, None)
            if other is None or other.name.rsplit(" ", 1)[-1] != operation.name.rsplit(" ", 1)[-1]:
                return None
            operation = replace(operation, given=other.given, made=other.made, tensors=other.tensors)
        operations.append(operation)
    return None if next(waiting, None) is not None else replace(wide, operations=operations)
