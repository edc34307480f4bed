"""`refiners parity drift`: the suite against the installed versions of upstream, and who moved where they differ."""

import importlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from refiners.errors import ParityError
from refiners.parity.case import Case
from refiners.parity.commands import DEFAULT_MODULES, collect
from refiners.parity.drift import TRUTH, Drift, Side, Stored, load, look, save, summarise
from refiners.parity.environment import package_behind, version_of
from refiners.parity.lanes import select_lanes
from refiners.parity.ledger import Ledger
from refiners.parity.registry import Registry
from refiners.parity.runner import CaseRunner

NO_TRUTH = "it has no float64 lane: nothing is stored of it"


def require_versions(versions: Sequence[str]) -> None:
    """Makes sure that the run is about the versions that it was asked for.

    Receives:
        versions: as `transformers==5.17.0`.

    Raises:
        ParityError: another version is installed, or none.
    """
    for wanted in versions:
        package, _, version = wanted.partition("==")
        if version_of(package) != f"{package} {version}":
            told = f"{wanted} is asked for, and {version_of(package)} is installed."
            raise ParityError(f"{told} Use `nox -s upstream -- {wanted}`.")


def write_summaries(path: Path, modules: str = DEFAULT_MODULES, *, console: Console | None = None) -> int:
    """Writes what upstream computes in every case under the installed versions.

    Returns:
        0 when every case was summarised, 1 when not.
    """
    console = console or Console()
    registry = collect(modules)
    stored: dict[str, Stored] = {}
    problems = list(registry.problems)
    for case in registry.cases:
        if TRUTH.name in case.lanes:
            try:
                stored[case.id] = summarise(case, registry.homes[case.id])
            except ParityError as error:
                problems.append(str(error))
    save(path, stored)
    console.print(f"{path}: {len(stored)} cases, {path.stat().st_size // 1024} KiB")
    for problem in problems:
        console.print(Text(f"✗ {problem}", style="red"), soft_wrap=True)
    return 1 if problems else 0


def run_drift(
    path: Path,
    modules: str = DEFAULT_MODULES,
    *,
    keyword: str = "",
    lanes: str = "",
    ledger_path: Path | None = None,
    json_path: Path | None = None,
    console: Console | None = None,
) -> int:
    """Runs cases under the installed versions, and prints which side has changed where they are not equal.

    Receives:
        path: what `write_summaries` wrote.
        modules: dotted names of case modules or packages, separated by commas.
        keyword: only cases whose id contains it.
        lanes: dtypes, separated by commas; "" stands for those of each case.
        ledger_path: what may not be bitwise.
        json_path: where to write everything.

    Returns:
        0 when all cases that could run are equal, 1 when not.

    Raises:
        ParityError: no case is left, an unknown lane, or a file that cannot be read.
    """
    console = console or Console()
    stored, registry = load(path), collect(modules)
    ledger = Ledger.load(ledger_path) if ledger_path else Ledger()
    absent, problems = _absent(registry, modules, stored, keyword)
    cases = [case for case in registry.cases if keyword in case.id]
    if not cases and not absent:
        raise ParityError("\n".join(problems) or f"No case id contains {keyword!r}.")
    names = [lane.strip() for lane in lanes.split(",") if lane.strip()] or None
    found = list(absent)
    for case in cases:
        drift = _look(case, stored.get(case.id), names, ledger)
        found.append(drift)
        if drift.side not in (Side.NONE, Side.ABSENT):
            console.print(Text(str(drift), style="yellow" if drift.is_equal else "red"), soft_wrap=True)
    for (upstream, reason), count in Counter(
        (drift.upstream, "; ".join(drift.reasons)) for drift in found if drift.side is Side.ABSENT
    ).items():
        console.print(Text(f"{count} cases absent: {upstream}: {reason}", style="yellow"), soft_wrap=True)
    console.print(_table(found))
    for problem in problems:
        console.print(Text(f"✗ {problem}", style="red"), soft_wrap=True)
    if json_path:
        json_path.write_text(json.dumps([asdict(drift) for drift in found], indent=1) + "\n", encoding="utf-8")
    return 1 if problems or any(not drift.is_equal and drift.side is not Side.ABSENT for drift in found) else 0


def _look(case: Case, stored: Stored | None, names: Sequence[str] | None, ledger: Ledger) -> Drift:
    runner = CaseRunner(case)
    results = [runner.run(lane) for lane in select_lanes(case.lanes, names)]
    if TRUTH.name in case.lanes:
        return look(case, stored, results, ledger)
    verdicts = {result.lane: str(result.verdict) for result in results}
    equal = all(ledger.judge(result).accepted for result in results)
    side = Side.NONE if equal else Side.UNKNOWN
    return Drift(case.id, side, results[0].upstream if results else "", "", [NO_TRUTH], verdicts=verdicts)


def _absent(registry: Registry, modules: str, stored: dict[str, Stored], keyword: str) -> tuple[list[Drift], list[str]]:
    """The cases of modules that ask for an upstream class that is not there, and all other problems."""
    homes = {one.module for one in stored.values()} - set(registry.homes.values())
    absent: list[Drift] = []
    excused: set[str] = set()
    for module in sorted(homes):
        if not any(module == name.strip() or module.startswith(f"{name.strip()}.") for name in modules.split(",")):
            continue
        error = _error_of_importing(module)
        package = package_behind(error) if isinstance(error, ImportError | AttributeError) else ""
        # What is not installed at all is no older or newer version of anything.
        if not package.endswith("is installed") or package.split(" ")[0] == module.split(".")[0]:
            continue
        excused.add(module)
        told = next(iter(str(error).splitlines()), "")
        absent += [
            Drift(
                case, Side.ABSENT, package.removesuffix(" is installed"), one.upstream, [f"importing {module}: {told}"]
            )
            for case, one in stored.items()
            if one.module == module and keyword in case
        ]
    problems = [problem for problem in registry.problems if not any(f"`{module}`" in problem for module in excused)]
    return absent, problems


def _error_of_importing(module: str) -> Exception | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a third party's module raises
        return error
    return None


def _table(found: Sequence[Drift]) -> Table:
    families = list(dict.fromkeys(drift.case.split("/")[0] for drift in found))
    counts = Counter((drift.case.split("/")[0], drift.side) for drift in found)
    table = Table(title="upstream moved, or we?", title_justify="left", pad_edge=False)
    table.add_column("")
    for family in families:
        table.add_column(family, justify="right")
    for side in Side:
        if any(counts[family, side] for family in families):
            table.add_row(str(side), *(str(counts[family, side] or "") for family in families))
    return table
