"""What holds for every benchmark: one thread, one seed, and a table of all figures at the end.

Only MET is green. UNDECIDED fails as MISSED does, and says so: a figure that could not be told from its limit proves
nothing, and a suite that lets it pass turns green on the machine that is noisy enough.

Under `CI=true`, where nobody knows the machine, seconds are told and not judged; ratios, growths and counts are.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from benchmarks.engine.contestants import Contest
from benchmarks.engine.figures import Figure, Verdict


@dataclass
class Ledger:
    """The figures of this run, in the order in which they were measured."""

    rows: list[tuple[str, Figure]] = field(default_factory=list)


LEDGER = pytest.StashKey[Ledger]()
Tell = Callable[[Figure], None]
Record = Callable[[Contest], None]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEDGER] = Ledger()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same conditions for every figure."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Tell:
    """Put a figure into the table, and fail unless it meets its limit."""

    def tell(figure: Figure) -> None:
        if figure.unit == "s" and os.environ.get("CI") == "true":
            figure = replace(figure, limit=None)
        case = request.node.name.removeprefix("test_").replace("_", " ")
        request.config.stash[LEDGER].rows.append((case, figure))
        figure.require()

    return tell


@pytest.fixture
def record(benchmark: Any, tell: Tell) -> Record:
    """Measure a contest, hand it to pytest-benchmark as well, and `tell` the figure."""

    def record(contest: Contest) -> None:
        figure = contest.figure()
        benchmark.extra_info.update(figure.as_json())
        contest.replay(benchmark)
        tell(figure)

    return record


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table: one line per figure."""
    rows = config.stash[LEDGER].rows
    if not rows:
        return
    terminalreporter.section("figures")
    lines = [("case", "figure", "99 % interval", "limit", "verdict")]
    for case, figure in rows:
        limit = "" if figure.limit is None else f"≤ {figure.limit:g}"
        lines.append((case, figure.number, figure.spread, limit, str(figure.verdict)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        is_red = line[-1] in (Verdict.MISSED, Verdict.UNDECIDED)
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        terminalreporter.write_line(text, red=is_red, bold=line is lines[0])
