"""What people see: a table that grows while a run goes on, one case in full, and the table of the README."""

import json
import os
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from refiners import __version__
from refiners.parity.full_size import FullSizeResult
from refiners.parity.lanes import DEVICES, DTYPES, Lane
from refiners.parity.result import Result, Verdict
from refiners.parity.suite import AnyResult, Item, Report
from refiners.parity.told import Told

STYLES = {Verdict.BITWISE: "green", Verdict.ROUNDING: "yellow", Verdict.DIFFERENT: "bold red"}
LANES = [Lane(dtype, device).name for device in DEVICES for dtype in DTYPES]
FULL_SIZE = "full size"
WIDE, WIDEST = 110, 130
LONGEST_LINE = 400
MOST_ROWS = 30
"""Of the table in a summary."""


def _column(result: AnyResult) -> str:
    return FULL_SIZE if isinstance(result, FullSizeResult) else result.lane


def _cell(results: Sequence[AnyResult]) -> Text:
    sizes = [result.equal for result in results if isinstance(result, FullSizeResult)]
    if len(sizes) > 1:
        return Text(f"{sum(sizes)} of {len(sizes)} equal", style="green" if all(sizes) else "bold red")
    cell = Text()
    for result in results:
        if cell:
            cell.append(" ")
        if isinstance(result, Result):
            cell.append(result.verdict, style=STYLES[result.verdict])
        else:
            cell.append("equal" if result.equal else "DIFFERENT", style="green" if result.equal else "bold red")
    return cell


def results_table(results: Sequence[AnyResult], cases: Sequence[str] | None = None, *, width: int = WIDE) -> Table:
    """Cases × lanes, the verdicts coloured, with what was compared.

    Receives:
        results: in any order.
        cases: the rows; by default those with a result.
        width: of the terminal. The counts are left out of a narrow one, so that the verdicts can be read.
    """
    rows = list(cases) if cases is not None else list(dict.fromkeys(result.case for result in results))
    found = {_column(result) for result in results}
    columns = [column for column in [*LANES, FULL_SIZE] if column in found]
    table = Table(title="parity", title_justify="left", pad_edge=False)
    table.add_column("case", overflow="fold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    counts = ("leaves", "elements", "seconds") if width >= WIDEST else ("elements", "seconds") if width >= WIDE else ()
    for column in counts:
        table.add_column(column, justify="right")
    for row in rows:
        own = [result for result in results if result.case == row]
        computed = [result for result in own if isinstance(result, Result)]
        totals = {
            "leaves": str(max((result.leaves for result in computed), default=0)),
            "elements": f"{sum(result.elements for result in computed):,}",
            "seconds": f"{sum(result.seconds for result in own):.2f}",
        }
        cells = [_cell([result for result in own if _column(result) == column]) for column in columns]
        table.add_row(row, *cells, *(totals[count] for count in counts))
    return table


def summary(report: Report) -> Text:
    """One line: how many results of each kind, and whether the run is in order."""
    counts = Counter(result.verdict for result in report.results)
    parts = [f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]]
    if report.full_size:
        parts.append(f"{sum(result.equal for result in report.full_size)} of {len(report.full_size)} full sizes equal")
    elements = sum(result.elements for result in report.results)
    told = f"{', '.join(parts) or 'nothing ran'}; {elements:,} elements compared"
    return Text(told, style="green" if report.ok else "red")


@contextmanager
def live_progress(console: Console, items: Sequence[Item]) -> Generator["Progress", None, None]:
    """A table that fills while a run goes on; in a plain output, one line for each result."""
    progress = Progress(console, items)
    if console.is_terminal:
        with Live(progress.render(), console=console, refresh_per_second=8, transient=True) as live:
            progress.live = live
            yield progress
    else:
        yield progress


class Progress:
    """Receives items and their results as a run goes on; see `live_progress`."""

    def __init__(self, console: Console, items: Sequence[Item]) -> None:
        self.console, self.items = console, items
        self.results: list[AnyResult] = []
        self.live: Live | None = None
        self.started = time.monotonic()

    def __call__(self, item: Item, result: AnyResult | None) -> None:
        if result is not None:
            self.results.append(result)
            if self.live is None:
                self.console.print(
                    Text.assemble(f"{len(self.results):>4}/{len(self.items)} ", item.id, " ", _cell([result]))
                )
        if self.live is not None:
            self.live.update(self.render(item.id if result is None else ""))

    def render(self, running: str = "") -> Group:
        """The table so far, its last rows if it is taller than the screen, and what runs now."""
        cases = list(dict.fromkeys(result.case for result in self.results))
        cases = cases[-max(5, self.console.height - 8) :]
        now = f", running {running}" if running else ""
        state = f"{len(self.results)} of {len(self.items)} done{now}; {self._left()}"
        shown = [result for result in self.results if result.case in cases]
        return Group(results_table(shown, cases, width=self.console.width), Text(state, style="dim"))

    def _left(self) -> str:
        done, took = len(self.results), time.monotonic() - self.started
        left = took / done * (len(self.items) - done) if done else 0.0
        return f"{took:.0f} s" + (f", about {left:.0f} s left" if left >= 1 else "")


def print_report(console: Console, report: Report) -> None:
    """The table, what is wrong, what it was measured with, and the summary."""
    if report.all_results:
        console.print(results_table(report.all_results, width=console.width))
    for problem in in_short(report):
        console.print(Text(f"✗ {problem}", style="red"), soft_wrap=True)
    for told in report.explanations.values():
        console.print(_in_short(told), soft_wrap=True)
    for told in report.left_out:
        console.print(Text(told, style="dim"), soft_wrap=True)
    console.print(Text(in_one_line(environment_lines(report)), style="dim"), soft_wrap=True)
    console.print(summary(report))


def in_short(report: Report) -> list[str]:
    """The problems, a line each: what is wrong in several lanes of a case in the same way is one."""
    lanes: dict[tuple[str, str], list[str]] = {}
    for problem in report.problems:
        item, _, message = problem.partition(": ")
        case, bracket, lane = item.removesuffix("]").rpartition("[")
        known = bracket and any(result.id == item for result in report.all_results)
        key = (case, message) if known else ("", problem)
        lanes.setdefault(key, []).append(lane)
    lines = [f"{case}[{', '.join(names)}]: {told}" if case else told for (case, told), names in lanes.items()]
    flat = [" ".join(line.split()) for line in lines]
    return [line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 1]}…" for line in flat]


def _in_short(told: Told) -> Text:
    """An explanation in one line for each fault."""
    text = Text(f"{told.title}\n" if told.faults else "", style="bold")
    for group in told.kinds[:4]:
        fault = group.first
        text.append(f"  {group.where or 'the port itself'} ", style="red")
        text.append(f"{fault.headline}\n", style="not bold")
        if fault.diagnosis:
            text.append(f"    equal {fault.diagnosis}\n", style="green")
    if len(told.kinds) > 4:
        text.append(f"  and {len(told.kinds) - 4} more\n", style="not bold")
    text.append(f"  {told.command}" if told.faults else told.text, style="not bold dim")
    return text


def environment_lines(report: Report) -> list[tuple[str, str]]:
    """Versions and devices as names and values, for every report that people read."""
    found = report.environment
    lines = [("refiners", __version__), *((name, str(found.get(name, ""))) for name in ("python", "torch"))]
    for upstream in report.upstream:
        name, _, version = upstream.partition(" ")
        if name != "torch" and version:
            lines.append((name, version))
    lines.append(("cpu", f"{found.get('machine', '')} {found.get('cpu_capability', '')}".strip()))
    cuda: Mapping[str, Any] = found.get("cuda", {})
    if cuda:
        lines.append(("cuda", f"{cuda['device']}, {cuda['capability']}, runtime {cuda['runtime']}"))
        lines += [("cudnn", str(cuda["cudnn"])), ("driver", str(cuda["driver"]))]
    return lines


def in_one_line(lines: Sequence[tuple[str, str]]) -> str:
    """The same for a terminal."""
    return " · ".join(f"{name} {value}" for name, value in lines)


def render_summary(report: Report) -> str:
    """A short summary as markdown, for the page of a GitHub job."""
    cases = list(dict.fromkeys(result.case for result in report.all_results))
    wrong: dict[str, list[AnyResult]] = {}
    for result in report.all_results:
        judged = report.judged.get(result.id)
        if judged is not None and not judged.accepted:
            wrong.setdefault(result.case, []).append(result)
    head = f"{len(wrong)} of {len(cases)} cases differ" if wrong else f"{len(cases)} cases may stand"
    head = head if report.ok or wrong else "the run is not in order"
    lines = [f"### {'✅' if report.ok else '❌'} Parity: {head}", "", summary(report).plain + ".", ""]
    if wrong:
        lines += [_row(["case", "lanes", "what"]), _row(["---"] * 3)]
        lines += [_wrong_row(case, results, report) for case, results in list(wrong.items())[:MOST_ROWS]]
        lines += [f"\nand {len(wrong) - MOST_ROWS} more"] if len(wrong) > MOST_ROWS else []
    ids = {*report.registered, *(result.id for result in report.all_results)}
    others = [f"- {problem}" for problem in report.problems if problem.partition(": ")[0] not in ids]
    lines += [*others[:MOST_ROWS], *([f"- and {len(others) - MOST_ROWS} more"] if len(others) > MOST_ROWS else [])]
    lines += [f"- {told}" for told in report.left_out]
    versions = ", ".join(f"{name} {value}" for name, value in environment_lines(report))
    return "\n".join([*lines, "", f"Measured with {versions}."]) + "\n"


def write_summary(path: Path | None, report: Report) -> None:
    """Writes the summary to a file, or appends it to the one that GITHUB_STEP_SUMMARY names; else does nothing."""
    if path is not None:
        path.write_text(render_summary(report), encoding="utf-8")
    elif os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(os.environ["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as file:
            file.write(render_summary(report) + "\n")


def _wrong_row(case: str, results: Sequence[AnyResult], report: Report) -> str:
    told = next((report.explanations[r.id] for r in results if r.id in report.explanations), None)
    what = results[0].reason
    if told is not None and told.faults:
        fault = told.faults[0]
        what = f"`{told.kinds[0].where or 'the port itself'}` {fault.headline}."
        what += f" **Equal {fault.diagnosis}.**" if fault.diagnosis else ""
    lanes = ", ".join(result.lane for result in results)
    return _row([f"`{case}`", lanes, what.replace("|", "\\|").replace("\n", " ")[:400]])


def describe(result: AnyResult) -> str:
    """Everything known about one result, for `refiners parity show` and for a failing test."""
    if isinstance(result, FullSizeResult):
        state = "keys and shapes are equal" if result.equal else result.reason
        return f"{result.id}: {state}\n  {result.tensors} tensors, {result.elements:,} weights"
    lines = [f"{result.id}: {result.verdict}"]
    lines += [f"  - {reason}" for reason in result.reasons]
    if result.worst:
        lines.append(f"  worst element: {result.worst}, {result.worst.difference:.3g} apart")
    lines.append(f"  compared: {result.tensors} tensors, {result.elements:,} elements, {result.leaves} leaves ran")
    for what, ours, theirs in (
        ("outputs", result.error_upstream, result.error_port),
        ("gradients", result.gradient_error_upstream, result.gradient_error_port),
    ):
        if ours is not None and theirs is not None:
            lines.append(f"  error of the {what} against float64: upstream {ours:.3g}, port {theirs:.3g}")
    if result.without_gradient:
        lines.append(f"  weights with an exactly zero gradient: {result.without_gradient:.1%}")
    lines += [f"  note: {note}" for note in result.notes]
    lines.append(f"  upstream: {result.upstream or 'unknown'}; {result.seconds:.2f} s")
    if result.traceback:
        lines += ["", *(f"  {line}" for line in result.traceback.rstrip().splitlines())]
    return "\n".join(lines)


def write_json(path: Path, report: Report) -> None:
    """Writes `parity.json`: to a temporary file first, so that an interrupted write leaves the old one."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def render_readme_table(data: Mapping[str, Any]) -> str:
    """The table of the README, as markdown: families × lanes, from the contents of a `parity.json`.

    Returns:
        the same text for the same verdicts, counts and versions; times and errors do not stand in it.
    """
    results = [Result.from_json(row) for row in data["results"]]
    full_size = [FullSizeResult(**row) for row in data["full_size"]]
    lanes = [lane for lane in LANES if any(result.lane == lane for result in results)]
    families = sorted({result.case.split("/")[0] for result in (*results, *full_size)})
    head = ["family", "cases", *lanes, FULL_SIZE, "elements compared"]
    lines = [_row(head), _row(["---"] * len(head))]
    for family in families:
        own = [result for result in results if result.case.split("/")[0] == family]
        sizes = [result for result in full_size if result.case.split("/")[0] == family]
        lines.append(
            _row(
                [
                    f"`{family}`",
                    str(len({result.case for result in (*own, *sizes)})),
                    *(_tally([result.verdict for result in own if result.lane == lane]) for lane in lanes),
                    f"{sum(size.equal for size in sizes)}/{len(sizes)}" if sizes else "",
                    f"{sum(result.elements for result in own):,}",
                ]
            )
        )
    environment = data["environment"]
    upstream = [version for version in environment.get("upstream", []) if not version.startswith("torch ")]
    versions = ", ".join([f"torch {environment['torch']}", *upstream])
    return "\n".join([*lines, "", f"Measured with {versions}."]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _tally(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(verdicts)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
