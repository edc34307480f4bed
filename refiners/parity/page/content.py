"""What the page says about a run, as data for the template."""

import datetime
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refiners.parity.again import command_for
from refiners.parity.case import Case
from refiners.parity.full_size import FullSizeResult
from refiners.parity.page.plot import Plot, plot
from refiners.parity.page.trees import Node, trees_of
from refiners.parity.report import FULL_SIZE, LANES, environment_lines
from refiners.parity.result import Result, Verdict
from refiners.parity.suite import AnyResult, Report
from refiners.parity.told import Told

NOT_RUN = "NOT RUN"
_SYMBOLS = {"BITWISE": "✓", "ROUNDING": "≈", "DIFFERENT": "✗", NOT_RUN: "–"}
_WORST_FIRST = ("DIFFERENT", NOT_RUN, "ROUNDING", "BITWISE")


@dataclass(frozen=True)
class Cell:
    """A verdict in the table."""

    column: str
    verdict: str
    text: str
    symbol: str
    is_known: bool = False
    """A difference that the ledger explains."""

    @property
    def kind(self) -> str:
        """The class of its colours."""
        return self.verdict.lower().replace(" ", "-")


@dataclass
class CaseView:
    """A row of the table, and what opens below it."""

    id: str
    family: str
    slug: str
    summary: str
    cells: list[Cell]
    verdict: str
    is_fault: bool
    """Whether it may not stand."""
    elements: int
    seconds: float
    results: list[Result]
    sizes: list[FullSizeResult]
    known: list[str]
    command: str
    upstream: str
    told: Told | None = None
    plot: Plot | None = None
    trees: tuple[Node | None, Node | None] = (None, None)
    tree_note: str = ""
    taps: Mapping[str, str] = field(default_factory=dict[str, str])
    is_open: bool = False
    wrong_lanes: list[str] = field(default_factory=list[str])
    """Those that may not stand."""

    @property
    def kind(self) -> str:
        """The class of its colours."""
        return self.verdict.lower().replace(" ", "-")

    @property
    def reason(self) -> str:
        """The weightiest reason of its first lane that is not equal."""
        reasons = [result.reason for result in (*self.results, *self.sizes) if result.reason]
        return reasons[0] if reasons else ""

    @property
    def raised_at(self) -> str:
        """The node of the port that raised, if it is a Chain's and all lanes that raised did there."""
        places = {tuple(re.findall(r"^At (\S+):$", traceback, re.MULTILINE)) for traceback, _ in self.tracebacks}
        return "".join(places.pop()[-1:]) if len(places) == 1 else ""

    @property
    def tracebacks(self) -> list[tuple[str, list[str]]]:
        """What was raised, once for all lanes that raised it, with these lanes."""
        found: dict[str, tuple[str, list[str]]] = {}
        for result in self.results:
            if result.traceback:
                found.setdefault(result.reason, (result.traceback.rstrip(), []))[1].append(result.lane)
        return list(found.values())


@dataclass
class Family:
    """The cases of a family."""

    name: str
    cases: list[CaseView]

    @property
    def equal(self) -> int:
        """How many of them are equal in all lanes."""
        return sum(case.verdict == "BITWISE" for case in self.cases)


def content(report: Report, cases: Mapping[str, Case], modules: str, *, with_trees: bool = True) -> dict[str, Any]:
    """Everything the template needs.

    Receives:
        report: what ran.
        cases: id → case, of those whose trees are shown.
        modules: where the cases come from, for the commands.
        with_trees: build both sides of each case once more to show their trees.
    """
    views = _views(report, cases, modules)
    for view in views:
        case = cases.get(view.id)
        if case is not None and with_trees:
            ours, theirs, view.tree_note = trees_of(case, view.told, view.raised_at)
            view.trees = ours, theirs
    faults = [view for view in views if view.is_fault]
    for view in faults[:1]:
        view.is_open = True
    families = {view.family: Family(view.family, []) for view in views}
    for view in views:
        families[view.family].cases.append(view)
    for family in families.values():
        family.cases.sort(key=lambda view: not view.is_fault)
    ids = set(report.registered) | {result.id for result in report.all_results}
    return {
        "ok": report.ok,
        "families": sorted(families.values(), key=lambda family: not any(view.is_fault for view in family.cases)),
        "faults": faults,
        "columns": columns_of(report),
        "counts": _counts(views),
        "total": len(views),
        "elements": sum(result.elements for result in report.results),
        "seconds": sum(result.seconds for result in report.all_results),
        "problems": [told for told in report.problems if told.partition(": ")[0] not in ids],
        "left_out": report.left_out,
        "environment": environment_lines(report),
        "when": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "symbols": _SYMBOLS,
    }


def columns_of(report: Report) -> list[str]:
    """The lanes that occur, in their order, and one column for all full sizes."""
    lanes = {_lane_of(item) for item in report.registered} | {result.lane for result in report.all_results}
    sizes = any(lane.startswith("meta:") for lane in lanes)
    return [lane for lane in LANES if lane in lanes] + ([FULL_SIZE] if sizes else [])


def _lane_of(item: str) -> str:
    return item.rpartition("[")[2].removesuffix("]")


def _views(report: Report, cases: Mapping[str, Case], modules: str) -> list[CaseView]:
    by_case: dict[str, list[AnyResult]] = {item.rpartition("[")[0]: [] for item in report.registered}
    for result in report.all_results:
        by_case.setdefault(result.case, []).append(result)
    unran: dict[str, set[str]] = {}
    for item in report.unran():
        unran.setdefault(item.rpartition("[")[0], set()).add(_lane_of(item))
    columns = columns_of(report)
    return [
        _view(case_id, results, unran.get(case_id, set()), columns, report, cases.get(case_id), modules)
        for case_id, results in by_case.items()
    ]


def _view(
    case_id: str,
    results: list[AnyResult],
    unran: set[str],
    columns: Sequence[str],
    report: Report,
    case: Case | None,
    modules: str,
) -> CaseView:
    computed = [result for result in results if isinstance(result, Result)]
    sizes = [result for result in results if isinstance(result, FullSizeResult)]
    cells = [cell for column in columns if (cell := _cell(column, results, unran, report)) is not None]
    verdicts = {cell.verdict for cell in cells}
    judged = [report.judged.get(result.id) for result in results]
    told = next((report.explanations[r.id] for r in computed if r.id in report.explanations), None)
    return CaseView(
        id=case_id,
        family=case_id.split("/", 1)[0],
        slug=re.sub(r"[^\w.-]+", "-", case_id),
        summary=case.summary if case else "",
        cells=cells,
        verdict=next((verdict for verdict in _WORST_FIRST if verdict in verdicts), "BITWISE"),
        is_fault=any(judgement is not None and not judgement.accepted for judgement in judged),
        elements=sum(result.elements for result in computed),
        seconds=sum(result.seconds for result in results),
        results=computed,
        sizes=sizes,
        known=[judgement.message for judgement in judged if judgement is not None and judgement.known_gap],
        command=command_for(case_id, modules),
        upstream=next((result.upstream for result in computed if result.upstream), ""),
        told=told,
        plot=plot(told.depth) if told else None,
        taps=case.taps if case else {},
        wrong_lanes=[r.lane for r, j in zip(results, judged, strict=True) if j is not None and not j.accepted],
    )


def _cell(column: str, results: Sequence[AnyResult], unran: set[str], report: Report) -> Cell | None:
    if column == FULL_SIZE:
        return _sizes_cell([r for r in results if isinstance(r, FullSizeResult)], unran)
    if column in unran:
        return Cell(column, NOT_RUN, NOT_RUN.lower(), _SYMBOLS[NOT_RUN])
    for result in results:
        if isinstance(result, Result) and result.lane == column:
            judged = report.judged.get(result.id)
            known = judged is not None and judged.accepted and result.verdict is not Verdict.BITWISE
            return Cell(column, str(result.verdict), str(result.verdict), _SYMBOLS[result.verdict], known)
    return Cell(column, "", "", "")


def _sizes_cell(sizes: list[FullSizeResult], unran: set[str]) -> Cell:
    waiting = sum(lane.startswith("meta:") for lane in unran)
    if not sizes:
        return Cell(FULL_SIZE, NOT_RUN, NOT_RUN.lower(), "–") if waiting else Cell(FULL_SIZE, "", "", "")
    equal = sum(size.equal for size in sizes)
    verdict = "BITWISE" if equal == len(sizes) and not waiting else "DIFFERENT" if equal < len(sizes) else NOT_RUN
    return Cell(FULL_SIZE, verdict, f"{equal} of {len(sizes) + waiting} equal", _SYMBOLS[verdict])


def _counts(views: Sequence[CaseView]) -> list[tuple[str, str, int]]:
    """Verdict, class and number of cases, the worst first."""
    counts = Counter(view.verdict for view in views)
    return [(v, v.lower().replace(" ", "-"), counts[v]) for v in _WORST_FIRST if counts[v]]
