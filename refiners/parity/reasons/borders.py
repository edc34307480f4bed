"""Leaves of both sides that do not stand for one another, although they hold the same weights.

They end at another operation: one scales what it returns, the other is scaled behind it. Or one of them does the work
of a module around the other: it owns a codebook and looks for the nearest row, where upstream's is given the number of
a row; it normalises the weights of a convolution and convolves.
"""

from collections import Counter
from collections.abc import Callable

from refiners.parity.leaves import Pairing
from refiners.parity.operations import Trace
from refiners.parity.reasons.localise import Finding
from refiners.parity.reasons.teacher import Point, Where

Lesson = tuple[list[Finding], list[Point], Pairing, Trace]
"""What a forced run with a pairing showed."""


def without_borders(lesson: Lesson, known: set[int], again: Callable[[Pairing], Lesson]) -> Lesson:
    """Leaves are left out that differ only in what belongs to them: what one does, the port does behind it.

    Upstream's table of tokens may scale what it returns, where the port scales it in the next line. Both the leaf and
    what follows would be blamed, and both are right.
    """
    for point in lesson[1]:
        findings, _, pairing, _ = lesson
        if point.agrees or point.where is not Where.RETURNS or point.port not in pairing:
            continue
        if not any(_starts_from(finding, set(point.expected)) for finding in findings):
            continue
        other = again({path: leaf for path, leaf in pairing.items() if path != point.port})
        keys = {finding.key for finding in findings} - {(point.port, True)}
        saved = places_in(findings) - places_in(other[0])
        is_unfinished = set(point.actual) <= known  # upstream's leaf makes the same on its way
        if (saved > 1 and all(finding.key in keys for finding in other[0])) or (saved > 0 and is_unfinished):
            lesson = other
    return lesson


def without_parts(lesson: Lesson, upstream: Trace, again: Callable[[Pairing], Lesson]) -> Lesson:
    """Leaves are left out that run once for each part of what upstream's leaf is given in one, or the reverse.

    Upstream may join the rows and the columns of a picture for one convolution, where the port runs it twice.
    """
    findings, points, pairing, trace = lesson
    here = Counter(call.path for call in trace.calls)
    there = Counter(call.path for call in upstream.calls)
    parted = {
        point.port
        for point in points
        if point.port in pairing and point.is_other_size and here[point.port] != there[pairing[point.port]]
    }
    if not parted:
        return lesson
    other = again({path: leaf for path, leaf in pairing.items() if path not in parted})
    return other if places_in(other[0]) < places_in(findings) else lesson


def without_wholes(lesson: Lesson, again: Callable[[Pairing], Lesson]) -> Lesson:
    """Leaves are left out that are given something of another kind than upstream's, and return something else."""
    for point in lesson[1]:
        findings, points, pairing, _ = lesson
        if point.agrees or point.port not in pairing or (point.where is Where.RECEIVES and not point.is_other_rank):
            continue
        place = Where.RECEIVES, point.port, point.call
        given = next((other for other in points if other.place == place), None)
        if given is not None and not given.is_other_rank:  # it is given what upstream's is, or what should be that
            continue
        other = again({path: leaf for path, leaf in pairing.items() if path != point.port})
        is_fewer = places_in(other[0]) < places_in(findings) or (given is not None and len(other[0]) < len(findings))
        if (given is None and point.is_other_size) or is_fewer:
            lesson = other
    return lesson


def _starts_from(finding: Finding, taught: set[int]) -> bool:
    """Whether what is found between leaves may come from what one of them was taught to return."""
    read = {number for op in (*finding.port_operations, *finding.port_region) for number in op.inputs}
    return not finding.is_leaf and (finding.passed_on is not None or bool(taught & read))


def places_in(findings: list[Finding]) -> int:
    """How many places findings show at."""
    return sum(1 + len(finding.others) for finding in findings)
