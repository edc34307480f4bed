"""What `refiners parity list | run | show | explain` do. Each prints to a console and returns the exit code."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from refiners.errors import ParityError
from refiners.parity.explaining import explain_failures, explained, lane_to_explain
from refiners.parity.full_size import FullSizeResult
from refiners.parity.lanes import devices_of, select_lanes
from refiners.parity.leaf_again import leaf_of_case
from refiners.parity.ledger import Ledger
from refiners.parity.registry import DEFAULT_MODULES, Registry, collect_cases
from refiners.parity.report import (
    STYLES,
    describe,
    environment_lines,
    in_one_line,
    live_progress,
    print_report,
    write_json,
    write_summary,
)
from refiners.parity.result import Result, Verdict
from refiners.parity.runner import CaseRunner
from refiners.parity.selection import Selection
from refiners.parity.shards import Shard
from refiners.parity.suite import INTERRUPTED, Baseline, Report, register, run

MOST_EXPLAINED = 5
"""More cases than this are explained for a page, or when asked."""


def collect(modules: str) -> Registry:
    """Cases are looked for beside the user, as `python -m` would."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return collect_cases(modules)


def _names(lanes: str) -> Sequence[str] | None:
    return [lane.strip() for lane in lanes.split(",") if lane.strip()] or None


def list_cases(modules: str = DEFAULT_MODULES, *, console: Console | None = None) -> int:
    """Prints the cases of some modules. The exit code is 1 when a module cannot be used."""
    console = console or Console()
    registry = collect(modules)
    table = Table(pad_edge=False)
    for column in ("case", "lanes", "full sizes", "what"):
        table.add_column(column, overflow="fold")
    for case in registry.cases:
        table.add_row(case.id, " ".join(case.lanes), " ".join(case.full_size), case.summary)
    if registry.cases:
        console.print(table)
    for problem in registry.problems:
        console.print(Text(f"✗ {problem}", style="red"))
    return 1 if registry.problems else 0


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a run is written to, beside the terminal."""

    json: Path | None = None
    junit: Path | None = None
    html: Path | None = None
    """A folder: the page is its `index.html`."""
    summary: Path | None = None
    """Markdown. By default what GITHUB_STEP_SUMMARY names, which is appended to."""

    def write(self, report: Report, registry: Registry, modules: str) -> list[Path]:
        """Writes all that was asked for; the paths of what people open."""
        from refiners.parity.junit import write_junit
        from refiners.parity.page import write_page

        if self.json:
            write_json(self.json, report)
        if self.junit:
            write_junit(self.junit, report)
        write_summary(self.summary, report)
        if self.html:
            return [write_page(self.html, report, {case.id: case for case in registry.cases}, modules)]
        return []

    def check(self) -> None:
        """Fails before the run rather than after it.

        Raises:
            ParityError: a path cannot be written to.
        """
        for path in (self.json, self.junit, self.summary):
            if path is not None and (path.is_dir() or not path.parent.is_dir()):
                told = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
                raise ParityError(f"{path} {told}. Nothing was run.")
        if self.html is not None and self.html.exists() and not self.html.is_dir():
            raise ParityError(f"{self.html} is a file; --html wants a folder. Nothing was run.")


def run_cases(
    modules: str = DEFAULT_MODULES,
    *,
    keyword: str = "",
    lanes: str = "",
    device: str = "cpu",
    outputs: Outputs | None = None,
    ledger_path: Path | None = None,
    baseline_path: Path | None = None,
    shard: str = "",
    changed: bool = False,
    explain: bool | None = None,
    console: Console | None = None,
) -> int:
    """Runs cases and prints the table while they run. Ctrl-C ends the run; what was measured is reported and written.

    Receives:
        modules: dotted names of case modules or packages, separated by commas.
        keyword: runs only the cases whose id contains it.
        lanes: dtypes to restrict the run to, separated by commas.
        device: `cpu`, `cuda` or `all`.
        outputs: where to write the results.
        ledger_path: the ledger that excuses what is not bitwise.
        baseline_path: a committed `parity.json`; comparing less than it is an error, and its times balance shards.
        shard: `2/5` runs the second of five shares.
        changed: runs only what did not pass before with the same digest.
        explain: find out where and why cases differ. None: if there is a page to show it, or few differ.

    Returns:
        0 when everything ran and may stand, 1 when not.

    Raises:
        ParityError: an unknown lane, device or shard, a file that cannot be used, or no case to run.
    """
    console, outputs = console or Console(), outputs or Outputs()
    outputs.check()
    registry = collect(modules)
    cases = [case for case in registry.cases if keyword in case.id]
    if not cases:
        raise ParityError("\n".join(registry.problems) or f"No case id contains {keyword!r}.")
    devices, names = devices_of(device), _names(lanes)
    ledger = Ledger.load(ledger_path) if ledger_path else Ledger()
    baseline = Baseline.load(baseline_path) if baseline_path else Baseline()
    selection = Selection(
        registry=registry, ledger=ledger, seconds=baseline.seconds, shard=Shard.parse(shard) if shard else None,
        folder=Path.cwd(), changed=changed,
    )  # fmt: skip
    items = selection.choose(register(cases, lanes=names, devices=devices))
    with live_progress(console, items[0]) as progress:
        report = run(
            cases,
            lanes=names,
            devices=devices,
            ledger=ledger,
            baseline=baseline,
            complete=modules == DEFAULT_MODULES and not keyword and not registry.problems,
            known=registry.cases,
            choose=lambda _: items,
            progress=progress,
        )
    report.problems[:0] = registry.problems
    selection.keep(report)
    failed = {result.case for result in report.results if not report.judged[result.id].accepted}
    is_waited_for = INTERRUPTED not in report.problems and (outputs.html or len(failed) <= MOST_EXPLAINED)
    if explain or (explain is None and is_waited_for):
        _explain(report, registry, modules, console)
    pages = outputs.write(report, registry, modules)
    print_report(console, report)
    for page in pages:
        console.print(Text(f"page: {page}"), soft_wrap=True)
    return 0 if report.ok else 1


def _explain(report: Report, registry: Registry, modules: str, console: Console) -> None:
    cases = {case.id: case for case in registry.cases}
    if not console.is_terminal:
        explain_failures(report, cases, modules=modules)
        return
    with console.status("explaining what differs") as status:
        explain_failures(report, cases, modules=modules, progress=lambda told: status.update(f"explaining {told}"))


def show_case(
    case_id: str,
    modules: str = DEFAULT_MODULES,
    *,
    lanes: str = "",
    device: str = "cpu",
    seconds: float = 60.0,
    ledger_path: Path | None = None,
    console: Console | None = None,
) -> int:
    """Runs one case and prints everything known about it; where it differs, also where and why.

    Receives:
        seconds: for the hypotheses about why it differs; 0 to leave the explanation out.
        ledger_path: the ledger that excuses what is not bitwise.

    Returns:
        0 when it may stand everywhere, 1 when not.

    Raises:
        ParityError: there is no such case, lane or device.
    """
    console = console or Console()
    case = collect(modules).one(case_id)
    ledger = Ledger.load(ledger_path) if ledger_path else None
    runners: dict[str, CaseRunner] = {}
    report = run([case], lanes=_names(lanes), devices=devices_of(device), ledger=ledger, known=[], runners=runners)
    if case.summary:
        console.print(Text(case.summary, style="dim"))
    for result in report.all_results:
        verdict = result.verdict if isinstance(result, Result) else Verdict.BITWISE
        style = STYLES[verdict] if isinstance(result, FullSizeResult) or verdict is not Verdict.BITWISE else ""
        first, _, rest = describe(result).partition("\n")
        console.print(Text.assemble((first, style or "green"), f"\n{rest}"), soft_wrap=True)
        judged = report.judged[result.id]
        if judged.accepted and verdict is not Verdict.BITWISE:
            console.print(Text(f"  it may stand: {judged.message}", style="yellow"), soft_wrap=True)
    lane = lane_to_explain(report.results)
    if lane is not None and seconds > 0:
        console.print()
        runner = runners.get(case.id) or CaseRunner(case)
        console.print(explained(runner, lane, seconds=seconds, modules=modules), soft_wrap=True)
    console.print(Text(in_one_line(environment_lines(report)), style="dim"), soft_wrap=True)
    return 0 if report.ok else 1


def explain_case(
    case_id: str,
    modules: str = DEFAULT_MODULES,
    *,
    lanes: str = "",
    device: str = "cpu",
    seconds: float = 60.0,
    leaf: str = "",
    console: Console | None = None,
) -> int:
    """Finds out where and why a port differs, in each lane in which it does.

    Receives:
        case_id: as `refiners parity list` prints it.
        modules, lanes, device: as for `run_cases`.
        leaf: the path of a leaf of the port, which alone is fed upstream's inputs and shown.
        seconds: after which no more hypotheses are tried, in each lane.

    Returns:
        0 when it is BITWISE in all lanes, 1 when not.

    Raises:
        ParityError: there is no such case, lane or device.
    """
    console = console or Console()
    runner = CaseRunner(collect(modules).one(case_id))
    equal = True
    for lane in select_lanes(runner.case.lanes, _names(lanes), devices_of(device)):
        if leaf:
            console.print(Text(leaf_of_case(runner, lane, leaf)), soft_wrap=True)
            continue
        result = runner.run(lane)
        if result.verdict is Verdict.BITWISE:
            console.print(Text(f"{result.id}: BITWISE, nothing to explain", style="green"))
            continue
        equal = False
        console.print(Text(f"{result.id}: {result.verdict}: {result.reason}"), soft_wrap=True)
        console.print(explained(runner, lane, seconds=seconds, modules=modules, verb="explain"), soft_wrap=True)
    return 0 if equal else 1
