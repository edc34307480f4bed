"""Why a node is wrong: hypotheses are tried on it, one by one, until one makes it equal to upstream's.

A leaf is tried alone, on what upstream's leaf received. A node between leaves is tried inside a forced run, so that
faults elsewhere do not matter. Every edit is taken back; a diagnosis that is told was run, or follows from the data
flow: the values that upstream's operation reads and writes are both there in the port.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from refiners.parity import edits, hypotheses
from refiners.parity.edits import Hypothesis
from refiners.parity.leaves import Pairing
from refiners.parity.localise import Finding
from refiners.parity.modules import own_state
from refiners.parity.teacher import Point, Run, Teacher
from refiners.parity.trace import Operation, Slot, Trace, fill_template
from refiners.parity.weight_faults import how_weights_differ


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
    _disagreeing: set[tuple[str, str, int]] = field(default_factory=set[tuple[str, str, int]])

    def points(self) -> list[Point]:
        """A forced run of the port as it is now, not traced."""
        points: list[Point] = []
        with self.teacher.forcing(self.port, self.pairing, points):
            outputs = dict(self.run_port())
        return points + self.teacher.judge(outputs)

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
        return finding.point.place not in left and left <= self._disagreeing

    def mends_leaf(self, finding: Finding) -> bool:
        """The same of a leaf alone, on what upstream's leaf received in each of its calls."""
        leaf = self.port.get_submodule(finding.port)
        return all(
            self.teacher.agree(leaf(*(t.clone() for t in call.received)), call.returned)
            for call in self.teacher.calls[finding.upstream]
        )


def diagnose(finding: Finding, session: Session) -> tuple[str, bool]:
    """What would make the port equal at a finding.

    Returns:
        A text that completes "equal …", or "" when no hypothesis holds; and whether it was run. If not, it follows from
        the values alone.
    """
    missing = _missing_module(finding, session)
    if missing:
        return missing, False
    check = _check_of(finding, session)
    for hypothesis in _proposed(finding, session):
        if session.is_late():
            return "", False
        if _holds(hypothesis, finding, check):
            return hypothesis.text, True
    return _by_data_flow(finding, session), False


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
        yield from hypotheses.of_activation(node)
        yield from hypotheses.of_residual(node)
        yield from hypotheses.of_inputs_and_outputs(node)
        return
    yield from hypotheses.of_residual(node)
    yield from _operations(finding, session, node)
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
    """The port's operation with upstream's arguments, or upstream's operation in its place."""
    for ours in finding.port_operations:
        for theirs in finding.upstream_operations:
            order = _matched(ours, theirs)
            if order is None or "→" in ours.name or "→" in theirs.name:
                continue
            before = [op for op in session.port_trace.operations[: ours.index] if op.call == ours.call]
            position = sum(op.function is ours.function for op in before)
            yield Hypothesis(_unlike(ours, theirs), edits.operation(node, position, ours, theirs, order))


def _matched(ours: Operation, theirs: Operation) -> list[Any] | None:
    """For each tensor of upstream's operation, the place of the same one in the port's; None if one is not there."""
    order: list[Any] = []
    for number in theirs.inputs:
        if number not in ours.inputs:
            return None
        order.append(ours.inputs.index(number))
    return order


def _unlike(ours: Operation, theirs: Operation) -> str:
    """In what arguments two operations differ."""
    if ours.function is not theirs.function:
        return f"when it computes `{theirs}` in place of `{ours}`"
    names = [argument.name for argument in ours.function._schema.arguments]
    here, there = _arguments(ours, names), _arguments(theirs, names)
    told: list[str] = []
    for name in dict.fromkeys([*there, *here]):
        right, given = there.get(name), here.get(name)
        if right == given:
            continue
        if isinstance(right, _Tensor):
            told.append(f"`{name}` is upstream's tensor" + (", which the port does not give" if given is None else ""))
        elif isinstance(given, _Tensor):
            told.append(f"`{name}` is {right!r}, not a tensor")
        else:
            told.append(f"`{name}` is {right!r}, not {given!r}")
    return (
        f"when in `{ours.name.removeprefix('aten.')}` {' and '.join(told)}" if told else f"when it computes `{theirs}`"
    )


@dataclass(frozen=True)
class _Tensor:
    number: int


def _arguments(operation: Operation, names: list[str]) -> dict[str, Any]:
    """Names of arguments → what was given, tensors as the numbers of their values; what is None is left out."""

    def number(slot: Slot) -> _Tensor:
        return _Tensor(operation.inputs[slot.place])

    args, kwargs = fill_template(operation.template, Slot, number)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: value for name, value in given.items() if value is not None}


def _by_data_flow(finding: Finding, session: Session) -> str:
    """What follows from values alone, when no edit of the node was found."""
    expected = set(finding.point.expected)
    if finding.passed_on is not None:
        return _missing_operations(finding, finding.passed_on)
    runs = sum(call.path == finding.port for call in session.port_trace.calls)
    if runs > 1 and finding.port not in session.upstream_modules():
        return f"when it runs fewer times than {runs}"
    for ours in finding.port_operations:
        if expected & set(ours.inputs):
            return f"without `{ours}`"
    pairs = [(a, b) for a in (*finding.port_operations, *finding.port_region) for b in finding.upstream_operations]
    for ours, theirs in pairs:
        is_view = "→" in f"{ours.name}{theirs.name}"
        if ours.function is theirs.function and not is_view and (set(ours.inputs) & set(theirs.inputs)):
            return _unlike(ours, theirs)
    for ours, theirs in zip(finding.port_operations[:1], finding.upstream_operations[:1], strict=False):
        alone = len(finding.port_operations) == len(finding.upstream_operations) == 1
        if alone and set(ours.inputs) & set(theirs.inputs):
            return f"when it computes `{theirs}` in place of `{ours}`, as upstream does at {theirs.source}"
    return ""


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
        names = ", ".join(dict.fromkeys(op.name.removeprefix("aten.") for op in region))
        made = next(iter(region))
        return f"when it computes upstream's {names} here, as at {made.source}"
    return ""
