"""Faults with their reasons; and of many findings that have one cause, the one that is told."""

from dataclasses import dataclass, replace
from functools import reduce

from refiners.parity.operations import Operation, Trace
from refiners.parity.reasons.causes import ONLY_ROUNDING
from refiners.parity.reasons.crossing import crossed
from refiners.parity.reasons.diagnose import diagnose
from refiners.parity.reasons.flow import name_of
from refiners.parity.reasons.localise import Finding
from refiners.parity.reasons.rearranged import rearranged
from refiners.parity.reasons.session import Session
from refiners.parity.reasons.ways import common_path, gives_shape

MOST_REARRANGED = 3
"""Of so many findings without a reason that was run it is tried whether nodes stand at other places."""


@dataclass(frozen=True)
class Fault:
    """A finding with its diagnosis."""

    finding: Finding
    diagnosis: str
    """What makes the port equal there, completing "equal …"; "" when nothing that was tried does."""
    was_run: bool
    """Whether the port was run with that change; if not, it follows from the values of both sides."""


def without_rounding(faults: list[Fault]) -> tuple[list[Fault], list[str]]:
    """The faults; and where there are some, the paths of what differs by rounding alone, which is none beside them."""
    rounded = [fault for fault in faults if fault.diagnosis == ONLY_ROUNDING]
    if len(rounded) == len(faults):
        return faults, []
    return [fault for fault in faults if fault not in rounded], [fault.finding.port for fault in rounded]


def without_consequences(findings: list[Finding], session: Session) -> list[Fault]:
    """The faults, but for those that come right with what mends another one, where the port was run with it."""
    faults: list[Fault] = []
    settled: list[set[tuple[str, str, int]]] = []
    for finding in findings:
        session.settled, session.cause_at = set(), []
        diagnosis, was_run = diagnose(finding, session)
        place = session.settled, session.cause_at
        across = crossed(finding, diagnosis, session, lambda other: diagnose(other, session)[0])
        session.settled, session.cause_at = (set(), []) if across else place
        diagnosis, was_run = (across, False) if across else (diagnosis, was_run)
        moved = (
            []
            if was_run or across or _is_argument(diagnosis) or finding.is_leaf or len(faults) >= MOST_REARRANGED
            else rearranged([finding], session, least=1)[0]
        )
        if moved:
            faults.append(Fault(*moved[0], was_run=True))
        else:
            faults.append(Fault(finding if was_run else _where_told(finding, session), diagnosis, was_run))
        settled.append(session.settled if faults[-1].was_run else set())
    kept: list[int] = []
    for number, fault in enumerate(faults):
        others = (place for place in range(len(faults)) if place in kept or (place > number and not fault.was_run))
        if not any(places_of(fault.finding) <= settled[place] for place in others):
            kept.append(number)
    return [faults[number] for number in kept]


def _is_argument(diagnosis: str) -> bool:
    """Whether a reason is another number of one operation, as no node at another place makes it."""
    return diagnosis.startswith("when in `")


def _is_within(path: str, owner: str) -> bool:
    return path == owner or path.startswith(f"{owner}.")


def places_of(finding: Finding) -> set[tuple[str, str, int]]:
    """Where a finding shows."""
    return {one.point.place for one in (finding, *finding.others)}


def _where_told(finding: Finding, session: Session) -> Finding:
    """The finding at the node that runs what its cause is about, where that is known."""
    paths = session.cause_at
    if not paths or finding.is_leaf:
        return finding
    port = reduce(common_path, paths)
    if _is_within(finding.port, port):
        return replace(finding, port=port)
    # What was found further on is of the other node: another layer may have a cause of its own there.
    within = [one for one in finding.others if any(_runs_within(op, port, session) for op in one.port_region)]
    return replace(finding, port=port, others=tuple(within))


def _runs_within(operation: Operation, path: str, session: Session) -> bool:
    return _is_within(session.port_trace.path_of(operation), path)


def told_once(faults: list[Fault], trace: Trace) -> list[Fault]:
    """Of faults that show at one point for one reason, which follows from its values, one is kept.

    It is the one whose operations the reason names, else one that makes the value, else the innermost that computes.
    """
    reasons: dict[tuple[object, str], tuple[int, bool, bool, int, str]] = {}
    for fault in faults:
        operations, path = fault.finding.port_operations, fault.finding.port
        named = sum(f"{name_of(op)}(" in fault.diagnosis for op in operations)
        makes = bool(path) and any(_is_within(trace.path_of(op), path) for op in fault.finding.port_region[-1:])
        best = named, makes, not all(map(gives_shape, operations)), len(path), path
        for place in places_of(fault.finding) if fault.diagnosis and not fault.was_run else ():
            key = place, fault.diagnosis
            reasons[key] = max(reasons.get(key, best), best, key=lambda one: one[:4])
    kept: dict[tuple[object, ...], Fault] = {}
    for fault in faults:
        path = fault.finding.port
        if fault.was_run or reasons.get((fault.finding.point.place, fault.diagnosis), (path,))[-1] == path:
            kept.setdefault((path, fault.diagnosis, fault.was_run, "" if fault.diagnosis else len(kept)), fault)
    return _without_constants(list(kept.values()))


def _without_constants(faults: list[Fault]) -> list[Fault]:
    """Of faults that show at one point, one of which is explained, those are left out that only make a constant.

    Two sides often make one mask out of different constants.
    """

    def is_constant(fault: Fault) -> bool:
        finding = fault.finding
        return not finding.is_leaf and not any(operation.inputs for operation in finding.port_operations)

    explained = {f.finding.point.place: f.diagnosis for f in faults if f.diagnosis and not is_constant(f)}
    return [
        fault
        for fault in faults
        if not (is_constant(fault) and _says_no_more(fault, explained.get(fault.finding.point.place)))
        or fault.finding.point.place not in explained
    ]


def _says_no_more(fault: Fault, other: str | None) -> bool:
    return not fault.was_run or fault.diagnosis in ("", other)
