"""Why a node is wrong: hypotheses are tried on it, one by one, until one makes it equal to upstream's.

A leaf is tried alone, on what upstream's leaf received. A node between leaves is tried inside a forced run, so that
faults elsewhere do not matter. Every edit is taken back; a diagnosis that is told was run, or follows from the data
flow: the values that upstream's operation reads and writes are both there in the port.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from refiners.parity import causes, edits, flow, hypotheses, mending
from refiners.parity.edits import Hypothesis
from refiners.parity.leaves import Pairing
from refiners.parity.localise import Finding
from refiners.parity.modules import own_state
from refiners.parity.operations import Operation, Trace
from refiners.parity.replay import Program, can_run, needed
from refiners.parity.teacher import Point, Run, Teacher
from refiners.parity.trace import record
from refiners.parity.weight_faults import how_weights_differ

MOST_PIECES = 6
MOST_PLACES = 6


Fruitless = dict[tuple[str, ...], float]
"""Lines of code of both sides → the seconds that it took to find no cause in them."""


@dataclass
class Session:
    """Two models that were taken apart, and all that is needed to run them again."""

    upstream: nn.Module
    port: nn.Module
    run_port: Run
    teacher: Teacher
    pairing: Pairing
    right_weights: Mapping[str, Tensor]
    upstream_trace: Trace
    port_trace: Trace
    deadline: float
    run_upstream: Run | None = None
    fruitless: Fruitless = field(default_factory=dict[tuple[str, ...], float])
    """Lines of both sides in which no cause was found."""
    settled: set[tuple[str, str, int]] = field(default_factory=set[tuple[str, str, int]])
    """The places that came right with the last hypothesis that held."""
    _disagreeing: set[tuple[str, str, int]] = field(default_factory=set[tuple[str, str, int]])

    def points(self, pairing: Pairing | None = None) -> list[Point]:
        """A forced run of the port as it is now, not traced."""
        points: list[Point] = []
        with self.teacher.forcing(self.port, self.pairing if pairing is None else pairing, points):
            outputs = dict(self.run_port())
        return points + self.teacher.judge(outputs)

    def programs(self, finding: Finding) -> tuple[Program, Program] | None:
        """How the port and upstream make the value that differs, ready to be run again; None where they cannot be."""
        ours, theirs = finding.port_region, finding.region
        if finding.actual is None or finding.expected is None or self.run_upstream is None:
            return None
        if not (ours or theirs) or finding.actual < 0 or not can_run((*ours, *theirs)):
            return None
        wanted = needed(ours, finding.actual) | needed(theirs, finding.expected) | {finding.expected}
        kept: dict[int, Tensor] = {}
        record(self.upstream, self.run_upstream, self.teacher.values, read_views=True, keep=wanted, kept=kept)

        def forced() -> Mapping[str, Tensor]:
            with self.teacher.forcing(self.port, self.pairing, []):
                return self.run_port()

        record(
            self.port,
            forced,
            self.teacher.values,
            read_views=True,
            keep={*wanted, finding.actual} - kept.keys(),
            kept=kept,
        )
        learnt = frozenset(number for model in (self.port, self.upstream) for number, _ in self._parameters(model))
        made: list[Program] = []
        for model, trace, operations, root in (
            (self.port, self.port_trace, ours, finding.actual),
            (self.upstream, self.upstream_trace, theirs, finding.expected),
        ):
            given = {number: kept[number] for number in needed(operations, root)}
            names = dict(self._held(model))
            made.append(Program(trace, operations, root, given, names, learnt, kept.get(root)))
        return made[0], made[1]

    def _parameters(self, model: nn.Module) -> Iterator[tuple[int, str]]:
        return ((self.teacher.values.number_of_weight(tensor), name) for name, tensor in model.named_parameters())

    def _held(self, model: nn.Module) -> Iterator[tuple[int, str]]:
        yield from self._parameters(model)
        yield from ((self.teacher.values.number_of_weight(tensor), name) for name, tensor in model.named_buffers())

    def upstream_modules(self) -> set[str]:
        """Paths of the port whose upstream module runs as often."""
        often = Counter(call.path for call in self.port_trace.calls)
        there = Counter(call.path for call in self.upstream_trace.calls)
        return {path for path, other in self.pairing.items() if often[path] == there[other]}

    def start(self, points: list[Point]) -> None:
        """Remembers where the unedited port disagrees."""
        self._disagreeing = {point.place for point in points if not point.agrees}

    def is_late(self) -> bool:
        """Whether the time for trying is over."""
        return time.monotonic() > self.deadline

    def mends(self, finding: Finding) -> bool:
        """Whether the port, as it is now, agrees where it did not, and disagrees nowhere else."""
        left = {point.place for point in self.points() if not point.agrees}
        is_right = finding.point.place not in left and left <= self._disagreeing
        self.settled = self._disagreeing - left if is_right else self.settled
        return is_right

    def mends_leaf(self, finding: Finding) -> bool:
        """The same of a leaf alone, on what upstream's leaf received in each of its calls."""
        leaf = self.port.get_submodule(finding.port)
        return all(
            self.teacher.agree(leaf(*(t.clone() for t in call.received)), call.returned)
            for call in self.teacher.calls[finding.upstream]
        )


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
    missing = _missing_module(finding, session)
    if missing:
        return missing, False
    if _is_wiring(finding):
        made = _by_its_maker(finding, session)
        return (made, True) if made else (_wired(finding, session), False)
    check, vague = _check_of(finding, session), ""
    for hypothesis in _proposed(finding, session):
        if session.is_late():
            return vague, bool(vague)
        if not (vague and hypothesis.is_vague) and _holds(hypothesis, finding, check):
            if not hypothesis.is_vague:
                return hypothesis.text, True
            vague = hypothesis.text
    programs = _programs(finding, session)
    told = _repeated(finding, session) or (_cause(*programs, session) if programs else "")
    if vague and told in ("", causes.ONLY_ROUNDING):
        return vague, True
    return told or _by_data_flow(finding, session), False


def _cause(port: Program, upstream: Program, session: Session) -> str:
    """Why; lines of code in which nothing was found are not searched again, as in each layer of a model."""
    lines = tuple(str(op.source) for program in (port, upstream) for op in program.operations)
    started = time.thread_time()
    told = causes.why(port, upstream, session.deadline, only_point=lines in session.fruitless)
    if not told or mending.POINTS in told:
        session.fruitless.setdefault(lines, time.thread_time() - started)
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


def _repeated(finding: Finding, session: Session) -> str:
    """A node that runs too often: a leaf of it, or it, runs more often than upstream's does."""
    if finding.passed_on is not None:
        return ""
    ours = Counter(call.path for call in session.port_trace.calls)
    theirs = Counter(call.path for call in session.upstream_trace.calls)
    path = finding.port
    inside = [one for one in session.pairing if one == path or not path or one.startswith(f"{path}.")]
    more = any(ours[one] > theirs[session.pairing[one]] > 0 for one in inside)
    return f"when it runs fewer times than {ours[path]}" if more and ours[path] > 1 else ""


def _programs(finding: Finding, session: Session) -> tuple[Program, Program] | None:
    """The ways of both sides, run once; None where they cannot be."""
    try:
        programs = session.programs(finding)
        return programs if programs and all(program.sketches for program in programs) else None
    except Exception:  # a value that no operation reads or makes, or an operation that does not take float64
        return None


def _by_data_flow(finding: Finding, session: Session) -> str:
    """What follows from values alone, when no edit of the node was found: only what they prove."""
    if finding.passed_on is not None:
        is_proved = finding.passed_on == finding.actual  # all that upstream does to it is missing
        return _out_of_order(finding, session) or (_missing_operations(finding, finding.passed_on) if is_proved else "")
    expected, actual = set(finding.point.expected), set(finding.point.actual)
    for ours in finding.port_operations:
        if expected & set(ours.inputs) and actual & set(ours.outputs):
            return f"without {flow.told(ours)}{' (a residual too much)' if flow.is_residual(ours) else ''}"
    return _of_leaf(finding) if finding.is_leaf else ""


def _of_leaf(finding: Finding) -> str:
    """The first operation of a leaf that gives something else than upstream's does from the same values."""
    for ours, theirs in zip(finding.port_operations[:1], finding.upstream_operations[:1], strict=False):
        if ours.function is theirs.function and ours.inputs == theirs.inputs and "→" not in f"{ours.name}{theirs.name}":
            return flow.unlike(ours, theirs)
    return ""


def _out_of_order(finding: Finding, session: Session) -> str:
    """A leaf that upstream runs first is there in the port as well, and runs at another place."""
    ours = {other: path for path, other in session.pairing.items()}
    for theirs in finding.upstream_operations:
        other = session.upstream_trace.path_of(theirs)
        ran = {call.path for call in session.port_trace.calls}
        if other in ours and finding.passed_on in theirs.inputs and ours[other] in ran:
            return f"when `{ours[other]}` comes first, as upstream's `{other}` does: the port runs it elsewhere"
    return ""


def _is_wiring(finding: Finding) -> bool:
    """Whether both sides have the value that arrives and the one that should: something else is connected here."""
    return not (finding.is_leaf or finding.port_operations or finding.upstream_operations)


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


def _wired(finding: Finding, session: Session) -> str:
    ours = {other: path for path, other in session.pairing.items()}
    unlike = [(e, a) for e, a in zip(finding.point.expected, finding.point.actual, strict=False) if e != a]
    if not unlike:
        return ""
    expected, actual = unlike[0]
    given = flow.origin(session.port_trace, actual, session.pairing)
    call = next((c for c in session.upstream_trace.calls if c.path in ours and expected in c.outputs), None)
    if call is None:
        right = flow.origin(session.upstream_trace, expected, ours)
        return f"when it receives {right} of upstream: here it receives {given}" if right and given else ""
    return (
        f"when it receives what `{ours[call.path]}` returns, as upstream's does: here it receives {given or 'another'}"
    )


def _missing_module(finding: Finding, session: Session) -> str:
    """A whole module of upstream that nothing of the port stands for, between the value passed on and the right one."""
    path, taken = finding.upstream, session.pairing.values()
    if finding.passed_on is None or not path or any(f"{other}.".startswith(f"{path}.") for other in taken):
        return ""
    for call in session.upstream_trace.calls:
        if call.path == path and finding.passed_on in call.inputs and set(call.outputs) - set(call.inputs):
            return f"when it runs upstream's `{path}` ({call.kind}), which is missing here"
    return ""


def _missing_operations(finding: Finding, passed_on: int) -> str:
    """What upstream does between the value passed on and the right one."""
    region = finding.region
    if region and len(region) <= 8 and passed_on in {number for op in region for number in op.inputs}:
        if len(region) == 1 and flow.is_residual(region[0]):
            return f"when it is added to what came before it (a missing residual), as at {region[0].source}"
        names = ", ".join(dict.fromkeys(op.name.removeprefix("aten.") for op in region))
        made = next(iter(region))
        return f"when it computes upstream's {names} here, as at {made.source}"
    return ""
