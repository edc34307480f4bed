"""Values of both sides, recorded for several findings at once: each recording runs and traces both models."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from refiners.parity.reasons.localise import Finding
from refiners.parity.reasons.replay import MOST_ELEMENTS, can_run, elements_of, needed
from refiners.parity.reasons.ways import made_by, moved_from

Record = Callable[[set[int]], dict[int, Tensor]]
"""Runs a side and keeps the values of these numbers."""


@dataclass(frozen=True)
class Asked:
    """The numbers of the values that are needed to run the ways of both sides to one finding."""

    actual: int
    before: tuple[int, ...]
    """The value that should have arrived, and what it was before it was put into that shape."""
    right: dict[int, int]
    """Values that were found wrong before, and the port goes on with → the right ones."""
    wanted: frozenset[int]
    elements: int

    @classmethod
    def by(cls, finding: Finding) -> "Asked | None":
        """What a finding asks for; nothing where the ways cannot be run again."""
        ours, theirs = finding.port_region, finding.region
        if finding.actual is None or finding.expected is None or finding.actual < 0:
            return None
        if not (ours or theirs) or not can_run((*ours, *theirs)):
            return None
        starts = needed(ours, finding.actual)
        right = {wrong: one for wrong, one in finding.carried.items() if wrong in starts}
        before = tuple(moved_from(finding.expected, made_by(theirs)))
        wanted = starts | needed(theirs, finding.expected) | {*before, *right.values()}
        return cls(finding.actual, before, right, frozenset(wanted), elements_of((*ours, *theirs)))


@dataclass
class Recorded:
    """The values that were recorded last, of upstream and of the port.

    Receives:
        ahead: findings that will be asked about.
    """

    ahead: list[Finding] = field(default_factory=list[Finding])
    _asked: set[tuple[int, frozenset[int]]] = field(default_factory=set[tuple[int, frozenset[int]]])
    _upstream: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    _port: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def values(self, asked: Asked, upstream: Record, port: Record) -> dict[int, Tensor]:
        """The values that a finding asks for: upstream's, and of the port what upstream has not."""
        if (asked.actual, asked.wanted) not in self._asked:
            together = list(self._together(asked))
            self._asked = {(one.actual, one.wanted) for one in together}
            wanted = set[int]().union(*(one.wanted for one in together))
            self._upstream = upstream(wanted)
            self._port = port(wanted - self._upstream.keys() | {one.actual for one in together})
        numbers = asked.wanted | {asked.actual}
        found = {number: self._port[number] for number in numbers if number in self._port}
        return found | {number: self._upstream[number] for number in asked.wanted if number in self._upstream}

    def _together(self, first: Asked) -> Iterable[Asked]:
        """What is asked for now, and what will be, as much as may be held."""
        yield first
        elements = first.elements
        for finding in self.ahead:
            other = Asked.by(finding)
            if other is not None and elements + other.elements <= MOST_ELEMENTS:
                elements += other.elements
                yield other
