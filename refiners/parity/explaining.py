"""Explaining what is red in a report: one lane of each case, the one in which faults are clearest."""

from collections.abc import Callable, Mapping
from typing import Any

from refiners.parity.again import command_for
from refiners.parity.case import Case
from refiners.parity.depth import tell_with_depth
from refiners.parity.explain import Explanation
from refiners.parity.explained import try_to_explain
from refiners.parity.lanes import DEVICES, DTYPES, Lane
from refiners.parity.result import Result, Verdict
from refiners.parity.runner import CaseRunner
from refiners.parity.suite import Report
from refiners.parity.told import Told

SECONDS = 20.0
"""For the hypotheses about one case."""


def explained(runner: CaseRunner, lane: Lane, *, seconds: float, modules: str = "", verb: str = "show") -> Any:
    """The explanation of a case in a lane, or a line that says why there is none; see `try_to_explain`.

    Receives:
        modules: where the case comes from, for the command that shows it again.
        verb: of that command.
    """
    found = try_to_explain(runner, lane, seconds=seconds)
    if isinstance(found, Explanation):
        found.command = command_for(runner.case.id, modules, lane, verb)
    return found


def tell_why(runner: CaseRunner, lane: Lane, *, seconds: float = SECONDS, modules: str = "") -> Told:
    """The explanation of a case in a lane as data; where none can be had, its text says why."""
    found = explained(runner, lane, seconds=seconds, modules=modules)
    if isinstance(found, Explanation):
        return tell_with_depth(runner, lane, found)
    return Told(title=f"{runner.case.id}[{lane.name}]", lane=lane.name, text=str(found), notes=(str(found),))


def lane_to_explain(results: list[Result]) -> Lane | None:
    """Of the results of one case, the lane whose difference is the easiest to explain; None if there is none.

    What raised cannot be run side by side; its traceback says where it was.
    """
    unequal = {r.lane for r in results if r.verdict is not Verdict.BITWISE and not r.traceback}
    for device in DEVICES:
        for dtype in DTYPES:
            lane = Lane(dtype, device)
            if lane.name in unequal:
                return lane
    return None


def explain_failures(
    report: Report,
    cases: Mapping[str, Case],
    *,
    seconds: float = SECONDS,
    modules: str = "",
    progress: Callable[[str], None] | None = None,
) -> None:
    """Adds the explanations of all cases that may not stand to a report. Ctrl-C keeps those that are there.

    Receives:
        cases: id → case.
        seconds: for the hypotheses about each of them.
        modules: where they come from.
        progress: called with the id of a result before it is explained.
    """
    failed: dict[str, list[Result]] = {}
    for result in report.results:
        judged = report.judged.get(result.id)
        if judged is None or not judged.accepted:
            failed.setdefault(result.case, []).append(result)
    try:
        for case_id, results in failed.items():
            lane = lane_to_explain(results)
            told_already = any(result.id in report.explanations for result in results)
            if lane is None or told_already or case_id not in cases:
                continue
            if progress:
                progress(f"{case_id}[{lane.name}]")
            told = tell_why(CaseRunner(cases[case_id]), lane, seconds=seconds, modules=modules)
            report.explanations[f"{case_id}[{lane.name}]"] = told
    except KeyboardInterrupt:
        report.problems.append("interrupted: not all that differs is explained")
