"""What holds for every benchmark: one thread, one seed, a table of all figures at the end, and a file if it is asked.

Only MET is green. UNDECIDED fails as MISSED does, and says so: a figure that could not be told from its limit proves
nothing, and a suite that lets it pass turns green on the machine that is noisy enough.

Under `CI=true`, where nobody knows the machine, seconds are told and not judged; ratios, growths and counts are.
"""

import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engine.contestants import Contest
from benchmarks.engine.device import read_device, read_state
from benchmarks.engine.figures import Figure, LimitError, Verdict
from benchmarks.engine.runfile import RunFile

NO_GPU = "no GPU"
PUBLISHED = Path(__file__).parent / "figures.json"


@dataclass
class Ledger:
    """The figures of this run, in the order in which they were measured."""

    rows: list[tuple[str, Figure]] = field(default_factory=list)
    file: RunFile | None = None


LEDGER = pytest.StashKey[Ledger]()
Tell = Callable[[Figure], None]
Record = Callable[[Contest], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of refiners")
    group.addoption("--write-budgets", action="store_true", help="Write the exact budgets, and do nothing else.")
    group.addoption("--figures", type=Path, help="Write every figure to this file, as soon as it is known.")
    group.addoption(
        "--publish", action="store_true", help="Write benchmarks/figures.json, of which docs/benchmarks.md is made."
    )
    group.addoption("--seconds", type=float, help="Spend so many seconds on each timing, instead of 2.5.")
    group.addoption("--on", choices=("cpu", "cuda"), default="cpu", help="Which device --figures is about.")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEDGER] = Ledger()
    # torch.compile writes thousands of them, and pytest keeps each.
    logging.disable(logging.DEBUG)
    config.addinivalue_line("markers", "timed: what is timed, and so runs while nothing else does")
    config.addinivalue_line("markers", "told: what has no limit, and so is measured for --figures only")
    config.addinivalue_line("markers", "cuda: what needs a GPU")
    config.addinivalue_line("markers", "budget: what is compared with a budget, or writes it")
    if config.getoption("--publish"):
        config.option.figures = PUBLISHED
    path, device = config.getoption("--figures"), config.getoption("--on")
    if path is not None:
        config.stash[LEDGER].file = file = RunFile(path, read_device(device), commit())
        file.note(read_state(device))


def commit() -> str:
    """The commit that is measured; a star says that files were changed since."""
    ask = ["git", "describe", "--always", "--dirty=*", "--exclude=*"]
    done = subprocess.run(ask, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "record" in getattr(item, "fixturenames", ()):
            item.add_marker("timed")
    kept = [item for item in items if is_asked_for(item, config)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def is_asked_for(item: pytest.Item, config: pytest.Config) -> bool:
    """Whether a benchmark is about the device, and has a limit or a file to go to."""
    if config.getoption("--write-budgets"):
        return item.get_closest_marker("budget") is not None
    if config.getoption("--on") == "cuda":
        return item.get_closest_marker("cuda") is not None
    return config.getoption("--figures") is not None or item.get_closest_marker("told") is None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip(NO_GPU)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A contestant that fails is written down, and the others go on."""
    report = yield
    file = item.config.stash[LEDGER].file
    if file is not None and call.excinfo is not None and call.excinfo.errisinstance(Exception):
        error = call.excinfo.value
        # The first failure of a test is the cause of what its fixtures say after it.
        if not isinstance(error, LimitError) and case_of(item) not in file.told["errors"] and not report.skipped:
            file.fail(case_of(item), f"{type(error).__name__}: {str(error).partition(os.linesep)[0]}")
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
    return report


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same conditions for every figure."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def case_of(item: pytest.Item) -> str:
    return item.name.removeprefix("test_").replace("_", " ")


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Tell:
    """Put a figure into the table, and fail unless it meets its limit."""

    def tell(figure: Figure) -> None:
        if figure.unit == "s" and os.environ.get("CI") == "true":
            figure = replace(figure, limit=None)
        ledger, case = request.config.stash[LEDGER], case_of(request.node)
        ledger.rows.append((case, figure))
        if ledger.file is not None:
            suite = request.node.path.stem.removeprefix("test_")
            ledger.file.add(case, replace(figure, facts={"suite": suite, **figure.facts}))
            ledger.file.note(read_state(request.config.getoption("--on")))
        figure.require()

    return tell


@pytest.fixture
def record(benchmark: Any, tell: Tell, request: pytest.FixtureRequest) -> Record:
    """Measure a contest, hand it to pytest-benchmark as well, and `tell` the figure."""

    def record(contest: Contest) -> None:
        seconds = request.config.getoption("--seconds")
        figure = contest.figure() if seconds is None else contest.figure(seconds)
        benchmark.extra_info.update(figure.as_json())
        contest.replay(benchmark)
        tell(figure)

    return record


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    file = session.config.stash[LEDGER].file
    if file is not None and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not session.shouldstop:
        file.close(with_samples=not session.config.getoption("--publish"))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table: one line per figure."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_GPU in str(report.longrepr)]
    if skipped:
        terminalreporter.section(NO_GPU, yellow=True)
        terminalreporter.write_line(f"{len(skipped)} checks on CUDA were not made, and none of them counts as passed.")
    rows = config.stash[LEDGER].rows
    if not rows:
        return
    terminalreporter.section("figures")
    lines = [("case", "figure", "99 % interval", "limit", "verdict", "standing")]
    for case, figure in rows:
        limit = "" if figure.limit is None else f"≤ {figure.limit:g}"
        standing = "" if figure.standing is None else str(figure.standing)
        lines.append((case, figure.number, figure.spread, limit, str(figure.verdict), standing))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        is_red = line[-2] in (Verdict.MISSED, Verdict.UNDECIDED)
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        terminalreporter.write_line(text, red=is_red, bold=line is lines[0])
