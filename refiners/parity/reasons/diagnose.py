"""Why a node is wrong: hypotheses are tried on it, one by one, until one makes it equal to upstream's.

A leaf is tried alone, on what upstream's leaf received. A node between leaves is tried inside a forced run, so that
faults elsewhere do not matter. Every edit is taken back; a diagnosis that is told was run, or follows from the data
flow: the values that upstream's operation reads and writes are both there in the port.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from refiners.parity.modules import own_state
from refiners.parity.operations import Operation
from refiners.parity.reasons import by_values, causes, edits, flow, hypotheses, mending
from refiners.parity.reasons.edits import Hypothesis
from refiners.parity.reasons.localise import Finding
from refiners.parity.reasons.missing import is_all_that_lacks
from refiners.parity.reasons.replay import Program, needed
from refiners.parity.reasons.session import Lines, Session
from refiners.parity.reasons.unwritten import reads_unwritten, unwritten
from refiners.parity.reasons.weight_faults import how_weights_differ

MOST_PIECES = 6
MOST_PLACES = 6
FEW_ULP = 1 << 12
"""Of a difference that may be one of rounding: float64 is asked whether it is."""
OF_BITS = " (this gives upstream's bits: in float64 both are equal within rounding)"
MOST_ROUNDED = 3
"""Findings that differ by rounding alone for which hypotheses are tried."""


def beyond_rounding(finding: Finding, session: Session) -> Finding:
    """The first place of a node that differs by more than the rounding of float32, if there is one."""
    for place in (finding, *finding.others)[:MOST_PLACES]:
        programs = None if place.is_leaf else _programs(place, session)
        if programs is None or not causes.is_rounding_of_float32(*programs):
            return place
    return finding


def diagnose(finding: Finding, session: Session) -> tuple[str, bool]:
    """What would make the port equal at a finding.

    Returns:
        A text that completes "equal …", or "" when no hypothesis holds; and whether it was run. If not, it follows from
        the values alone.
    """
    told = by_values.missing_module(finding, session)
    does_more = _programs(finding, session) if told and finding.port_region else None
    if told and (does_more is None or is_all_that_lacks(*does_more, finding, session)):
        return told, False
    if by_values.is_wiring(finding):
        made = _by_its_maker(finding, session)
        return (made, True) if made else (by_values.wired(finding, session), False)
    told = _unwritten(finding, session)
    if told:
        return told, False
    programs = _programs(finding, session) if session.fruitless.rounded >= MOST_ROUNDED else None
    is_rounding = programs is not None and causes.is_rounding_of_float32(*programs)
    found = None if is_rounding else by_hypothesis(finding, session)
    if session.is_late() or (found and not found.is_vague):
        return (_told(found.text, finding, session) if found else ""), bool(found)
    vague = found.text if found else ""
    programs = programs or _programs(finding, session)
    told = by_values.repeated(finding, session) or (_cause(*programs, finding, session) if programs else "")
    session.fruitless.rounded += told == causes.ONLY_ROUNDING
    if vague and not told:
        return vague, True
    return told or by_values.by_data_flow(finding, session), False


def _unwritten(finding: Finding, session: Session) -> str:
    """What is read though nobody wrote to it, before anything is run: what lies there is chance."""
    programs = _programs(finding, session) if reads_unwritten(finding) else None
    return unwritten(*programs) if programs is not None else ""


def _told(text: str, finding: Finding, session: Session) -> str:
    """A hypothesis that held, and whether it only gives other bits."""
    worst = finding.point.worst
    programs = None
    if worst is not None and worst.ulp is not None and worst.ulp <= FEW_ULP:
        programs = _programs(finding, session)
    try:
        return f"{text}{OF_BITS}" if programs is not None and causes.is_rounding(*programs) else text
    except Exception:  # an operation that does not take float64
        return text


def by_hypothesis(finding: Finding, session: Session) -> Hypothesis | None:
    """The first hypothesis that holds, where running the port can tell: a vague one if no other does.

    It cannot where the port's way goes on with a value that was found wrong before. What never held at these lines in
    another layer is not tried again.
    """
    if finding.carried.keys() & needed(finding.port_region, finding.actual or -1):
        return None
    known, lines = session.fruitless, () if finding.is_leaf else _lines_of(finding)
    if lines in known.nodes:
        return None
    check, vague = _check_of(finding, session), None
    for hypothesis in _proposed(finding, session):
        if session.is_late():
            return vague
        if not (vague and hypothesis.is_vague) and _holds(hypothesis, finding, check):
            if not hypothesis.is_vague:
                return hypothesis
            vague = hypothesis
    known.nodes |= {lines} if lines and vague is None else set()
    return vague


def _lines_of(finding: Finding) -> Lines:
    sides = finding.port_operations, finding.port_region, finding.upstream_operations, finding.region
    return tuple(f"{op.name} {op.source}" for side in sides for op in side)


def _cause(port: Program, upstream: Program, finding: Finding, session: Session) -> str:
    """Why; lines of code in which nothing was found are not searched again, as in each layer of a model."""
    lines = tuple(str(op.source) for program in (port, upstream) for op in program.operations)
    known, key, started = session.fruitless, (finding.point.place, lines), time.thread_time()
    if key in known.pointed and lines in known.seconds:
        return known.pointed[key]  # of the other lane, whose programs are run in float64 as well
    told, at = causes.why(port, upstream, session.deadline, only_point=lines in known.seconds)
    session.cause_at = [session.port_trace.path_of(operation) for operation in at]
    if not told or mending.POINTS in told:
        known.seconds.setdefault(lines, time.thread_time() - started)
        known.pointed[key] = told
    return told


def _check_of(finding: Finding, session: Session) -> Callable[[Finding], bool]:
    if not finding.is_leaf:
        return session.mends
    try:
        with torch.no_grad():
            alone = not session.mends_leaf(finding)
    except Exception:  # a leaf that reads a context, or takes more than tensors, cannot be called alone
        alone = False
    return session.mends_leaf if alone else session.mends


def _holds(hypothesis: Hypothesis, finding: Finding, check: Callable[[Finding], bool]) -> bool:
    try:
        with torch.no_grad(), hypothesis.edit():
            return check(finding)
    except Exception:  # a guess that does not fit the node: of another shape, dtype or number of inputs
        return False


def _proposed(finding: Finding, session: Session) -> Iterator[Hypothesis]:
    node = session.port.get_submodule(finding.port)
    weights: dict[str, Tensor] = session.upstream.state_dict()
    other = _submodule(session.upstream, finding.upstream)
    yield from _held_weights(finding.port, node, session, weights)
    if finding.is_leaf and other is not None:
        yield from hypotheses.of_leaf(node, other, weights)
        yield from _operations(finding, session, node)
        return
    if not any(True for _ in node.children()):
        yield from hypotheses.of_attributes(node, other)
        if _runs(finding, "attention", "softmax", "bmm", "view"):
            yield from hypotheses.of_attention(node)
        yield from _operations(finding, session, node)
        yield from _pieces(finding, session)
        yield from hypotheses.of_activation(node)
        yield from hypotheses.of_residual(node)
        yield from hypotheses.of_inputs_and_outputs(node)
        return
    yield from hypotheses.of_residual(node)
    yield from _operations(finding, session, node)
    yield from _pieces(finding, session)
    yield from hypotheses.of_attributes(node, other)
    yield from hypotheses.of_attention(node)
    yield from hypotheses.of_inputs_and_outputs(node)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _runs(finding: Finding, *names: str) -> bool:
    found = " ".join(op.name for op in (*finding.port_operations, *finding.upstream_operations))
    return any(name in found for name in names)


def _held_weights(path: str, node: nn.Module, session: Session, weights: Mapping[str, Tensor]) -> Iterator[Hypothesis]:
    """A leaf of the port that does not hold what it should."""
    wrong: list[tuple[str, edits.Edit]] = []
    held = dict(own_state(node))
    prefix = f"{path}." if path else ""
    for key, right in session.right_weights.items():
        owner, _, name = key.rpartition(".")
        if owner != prefix.rstrip("."):
            continue
        text = how_weights_differ(name, right, held.get(name), weights)
        if text:
            wrong.append((text, edits.weight(node, name, right)))
    yield from (Hypothesis(text, edit) for text, edit in wrong)
    if len(wrong) > 1:
        together = [edit for _, edit in wrong]
        yield Hypothesis("; ".join(text for text, _ in wrong), lambda: edits.all_of(together))


def _operations(finding: Finding, session: Session, node: nn.Module) -> Iterator[Hypothesis]:
    """The port's operation with upstream's arguments, upstream's in its place or before it, or none."""

    def edited(ours: Operation, change: edits.Change) -> edits.Edit:
        before = [op for op in session.port_trace.operations[: ours.index] if op.call == ours.call]
        return edits.operation(node, sum(op.function is ours.function for op in before), ours.function, change)

    for ours in finding.port_operations:
        for theirs in finding.upstream_operations:
            if "→" in theirs.name:
                continue
            if "→" not in ours.name and theirs.is_view <= ours.is_view and set(theirs.inputs) <= set(ours.inputs):
                order = [ours.inputs.index(number) for number in theirs.inputs]
                yield Hypothesis(flow.unlike(ours, theirs), edited(ours, edits.in_place_of(theirs, order)))
            if len(theirs.inputs) == 1 and theirs.inputs[0] in ours.inputs:
                place = ours.inputs.index(theirs.inputs[0])
                text = f"when {flow.told(theirs)} comes before {flow.told(ours)}, as upstream at {theirs.source}"
                yield Hypothesis(text, edited(ours, edits.preceded_by(theirs, place)))
        if "→" not in ours.name and ours.inputs:
            yield Hypothesis(f"without {flow.told(ours)}", edited(ours, edits.left_out))


def _pieces(finding: Finding, session: Session) -> Iterator[Hypothesis]:
    """A tensor is cut in pieces, and one is taken for another."""
    read = {number for op in (*finding.port_operations, *finding.port_region) for number in op.inputs}
    for view in reversed(session.port_trace.operations):
        if view.is_view and not flow.is_parting(view) and read & set(view.outputs):
            read |= set(view.inputs)
    for ours in session.port_trace.operations:
        if not flow.is_parting(ours) or not read & set(ours.outputs):
            continue
        before = session.port_trace.operations[: ours.index]
        position = sum(op.function is ours.function for op in before)
        count = min(len(ours.outputs), MOST_PIECES)
        for turn in range(1, len(ours.outputs)) if len(ours.outputs) > 2 else ():
            order = [(place + turn) % len(ours.outputs) for place in range(len(ours.outputs))]
            told = [place + 1 for place in order]
            text = (
                f"when the pieces of `{flow.name_of(ours)}` stand in the order {told}, which are made at {ours.source}"
            )
            yield Hypothesis(text, edits.operation(session.port, position, ours.function, edits.reordered(order)))
        for a, b in itertools.combinations(range(count), 2):
            what = "the two pieces" if count == 2 else f"pieces {a + 1} and {b + 1}"
            text = f"when {what} of `{flow.name_of(ours)}` are exchanged, which is made at {ours.source}"
            yield Hypothesis(text, edits.operation(session.port, position, ours.function, edits.exchanged(a, b)))


def _programs(finding: Finding, session: Session) -> tuple[Program, Program] | None:
    """The ways of both sides, run once; None where they cannot be."""
    try:
        programs = session.programs(finding)
        return programs if programs and all(program.sketches for program in programs) else None
    except Exception:  # a value that no operation reads or makes, or an operation that does not take float64
        return None


def _by_its_maker(finding: Finding, session: Session) -> str:
    """What mends the node that made the value which arrives; "" if nothing that is tried does."""
    for path in finding.suspects[:1]:
        node = session.port.get_submodule(path)
        for hypothesis in (*hypotheses.of_attributes(node, None), *hypotheses.of_inputs_and_outputs(node)):
            if session.is_late():
                return ""
            if _holds(hypothesis, finding, session.mends):
                return f"{hypothesis.text}, that is of `{path}`"
    return ""
