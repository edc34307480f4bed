"""Explaining a difference: where the port parts from upstream, and why.

    explanation = explain(case, Lane("float32"))
    print(explanation)

Upstream is traced once, the port once by itself and once with its leaves taught (see `teacher`). Each fault that is
found is then diagnosed. Where bits differ at many leaves by rounding, the same is done in float64, and values that are
close count as equal, so that only what rounding cannot explain is left.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from refiners.parity.again import command_of
from refiners.parity.bits import same_bits
from refiners.parity.case import Case
from refiners.parity.fingerprint import Values
from refiners.parity.inputs import copy_for_one_side, draw_inputs, place_inputs
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.leaves import Pairing, keys_of_same, pairings, weight_leaves
from refiners.parity.operations import Trace
from refiners.parity.precision import look_at_precision
from refiners.parity.reasons.borders import Lesson, places_in, without_borders, without_parts, without_wholes
from refiners.parity.reasons.causes import ONLY_ROUNDING
from refiners.parity.reasons.diagnose import beyond_rounding
from refiners.parity.reasons.dtype_faults import dtype_faults
from refiners.parity.reasons.faults import Fault, told_once, without_consequences, without_rounding
from refiners.parity.reasons.gradients import explain_gradients
from refiners.parity.reasons.hypotheses import AS_UPSTREAM
from refiners.parity.reasons.localise import Finding, Locator
from refiners.parity.reasons.rearranged import rearranged
from refiners.parity.reasons.session import Fruitless, Session
from refiners.parity.reasons.teacher import Point, Run, Teacher, Where
from refiners.parity.reasons.wholes import crossed, is_clearer, wholes
from refiners.parity.runner import CaseRunner
from refiners.parity.torch_state import seed_torch
from refiners.parity.trace import record

MANY = 3
"""Of more faults than this, one of which is rounding, float64 tells which are more."""
LONG = 0.5
"""Seconds of a search after which it is not made again in float64."""


@dataclass
class Explanation:
    """Why a port differs from its upstream."""

    title: str
    port: nn.Module
    """Whose paths are named; as it was."""
    faults: list[Fault]
    marks: dict[str, str] = field(default_factory=dict[str, str])
    """Path of each paired leaf of the port → `equal`, `introduces` or `propagates`."""
    pairing: Pairing = field(default_factory=dict[str, str])
    """Path of a leaf of the port → path of the leaf of upstream."""
    notes: list[str] = field(default_factory=list[str])
    rounded: list[str] = field(default_factory=list[str])
    """Paths of the port that differ by rounding alone, beside faults."""
    command: str = ""
    """What shows this again."""
    seconds: float = 0.0

    @property
    def leaves(self) -> list[str]:
        """The paths to blame, in the order of the forward."""
        return [fault.finding.port for fault in self.faults]

    def __str__(self) -> str:
        from refiners.parity.explained import plain

        return plain(self)

    def __rich__(self) -> Any:
        from refiners.parity.explained import rich

        return rich(self)


def explain(case: Case | CaseRunner, lane: Lane, *, seconds: float = 60.0) -> Explanation:
    """Finds the faults of a case in a lane.

    Receives:
        case: a case, or its runner.
        lane: where the verdict is not BITWISE.
        seconds: after which no more hypotheses are tried. What was found until then is told.

    Returns:
        The faults in the order of the port's forward; none, with a note, where both sides are equal.

    Raises:
        ParityError: a side cannot be built, or the weights cannot be handed over.
    """
    runner = case if isinstance(case, CaseRunner) else CaseRunner(case)
    fruitless = Fruitless()
    found = _explain_in(runner, lane, seconds, fruitless, by_closeness=False)
    if any(fault.finding.point.agrees for fault in found.faults):
        return found  # of no value, but of dtypes
    unclear = bool(found.rounded) or any(not fault.diagnosis for fault in found.faults)
    unclear = unclear or (len(found.faults) > MANY and any(f.diagnosis == ONLY_ROUNDING for f in found.faults))
    unclear = unclear or len({fault.was_run for fault in found.faults}) > 1  # a consequence that is also rounded
    if not unclear or "float64" not in runner.case.lanes:
        return found
    known = fruitless.longer_than(LONG)
    wide = _explain_in(runner, Lane("float64", lane.device), seconds, known, by_closeness=True)
    some = len(wide.faults) or "none"
    count = "1 node differs" if len(found.faults) == 1 else f"{len(found.faults)} nodes differ"
    told = f"{count} in {lane.name}, {some} by more than rounding in float64"
    clearer = wide if wide.faults and len(wide.faults) <= len(found.faults) else found
    if all(fault.diagnosis == ONLY_ROUNDING for fault in wide.faults):
        found.faults = [replace(f, diagnosis=ONLY_ROUNDING) if _is_unclear(f) else f for f in found.faults]
    clearer.notes.append(told)
    return clearer


def _is_unclear(fault: Fault) -> bool:
    """Whether a fault may be one of rounding, for all that is told of it."""
    return not fault.diagnosis or fault.diagnosis.startswith(AS_UPSTREAM)


def _explain_in(
    runner: CaseRunner, lane: Lane, seconds: float, fruitless: Fruitless, *, by_closeness: bool
) -> Explanation:
    with held_equal(lane, threads=runner.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        upstream, port, _ = runner.sides(lane)
        found = explain_sides(
            runner.case, lane, upstream, port, by_closeness=by_closeness, seconds=seconds, fruitless=fruitless
        )
        if all(fault.diagnosis == ONLY_ROUNDING for fault in found.faults) and not by_closeness:
            seen = look_at_precision(runner.case, lane, (upstream, port), draw_inputs(runner.case))
            found.notes += seen.faults
            found.faults += dtype_faults(runner.case, lane, (upstream, port), found.pairing) if seen.faults else []
        if not found.faults and runner.case.gradients:
            found.notes += explain_gradients(
                upstream,
                port,
                lambda: runner.look(lane, upstream, is_port=False, gradients=True).outputs,
                lambda: runner.look(lane, port, is_port=True, gradients=True).outputs,
                found.pairing,
            )
        return found


def explain_sides(
    case: Case,
    lane: Lane,
    upstream: nn.Module,
    port: nn.Module,
    *,
    by_closeness: bool = False,
    seconds: float = 60.0,
    fruitless: Fruitless | None = None,
) -> Explanation:
    """The same of both sides of a case that were built already, under `held_equal(lane)`."""
    ours, theirs = runs_of(case, lane, upstream, port)
    found = explain_modules(
        upstream,
        port,
        ours,
        theirs,
        right_weights=case.key_map.convert(upstream.state_dict(), port),
        by_closeness=by_closeness,
        seed=case.seed,
        seconds=seconds,
        fruitless=fruitless,
    )
    found.title = f"{case.id}[{lane.name}]"
    found.command = command_of(case, lane)
    return found


def runs_of(case: Case, lane: Lane, upstream: nn.Module, port: nn.Module) -> tuple[Run, Run]:
    """What runs each side of a case once, forward only, on inputs of its own."""
    inputs = place_inputs(draw_inputs(case), lane.dtype, lane.device)
    return (
        lambda: case.run_upstream(upstream, copy_for_one_side(inputs, gradients=False)),
        lambda: case.run_port(port, copy_for_one_side(inputs, gradients=False)),
    )


def explain_modules(
    upstream: nn.Module,
    port: nn.Module,
    run_upstream: Run,
    run_port: Run,
    *,
    right_weights: Mapping[str, Tensor] | None = None,
    by_closeness: bool = False,
    seed: int = 0,
    seconds: float = 60.0,
    fruitless: Fruitless | None = None,
) -> Explanation:
    """The same of any two modules that hold the same weights.

    Receives:
        upstream, port: in eval mode; the port's weights are upstream's storages, as far as they can be.
        run_upstream, run_port: run them on inputs of their own; the same names of outputs.
        right_weights: port key → what the port should hold there, where it is known.
        by_closeness: for float64: whether values that are close count as equal.
        seed: what torch's generators are seeded with before each run.
        seconds: after which no more hypotheses are tried.
        fruitless: searches that found no cause before, which are not made again; more are added.
    """
    started = time.monotonic()

    run_upstream, run_port = warmed_up(run_upstream, run_port, seed)
    title = f"{type(upstream).__name__} and {type(port).__name__}"
    values = Values(by_closeness)
    ours, _ = record(upstream, run_upstream, values, read_views=True)
    free, _ = record(port, run_port, values)
    teacher = Teacher.listen(upstream, weight_leaves(upstream), run_upstream, values)
    teacher.often = Counter(call.path for call in free.calls)
    wrong = _wrong_weights(port, right_weights or {})
    offered = pairings(upstream, port, keys_of_same(upstream, right_weights or {}))
    lessons = [_lesson(teacher, port, run_port, pairing, ours, wrong) for pairing in offered]
    if teacher.unread.settle(upstream, run_upstream, teacher.outputs, teacher.calls):
        lessons = [_lesson(teacher, port, run_port, pairing, ours, wrong) for pairing in offered]
    best = min(lessons, key=lambda lesson: _burden(lesson[0], wrong))

    def again(pairing: Pairing) -> Lesson:
        return _lesson(teacher, port, run_port, pairing, ours, wrong)

    def again_with(other: Teacher, pairing: Pairing) -> Lesson:
        return _lesson(other, port, run_port, pairing, ours, wrong)

    if teacher.orders:
        teacher.orders.are_believed = False
        plain = again(best[2])
        teacher.orders.are_believed = _extent(best) < _extent(plain)
        best = best if teacher.orders.are_believed else plain
    best = without_wholes(without_parts(best, ours, again), again)
    best = without_borders(best, ours.known(), again)
    teacher, best = _with_wholes(teacher, best, upstream, port, run_upstream, again_with)
    findings, points, pairing, forced = best
    session = Session(
        upstream=upstream,
        port=port,
        run_port=run_port,
        teacher=teacher,
        pairing=pairing,
        right_weights=right_weights or {},
        upstream_trace=ours,
        port_trace=forced,
        deadline=started + seconds,
        run_upstream=run_upstream,
        fruitless=fruitless or Fruitless(),
    )
    session.start(points)
    session.recorded.ahead = [one for finding in findings for one in (finding, *finding.others)]
    moved, findings = rearranged(findings, session)
    findings = [beyond_rounding(finding, session) if finding.others else finding for finding in findings]
    faults = [Fault(finding, text, was_run=True) for finding, text in moved]
    faults += told_once(without_consequences(findings, session), forced)
    faults, rounded = without_rounding(faults)
    explanation = Explanation(title, port, faults, marks=_marks(points, free, ours, pairing), pairing=pairing)
    explanation.notes += _notes(faults, free, ours, session)
    explanation.rounded = rounded
    if rounded:
        explanation.notes.append(f"equal but for rounding: {', '.join(f'`{path}`' for path in rounded)}")
    explanation.seconds = round(time.monotonic() - started, 3)
    return explanation


def warmed_up(run_upstream: Run, run_port: Run, seed: int = 0) -> tuple[Run, Run]:
    """Runs that start from one seed and ask for no gradients.

    Both have run once: modules may make or exchange others then, and hooks are for those that are there afterwards.
    """

    def seeded(run: Run) -> Run:
        def again() -> Mapping[str, Tensor]:
            seed_torch(seed)
            with torch.no_grad():
                return run()

        return again

    runs = seeded(run_upstream), seeded(run_port)
    for run in runs:
        run()
    return runs


def _burden(findings: list[Finding], wrong: list[str]) -> tuple[int, int]:
    """How much a pairing has to blame: of as many faults, those of leaves are the simpler story.

    Values that come exchanged from leaves that do not hold what they should are the fault of those leaves.
    """
    denied = sum(not set(wrong).isdisjoint(finding.suspects) for finding in findings)
    return len(findings) + 2 * denied, sum(not finding.is_leaf for finding in findings)


def _extent(lesson: Lesson) -> tuple[int, int]:
    """How much is found: the findings, and the places they show at."""
    return len(lesson[0]), places_in(lesson[0])


def _lesson(
    teacher: Teacher, port: nn.Module, run: Run, pairing: Pairing, ours: Trace, wrong_weights: list[str]
) -> Lesson:
    points: list[Point] = []

    def forced() -> Mapping[str, Tensor]:
        with teacher.forcing(port, pairing, points):
            return run()

    trace, outputs = record(port, forced, teacher.values, read_views=True)
    wrong = [path for path in wrong_weights if path not in pairing]
    points += teacher.judge(outputs)
    return Locator(ours, trace, pairing, wrong).find(points), points, pairing, trace


def _with_wholes(
    teacher: Teacher,
    lesson: Lesson,
    upstream: nn.Module,
    port: nn.Module,
    run_upstream: Run,
    again: Callable[[Teacher, Pairing], Lesson],
) -> tuple[Teacher, Lesson]:
    """Modules that hold the same weights are taught as well, where findings lead through them and less is left then."""
    findings, _, pairing, trace = lesson
    found = crossed(findings, trace, wholes(upstream, port, pairing))
    if not found:
        return teacher, lesson
    more = {path: upstream.get_submodule(path) for path in found.values()}
    other = teacher.with_wholes(found, upstream, more, run_upstream)
    taught = again(other, pairing)
    return (other, taught) if is_clearer(taught, lesson, found) else (teacher, lesson)


def _wrong_weights(port: nn.Module, right: Mapping[str, Tensor]) -> list[str]:
    """Paths of the leaves of the port that do not hold what they should."""
    held = port.state_dict()
    keys = [key for key, tensor in right.items() if key not in held or not same_bits(held[key], tensor)]
    return list(dict.fromkeys(key.rpartition(".")[0] for key in keys))


def _marks(points: list[Point], free: Trace, ours: Trace, pairing: Pairing) -> dict[str, str]:
    """What each paired leaf does to the error when nothing is taught."""
    wrong = {point.port for point in points if point.where is Where.RETURNS and not point.agrees}
    marks: dict[str, str] = {}
    for path, other in pairing.items():
        here = [call.outputs for call in free.calls if call.path == path]
        there = [call.outputs for call in ours.calls if call.path == other]
        if here:
            marks[path] = "introduces" if path in wrong else "equal" if here == there else "propagates"
    return marks


def _notes(faults: list[Fault], free: Trace, ours: Trace, session: Session) -> list[str]:
    notes: list[str] = []
    if not faults:
        equal = free.outputs == ours.outputs
        told = "in the forward both sides are equal, bit for bit" if equal else ""
        notes.append(told or "the outputs differ, but every leaf and every way between two is equal")
    unpaired = [path for path in weight_leaves(session.port) if path not in session.pairing]
    if unpaired:
        notes.append(f"leaves of the port that no leaf of upstream stands for: {', '.join(unpaired[:6])}")
    if session.is_late():
        notes.append("the time for hypotheses was over before all were tried")
    return notes
