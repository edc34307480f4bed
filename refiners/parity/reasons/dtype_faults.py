"""Values that agree, and that both sides compute in other dtypes: told at the node that does, as other faults are."""

from torch import nn

from refiners.parity.case import Case
from refiners.parity.fingerprint import Values
from refiners.parity.inputs import draw_inputs, named_tensors, place_inputs
from refiners.parity.lanes import Lane
from refiners.parity.leaves import Pairing
from refiners.parity.operations import Operation, Trace
from refiners.parity.precision import Mismatch, compare_precision, kinds_of, trace_both
from refiners.parity.reasons.faults import Fault
from refiners.parity.reasons.flow import name_of
from refiners.parity.reasons.localise import Finding
from refiners.parity.reasons.teacher import Point, Where


def dtype_faults(case: Case, lane: Lane, models: tuple[nn.Module, nn.Module], pairing: Pairing) -> list[Fault]:
    """A fault for each line of the port at which another dtype computes than upstream's: the first node that runs it.

    Receives:
        case, lane: in which no value differs.
        models: upstream, then the port.
        pairing: of their leaves.
    """
    inputs = draw_inputs(case)
    upstream, port = trace_both(case, lane, models, inputs, values := Values())
    given = {values.number_of(tensor) for _, tensor in named_tensors(place_inputs(inputs, lane.dtype, lane.device))}
    faults: dict[tuple[str, ...], Fault] = {}
    for mismatch in compare_precision(upstream, port, pairing, lane.dtype, given):
        if not mismatch.port:
            continue  # it computes nothing there, or in whole numbers: no node of it is to blame
        fault = _fault(mismatch, upstream, port, next(iter(port.outputs), ""))
        lines = tuple(str(operation.source) for operation in fault.finding.port_operations)
        faults.setdefault(lines, fault)
    return list(faults.values())


def _fault(mismatch: Mismatch, upstream: Trace, port: Trace, output: str) -> Fault:
    theirs = _alone(mismatch.upstream, mismatch.port) or mismatch.upstream
    names = {op.name for op in theirs}
    ours = _alone(mismatch.port, mismatch.upstream) or tuple(op for op in mismatch.port if op.name in names)
    ours = ours or mismatch.port[-1:]
    point = Point(where=Where.OUTPUT, port=output, upstream=output, agrees=True, expected=(), actual=())
    finding = Finding(
        port=port.path_of(ours[-1]) if ours else "",
        upstream=upstream.path_of(theirs[-1]) if theirs else "",
        point=point,
        is_leaf=False,
        port_operations=ours[:2],
        upstream_operations=theirs[:2],
    )
    right, here = _told(theirs), _told(ours)
    return Fault(finding, f"when it computes in upstream's dtypes: {right}; here {here}", was_run=False)


def _alone(operations: tuple[Operation, ...], others: tuple[Operation, ...]) -> tuple[Operation, ...]:
    """Those that compute in a dtype, or narrow in a way, in which the other side does nothing."""
    known = {kind for other in others for kind in kinds_of(other)}
    return tuple(operation for operation in operations if kinds_of(operation) - known)


def _told(operations: tuple[Operation, ...]) -> str:
    """What computes in which dtype, each once."""
    told = (f"`{name_of(op)}` in {' and '.join(map(str, sorted(kinds_of(op))))}" for op in operations)
    return ", ".join(list(dict.fromkeys(told))[:4]) or "nothing"
