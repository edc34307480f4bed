"""The pytest plugin: every case in every lane is a test, `bert/tiny[float32]`.

    pytest --parity-cases their.module,their.package     the cases of any importable modules, and nothing else
    pytest parity_tests -k "clip and float32"            of a test module that says PARITY_CASES = "modules"

Beside a module with `PARITY_CASES`, `ledger.toml` and `parity.json` are used when they exist. A run in which fewer
items ran than were registered fails, unless a filter was given.

pytest loads this file in every project that has Refiners installed, so it imports nothing heavy until it is used.
"""

import argparse
import contextlib
import sys
from collections.abc import Generator, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from refiners.parity.plugin_selection import Choice, Collected, Harvest

if TYPE_CHECKING:
    from refiners.parity.runner import CaseRunner
    from refiners.parity.suite import AnyResult, Item
    from refiners.parity.told import Told

_PROPERTY = "refiners-parity"
_REGISTERED = "registered"
"""The name of the item that fails when something cannot be registered."""
_SECONDS_TO_EXPLAIN = 20.0
_SHORTENED: dict[str, dict[str, Any]] = {
    "device": {"default": "cpu", "choices": ("cpu", "cuda", "all"), "help": "where parity cases run"},
    "lanes": {"default": "", "metavar": "DTYPES", "help": "restrict parity cases to these dtypes"},
    "shard": {"default": "", "metavar": "2/5", "help": "run this share of all tests; all shares take about as long"},
    "changed": {"action": "store_true", "help": "only what changed since it passed: port, case, engine, upstream"},
}
_FILTERS = ("keyword", "markexpr", "deselect", "lf", "failedfirst", "stepwise", "collectonly", "maxfail")


class ParityOptions:
    """What the command line says, and what is gathered while the session runs."""

    def __init__(self, config: pytest.Config) -> None:
        self.modules = str(config.getoption("--parity-cases") or "")
        self.device = str(config.getoption("parity_device"))
        lanes = str(config.getoption("parity_lanes"))
        self.lanes: list[str] | None = [lane.strip() for lane in lanes.split(",") if lane.strip()] or None
        self.json = _path(config, "--parity-json")
        self.ledger = _path(config, "--parity-ledger")
        self.baseline = _path(config, "--parity-baseline")
        self.html = _path(config, "--parity-html")
        self.summary = _path(config, "--parity-summary")
        self.registered: list[str] = []
        self.harvest = Harvest(_PROPERTY, is_worker=hasattr(config, "workerinput"))
        self.problems: list[str] = []
        self.sources: list[str] = []
        shard, changed = str(config.getoption("parity_shard") or ""), bool(config.getoption("parity_changed"))
        self.choice = Choice(shard, changed, _ids_of, self.registered)


_OPTIONS = pytest.StashKey[ParityOptions]()


def _path(config: pytest.Config, option: str) -> Path | None:
    given = str(config.getoption(option) or "")
    return config.invocation_params.dir / given if given else None


def _make(kind: type[pytest.Item | pytest.Collector], parent: pytest.Collector, **arguments: Any) -> Any:
    """`from_parent`, which pytest leaves untyped."""
    return cast(Any, kind).from_parent(parent, **arguments)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of the verifier."""
    group = parser.getgroup("refiners parity")
    group.addoption("--parity-cases", metavar="MODULES", help="run the parity cases of these modules, comma separated")
    for name, settings in _SHORTENED.items():
        group.addoption(f"--parity-{name}", dest=f"parity_{name}", **settings)
    group.addoption("--parity-json", metavar="PATH", help="write the results to this parity.json")
    group.addoption("--parity-ledger", metavar="PATH", help="the ledger that excuses results that are not bitwise")
    group.addoption("--parity-html", metavar="DIR", help="write a page about the cases: DIR/index.html")
    group.addoption("--parity-summary", metavar="PATH", help="write a short summary; in a GitHub job it is appended")
    group.addoption("--parity-baseline", metavar="PATH", help="a committed parity.json; comparing less is an error")


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None, object, object]:
    """Adds `--device` and `--lanes`, unless another plugin or the project's conftest has options of that name."""
    # Unknown until now, their values were taken for paths, and conftests would be looked for beside them.
    short = [f"--{name}" for name, settings in _SHORTENED.items() if "action" not in settings]
    values = [value for option, value in pairwise(args) if option in short]
    paths: list[str] = early_config.known_args_namespace.file_or_dir
    early_config.known_args_namespace.file_or_dir = [path for path in paths if path not in values]
    result = yield
    group = parser.getgroup("refiners parity")
    for name, settings in _SHORTENED.items():
        with contextlib.suppress(ValueError, argparse.ArgumentError):
            group.addoption(f"--{name}", dest=f"parity_{name}", **settings)
    return result


def pytest_configure(config: pytest.Config) -> None:
    """Reads the options; imports nothing heavy.

    Raises:
        UsageError: there is no such shard.
    """
    options = config.stash[_OPTIONS] = ParityOptions(config)
    if options.choice.shard:
        from refiners.errors import ParityError
        from refiners.parity.shards import Shard

        try:
            Shard.parse(options.choice.shard)
        except ParityError as error:
            raise pytest.UsageError(str(error)) from error
    config.pluginmanager.register(options.choice, "refiners-parity-choice")
    config.pluginmanager.register(options.harvest, "refiners-parity-harvest")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --parity-cases and no path on the command line, only the cases are collected."""
    if config.stash[_OPTIONS].modules and config.args_source != pytest.Config.ArgsSource.ARGS:
        return True
    return None


class ParityCases(pytest.Collector):
    """The cases of some modules as tests."""

    def __init__(self, *, modules: str, folder: Path | None, **rest: Any) -> None:
        cast(Any, super()).__init__(**rest)
        self.modules, self.folder = modules, folder

    def collect(self) -> Iterator[pytest.Item]:
        """One item for each case and lane, and one that fails for each module that cannot be used."""
        from refiners.errors import ParityError
        from refiners.parity.lanes import devices_of
        from refiners.parity.registry import collect_cases
        from refiners.parity.suite import all_keys, register

        options = self.config.stash[_OPTIONS]
        here = str(self.config.invocation_params.dir)
        if here not in sys.path:
            sys.path.insert(0, here)
        registry = collect_cases(self.modules)
        try:
            devices = devices_of(options.device)
            terms = Terms(
                _beside(options.ledger, self.folder, "ledger.toml"),
                _beside(options.baseline, self.folder, "parity.json"),
            )
            items = register(registry.cases, lanes=options.lanes, devices=devices) if registry.cases else []
        except ParityError as error:
            raise self.CollectError(str(error)) from error
        runners: dict[str, CaseRunner] = {}
        options.sources.append(self.modules)
        options.choice.collected.append(Collected(registry, terms.ledger, terms.baseline.seconds))
        for item in items:
            options.registered.append(item.id)
            yield _make(ParityItem, self, name=item.id, item=item, terms=terms, runners=runners)
        complete = self.folder is not None and not registry.problems
        problems = [*registry.problems, *terms.ledger.stale(all_keys(registry.cases), complete=complete)]
        if complete and options.lanes is None:
            problems += terms.baseline.unregistered([item.id for item in items], devices)
        if problems:
            yield _make(ParityProblem, self, name=_REGISTERED, told=problems)


def _beside(given: Path | None, folder: Path | None, name: str) -> Path | None:
    if given is not None or folder is None:
        return given
    return folder / name if (folder / name).is_file() else None


class Terms:
    """The ledger and the committed counts that results are judged by."""

    def __init__(self, ledger: Path | None, baseline: Path | None) -> None:
        from refiners.parity.ledger import Ledger
        from refiners.parity.suite import Baseline

        self.ledger = Ledger.load(ledger) if ledger else Ledger()
        self.baseline = Baseline.load(baseline) if baseline else Baseline()


class ParityFailure(Exception):
    """A result that may not stand; its text is all there is to say."""


class _Plain(pytest.Item):
    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The text of a failure of parity, without the engine's own frames."""
        if isinstance(excinfo.value, ParityFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where pytest says the test is."""
        return self.path, None, self.name


class ParityProblem(_Plain):
    """Fails with what keeps cases from being registered, or with lines about cases that do not exist."""

    def __init__(self, *, told: list[str], **rest: Any) -> None:
        cast(Any, super()).__init__(**rest)
        self.told = told

    def runtest(self) -> None:
        """Fails."""
        raise ParityFailure("\n".join(self.told))


def _ids_of(item: pytest.Item) -> tuple[str, str] | None:
    return (item.item.case.id, item.item.id) if isinstance(item, ParityItem) else None


class ParityItem(_Plain):
    """A case in a lane."""

    def __init__(self, *, item: "Item", terms: Terms, runners: "dict[str, CaseRunner]", **rest: Any) -> None:
        cast(Any, super()).__init__(**rest)
        self.item, self.terms, self.runners = item, terms, runners

    def _told(self, result: "AnyResult") -> "Told | None":
        """Where the two sides part, if they could be run; never a reason to fail, nor to be late for long."""
        from refiners.parity.explaining import tell_why
        from refiners.parity.result import Result, Verdict

        lane = self.item.lane
        if lane is None or not isinstance(result, Result):
            return None
        if result.traceback or result.verdict is not Verdict.DIFFERENT:
            return None
        source = self.config.stash[_OPTIONS].sources[-1]
        return tell_why(self.runners[self.item.case.id], lane, seconds=_SECONDS_TO_EXPLAIN, modules=source)

    def runtest(self) -> None:
        """Runs the case; fails unless the result may stand."""
        from refiners.parity.report import describe
        from refiners.parity.suite import judge

        if self.item.case.id not in self.runners:
            self.runners.clear()  # lanes of one case follow one another; the inputs of others are not needed again
        result = self.item.run(self.runners)
        judged = judge(result, self.terms.ledger, self.terms.baseline)
        row: dict[str, Any] = {"result": result.to_json(), "meta": self.item.lane is None, "judged": asdict(judged)}
        self.user_properties.append((_PROPERTY, row))
        if not judged.accepted:
            told = self._told(result)
            row["told"] = told.to_json() if told else None
            raise ParityFailure(f"{judged.message}\n{describe(result)}" + (f"\n\n{told.text}" if told else ""))
        if judged.known_gap:
            pytest.xfail(judged.message)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Adds the cases of --parity-cases, before -k and -m choose."""
    options = config.stash[_OPTIONS]
    if not options.modules:
        return
    collector = _make(ParityCases, session, name=options.modules, modules=options.modules, folder=None)
    report: pytest.CollectReport = session.ihook.pytest_make_collect_report(collector=collector)
    session.ihook.pytest_collectreport(report=report)
    if report.passed:
        items.extend(item for item in report.result if isinstance(item, pytest.Item))


def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> Any:
    """Turns `PARITY_CASES = "modules"` of a test module into its cases."""
    if name != "PARITY_CASES" or not isinstance(obj, str):
        return None
    return _make(ParityCases, collector, name=name, modules=obj, folder=collector.path.parent)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """With pytest-xdist: every worker registers everything, the session that reports hears of it here."""
    output: dict[str, list[str]] = getattr(node, "workeroutput", {}).get(_PROPERTY, {})
    options: ParityOptions = node.config.stash[_OPTIONS]
    for name, gathered in (
        ("registered", options.registered),
        ("left_out", options.choice.left_out),
        ("sources", options.sources),
    ):
        known = set(gathered)
        gathered += [item for item in output.get(name, []) if item not in known]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the session when fewer items ran than were registered."""
    options = session.config.stash[_OPTIONS]
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_PROPERTY] = {
            "registered": options.registered,
            "left_out": options.choice.left_out,
            "sources": options.sources,
        }
        return
    options.harvest.keep_record(session.config.rootpath)
    if session.exitstatus == pytest.ExitCode.INTERRUPTED:
        options.problems.append("interrupted: what follows was not run")
    if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and options.choice.left_out:
        session.exitstatus = pytest.ExitCode.OK
    filtered = any(session.config.getoption(name, None) for name in _FILTERS) or any(
        "::" in a for a in session.config.args
    )
    ran = {_id(row) for row in options.harvest.rows}
    unran = [item for item in options.registered if item not in ran]
    if unran and not filtered:
        options.problems.append(
            f"{len(unran)} of {len(options.registered)} registered parity items did not run: {', '.join(unran[:5])}"
        )
        if session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _id(row: dict[str, Any]) -> str:
    result = row["result"]
    return f"{result['case']}[{'meta:' + result['name'] if row['meta'] else result['lane']}]"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the table of all results and writes the reports that were asked for."""
    options = config.stash[_OPTIONS]
    if options.harvest.rows or (options.registered and options.problems):
        failed: list[str] = []
        for r in (*terminalreporter.stats.get("failed", []), *terminalreporter.stats.get("error", [])):
            failed += _as_problems(r, options)
        _print_table(terminalreporter, config, options, failed)
    for told in options.choice.left_out:
        terminalreporter.write_line(told)
    for problem in options.problems:
        terminalreporter.write_line(f"✗ {problem}", red=True)


def _as_problems(report: Any, options: ParityOptions) -> list[str]:
    """What a failed item says about the run."""
    name = str(report.nodeid).rsplit("::", 1)[-1]
    if name == _REGISTERED:
        return str(report.longrepr).splitlines()
    return [name if name in options.registered else f"another test failed: {name}"]


def _print_table(terminalreporter: Any, config: pytest.Config, options: ParityOptions, failed: list[str]) -> None:
    from rich.console import Console

    from refiners.parity.plugin_report import gather, write_reports
    from refiners.parity.report import environment_lines, in_one_line, results_table, summary

    report = gather(options.registered, options.harvest.rows, options.harvest.other_tests)
    report.problems += [*options.problems, *failed]
    report.left_out += options.choice.left_out
    page = write_reports(report, options.sources, json=options.json, summary=options.summary, html=options.html)
    terminalreporter.write_sep("=", "parity")
    terminal = terminalreporter.isatty or config.getoption("color") == "yes"
    width = max(110, terminalreporter._tw.fullwidth)
    console = Console(force_terminal=terminal, width=width, no_color=not terminal)
    with console.capture() as capture:
        console.print(results_table(report.all_results, width=width))
        console.print(in_one_line(environment_lines(report)), style="dim", soft_wrap=True)
        console.print(summary(report))
    terminalreporter.write(capture.get())
    if page:
        terminalreporter.write_line(f"page: {page}")
