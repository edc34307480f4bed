"""`refiners parity mutants`: the kill table on a terminal and as JSON."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from refiners.errors import ParityError
from refiners.parity.case import Case
from refiners.parity.commands import DEFAULT_MODULES, collect
from refiners.parity.ledger import Ledger
from refiners.parity.mutants.equivalent import load_equivalents
from refiners.parity.mutants.kills import Family, Progress, Settings, hunt, require_case
from refiners.parity.mutants.mutate import How
from refiners.parity.mutants.operators import OPERATORS
from refiners.parity.mutants.witness import UNDECIDED

REQUIRED_RATE = 0.99


def run_mutants(
    modules: str = DEFAULT_MODULES,
    *,
    keyword: str = "",
    budget: float | None = None,
    seed: int = 0,
    per_case: int | None = None,
    every_case: bool = False,
    json_path: Path | None = None,
    equivalents_path: Path | None = None,
    ledger_path: Path | None = None,
    console: Console | None = None,
) -> int:
    """Plants faults in the ports of some cases, and prints how many of them the cases tell.

    Receives:
        modules: dotted names of case modules or packages, separated by commas.
        keyword: only the cases whose id contains it; or a mutant's id, or the beginning of one.
        budget: seconds. None: all mutants.
        seed: of the order in which they are tried.
        per_case: tries at most that many of each case.
        every_case: goes on planting faults that another case has killed, and tells what each case earns.
        json_path: where to write everything.
        equivalents_path: the claims about mutants that are no faults.
        ledger_path: cases that it excuses from being BITWISE are left out: a mutant would hide in what it excuses.

    Returns:
        0 when enough faults were killed and nothing is wrong with the run, 1 when not.

    Raises:
        ParityError: an unreadable file, no case to run, or none that the ledger does not excuse.
    """
    console = console or Console()
    registry = collect(modules)
    if not registry.cases:
        raise ParityError("\n".join(registry.problems))
    cases = _without_excused(require_case(registry.cases, keyword), ledger_path, console)
    settings = Settings(
        budget=budget,
        seed=seed,
        per_case=per_case,
        every_case=every_case,
        equivalents=load_equivalents(equivalents_path) if equivalents_path else (),
        keyword=keyword if "::" in keyword else "",
    )
    families = hunt(cases, settings, _printed_progress(console))
    if json_path:
        document = {"operators": {name: one.what for name, one in OPERATORS.items()}, "seed": seed, "budget": budget}
        tables = [family.to_json(earned=every_case) for family in families]
        json_path.write_text(json.dumps({**document, "families": tables}, indent=1) + "\n", encoding="utf-8")
    _print_report(console, families, every_case=every_case)
    for problem in registry.problems:
        console.print(Text(f"✗ {problem}", style="red"))
    return 0 if not registry.problems and all(map(_is_enough, families)) else 1


def _without_excused(cases: Sequence[Case], ledger_path: Path | None, console: Console) -> list[Case]:
    excused = {name for name, _ in Ledger.load(ledger_path).lines} if ledger_path else set[str]()
    for case in cases:
        if case.id in excused:
            console.print(Text(f"{case.id} is left out: the ledger has it as other than BITWISE", style="dim"))
    kept = [case for case in cases if case.id not in excused]
    if not kept:
        raise ParityError(f"The ledger excuses {', '.join(excused)} from being BITWISE: plant faults in another case.")
    return kept


def _is_enough(family: Family) -> bool:
    return bool(family.trials) and not family.problems and family.kill_rate >= REQUIRED_RATE


def _printed_progress(console: Console, every: float = 5.0) -> Progress:
    """A line a case, and one every few seconds in between."""
    last = {"at": time.monotonic(), "where": ""}

    def progress(where: str, number: int, total: int, family: Family) -> None:
        now = time.monotonic()
        if where == last["where"] and now - float(last["at"]) < every:
            return
        last["at"], last["where"] = now, where
        counts = f"{len(family.trials)} tried, {len(family.open)} not killed yet"
        console.print(Text(f"  {where}  {number} of {total}; {counts}", style="dim"), soft_wrap=True)

    return progress


def kill_table(families: Sequence[Family]) -> Table:
    """One column a family."""
    table = Table(title="planted faults", title_justify="left", pad_edge=False)
    table.add_column("")
    for family in families:
        table.add_column(family.name, justify="right")
    rows: dict[str, Callable[[Family], object]] = {
        "faults": lambda family: len(family.faults),
        "killed": lambda family: len(family.killed),
        **{f"  by {how}": lambda family, how=how: family.how[how] for how in How},
        "proved equivalent": lambda family: len(family.proved),
        "survived": lambda family: len(family.survived),
        "rate": lambda family: f"{family.kill_rate:.2%}",
        "mutants run": lambda family: len(family.trials),
        "masked in their case": lambda family: len(family.masked),
        "seconds": lambda family: f"{family.seconds:.0f}",
    }
    for name, cell in rows.items():
        table.add_row(name, *(str(cell(family)) for family in families))
    return table


def _print_report(console: Console, families: Sequence[Family], *, every_case: bool) -> None:
    console.print(kill_table(families))
    for family in families:
        for trial in family.survived.values():
            console.print(Text(f"survived  {trial.id}", style="red"), soft_wrap=True)
        for fault, reason in family.proved.items():
            console.print(Text(f"equivalent  {family.name}: {fault}: {reason}", style="dim"), soft_wrap=True)
        if every_case:
            _print_earned(console, family)
        if family.left_out:
            console.print(
                Text(f"{family.name}: {family.left_out} mutants were not tried, for lack of time", style="yellow")
            )
        for problem in family.problems:
            console.print(Text(f"✗ {problem}", style="red"), soft_wrap=True)
        if not family.trials:
            console.print(Text(f"✗ {family.name}: no mutant was tried", style="red"))


def _print_earned(console: Console, family: Family) -> None:
    table = Table(title=f"{family.name}: what only one case tells", title_justify="left", pad_edge=False)
    for column in ("case", "faults", "one of them"):
        table.add_column(column, overflow="fold")
    for case, roles in family.earned().items():
        table.add_row(case, str(len(roles)), roles[0] if roles else Text("nothing", style="yellow"))
    console.print(table)
    for case, inputs in family.inputs.items():
        for name, witness in inputs.items():
            if not witness:
                console.print(Text(f"{case}: its input {name!r} earns nothing", style="yellow"))
            elif witness.startswith(UNDECIDED.split("{")[0]):
                console.print(Text(f"{case}: what its input {name!r} earns was {witness}", style="yellow"))
