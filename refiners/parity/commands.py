"""What `refiners parity list | run | show | explain` do. Each prints to a console and returns the exit code."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from refiners.errors import ParityError
from refiners.parity.explained import try_to_explain
from refiners.parity.lanes import devices_of, select_lanes
from refiners.parity.ledger import Ledger
from refiners.parity.registry import Registry, collect_cases
from refiners.parity.report import describe, live_progress, print_report, write_json
from refiners.parity.result import Verdict
from refiners.parity.runner import CaseRunner
from refiners.parity.suite import Baseline, register, run

DEFAULT_MODULES = "parity_tests.cases"


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


def run_cases(
    modules: str = DEFAULT_MODULES,
    *,
    keyword: str = "",
    lanes: str = "",
    device: str = "cpu",
    json_path: Path | None = None,
    ledger_path: Path | None = None,
    baseline_path: Path | None = None,
    console: Console | None = None,
) -> int:
    """Runs cases and prints the table while they run.

    Receives:
        modules: dotted names of case modules or packages, separated by commas.
        keyword: runs only the cases whose id contains it.
        lanes: dtypes to restrict the run to, separated by commas.
        device: `cpu`, `cuda` or `all`.
        json_path: where to write the results.
        ledger_path: the ledger that excuses what is not bitwise.
        baseline_path: a committed `parity.json`; comparing less than it is an error.

    Returns:
        0 when everything ran and may stand, 1 when not.

    Raises:
        ParityError: an unknown lane or device, an unreadable file, or no case to run.
    """
    console = console or Console()
    registry = collect(modules)
    cases = [case for case in registry.cases if keyword in case.id]
    if not cases:
        raise ParityError("\n".join(registry.problems) or f"No case id contains {keyword!r}.")
    devices, names = devices_of(device), _names(lanes)
    ledger = Ledger.load(ledger_path) if ledger_path else None
    baseline = Baseline.load(baseline_path) if baseline_path else None
    complete = modules == DEFAULT_MODULES and not keyword and not registry.problems
    items = register(cases, lanes=names, devices=devices)
    with live_progress(console, items) as progress:
        report = run(
            cases, lanes=names, devices=devices, ledger=ledger, baseline=baseline, complete=complete, progress=progress
        )
    report.problems[:0] = registry.problems
    if json_path:
        write_json(json_path, report)
    print_report(console, report)
    return 0 if report.ok else 1


def show_case(
    case_id: str,
    modules: str = DEFAULT_MODULES,
    *,
    lanes: str = "",
    device: str = "cpu",
    console: Console | None = None,
) -> int:
    """Runs one case and prints everything known about it.

    Returns:
        0 when it is BITWISE everywhere, 1 when not.

    Raises:
        ParityError: there is no such case, lane or device.
    """
    console = console or Console()
    case = collect(modules).one(case_id)
    report = run([case], lanes=_names(lanes), devices=devices_of(device))
    if case.summary:
        console.print(Text(case.summary, style="dim"))
    for result in (*report.results, *report.full_size):
        console.print(Text(describe(result)), soft_wrap=True)
    return 0 if report.ok else 1


def explain_case(
    case_id: str,
    modules: str = DEFAULT_MODULES,
    *,
    lanes: str = "",
    device: str = "cpu",
    seconds: float = 60.0,
    console: Console | None = None,
) -> int:
    """Finds out where and why a port differs, in each lane in which it does.

    Receives:
        case_id: as `refiners parity list` prints it.
        modules, lanes, device: as for `run_cases`.
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
        result = runner.run(lane)
        if result.verdict is Verdict.BITWISE:
            console.print(Text(f"{result.id}: BITWISE, nothing to explain", style="green"))
            continue
        equal = False
        console.print(Text(f"{result.id}: {result.verdict}: {result.reason}"), soft_wrap=True)
        console.print(try_to_explain(runner, lane, seconds=seconds), soft_wrap=True)
    return 0 if equal else 1
