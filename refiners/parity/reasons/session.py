"""Two models that were taken apart, and what a hypothesis about them is tried in."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from refiners.parity.leaves import Pairing
from refiners.parity.operations import Operation, Trace
from refiners.parity.reasons.channels import in_one_layout
from refiners.parity.reasons.localise import Finding
from refiners.parity.reasons.recorded import Asked, Recorded
from refiners.parity.reasons.replay import Program, needed
from refiners.parity.reasons.teacher import Point, Run, Teacher
from refiners.parity.trace import record

Lines = tuple[str, ...]
"""Lines of code of both sides."""


@dataclass
class Fruitless:
    """Searches that found no cause, which are not made again."""

    seconds: dict[Lines, float] = field(default_factory=dict[Lines, float])
    """How long each took."""
    pointed: dict[tuple[object, Lines], str] = field(default_factory=dict[tuple[object, Lines], str])
    """The place that differs, and the lines → the two lines that were pointed at."""
    nodes: set[Lines] = field(default_factory=set[Lines])
    """Lines at which no hypothesis held when the port was run with it."""
    rounded: int = 0
    """Findings of rounding alone."""

    def longer_than(self, seconds: float) -> "Fruitless":
        """Those that took longer."""
        return Fruitless({lines: spent for lines, spent in self.seconds.items() if spent > seconds}, self.pointed)


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
    fruitless: Fruitless = field(default_factory=Fruitless)
    cause_at: list[str] = field(default_factory=list[str])
    """The paths of the operations at which the last cause is; none where that is not known."""
    recorded: Recorded = field(default_factory=Recorded)
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
        asked = Asked.by(finding)
        if asked is None or self.run_upstream is None:
            return None
        kept = self.recorded.values(asked, self._of_upstream, self._of_port)
        ours, theirs = finding.port_region, finding.region
        learnt = frozenset(number for model in (self.port, self.upstream) for number, _ in self._parameters(model))
        expected = self.teacher.orders.same(kept[asked.actual], {number: kept[number] for number in asked.before})
        made: list[Program] = []
        for model, trace, operations, root in (
            (self.port, self.port_trace, ours, asked.actual),
            (self.upstream, self.upstream_trace, _until(expected, theirs), expected),
        ):
            given = {number: kept[number] for number in needed(operations, root)}
            names = dict(self._held(model))
            made.append(Program(trace, operations, root, given, names, learnt, kept.get(root)))
        ours_made = in_one_layout(*made)
        return ours_made.starting_from({wrong: kept[one] for wrong, one in asked.right.items()}), made[1]

    def _of_upstream(self, numbers: set[int]) -> dict[int, Tensor]:
        kept: dict[int, Tensor] = {}
        run = self.run_upstream or dict[str, Tensor]
        record(self.upstream, run, self.teacher.values, read_views=True, keep=numbers, kept=kept)
        return kept

    def _of_port(self, numbers: set[int]) -> dict[int, Tensor]:
        kept: dict[int, Tensor] = {}

        def forced() -> Mapping[str, Tensor]:
            with self.teacher.forcing(self.port, self.pairing, []):
                return self.run_port()

        record(self.port, forced, self.teacher.values, read_views=True, keep=numbers, kept=kept)
        return kept

    def _parameters(self, model: nn.Module) -> Iterator[tuple[int, str]]:
        return ((self.teacher.values.number_of_weight(tensor), name) for name, tensor in model.named_parameters())

    def _held(self, model: nn.Module) -> Iterator[tuple[int, str]]:
        yield from self._parameters(model)
        yield from ((self.teacher.values.number_of_weight(tensor), name) for name, tensor in model.named_buffers())

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


def _until(number: int, operations: Sequence[Operation]) -> Sequence[Operation]:
    """The operations that a value is made by."""
    wanted, found = {number}, list[Operation]()
    for operation in reversed(operations):
        if wanted & {one for one in operation.outputs if one is not None and one not in operation.inputs}:
            wanted.update(operation.inputs)
            found.append(operation)
    return found[::-1]
