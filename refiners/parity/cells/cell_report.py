"""What `refiners parity cells` does: every metamorphic cell of every case, as a table."""

from collections import Counter
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from refiners.errors import ParityError
from refiners.parity.cells.metamorphic import CELLS, Finding, Outcome, check_cells
from refiners.parity.commands import DEFAULT_MODULES, collect


def run_cells(
    modules: str = DEFAULT_MODULES, *, keyword: str = "", cells: str = "", console: Console | None = None
) -> int:
    """Runs the cells of some cases and prints how many hold, case by case what is broken.

    Receives:
        modules: dotted names separated by commas.
        keyword: only cases whose id contains it.
        cells: names separated by commas; "" stands for all.

    Returns:
        0 when nothing is broken, 1 otherwise.

    Raises:
        ParityError: no case is left, or there is no such cell.
    """
    console = console or Console()
    registry = collect(modules)
    cases = [case for case in registry.cases if keyword in case.id]
    if not cases:
        raise ParityError("\n".join(registry.problems) or f"No case id contains {keyword!r}.")
    wanted = [cell.strip() for cell in cells.split(",") if cell.strip()] or CELLS
    found: list[Finding] = []
    for case in cases:
        made = check_cells(case, wanted)
        found += made
        for finding in made:
            if not finding.ok:
                console.print(Text(f"✗ {finding}", style="red"), soft_wrap=True)
    console.print(_table(found), *(Text(f"✗ {problem}", style="red") for problem in registry.problems))
    return 0 if all(finding.ok for finding in found) and not registry.problems else 1


def _table(found: Iterable[Finding]) -> Table:
    counts = Counter((finding.cell, finding.outcome) for finding in found)
    table = Table(pad_edge=False)
    table.add_column("cell")
    for outcome in Outcome:
        table.add_column(str(outcome), justify="right")
    for cell in dict.fromkeys(cell for cell, _ in counts):
        table.add_row(cell, *(str(counts[cell, outcome]) for outcome in Outcome))
    return table
