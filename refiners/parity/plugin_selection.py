"""`--shard` and `--changed` under pytest: which of all collected items run, those that are no parity cases included.

Workers of pytest-xdist collect by themselves and come to the same choice; the session that reports keeps the record.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from refiners.parity.ledger import Ledger
    from refiners.parity.registry import Registry
    from refiners.parity.selection import Part

DIGEST = "refiners-parity-digest"
"""The property of an item that holds its key and its digest."""


@dataclass
class Collected:
    """The cases of one collector, and what it knows about them."""

    registry: "Registry"
    ledger: "Ledger"
    seconds: dict[str, float]
    """Case, or other test → how long it took."""


@dataclass(eq=False)
class Choice:
    """Chooses among the collected items.

    Receives:
        shard: `2/5`, or "".
        changed: whether to leave out what passed before with its present digest.
        case_of: item → the ids of its case and of itself; None for what is no case in a lane.
        registered: the ids of all cases in lanes, from which those that are left out are struck.
    """

    shard: str
    changed: bool
    case_of: Any
    registered: list[str]
    collected: list[Collected] = field(default_factory=list[Collected])
    left_out: list[str] = field(default_factory=list[str])

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """After -k and -m: keeps what runs here."""
        if not self.collected and not self.shard:
            return
        from refiners.parity.changed import Record
        from refiners.parity.selection import choose
        from refiners.parity.shards import Shard

        parts = [self._part(item, digest) for item, digest in self._digests(config, items)]
        seconds = {key: took for one in self.collected for key, took in one.seconds.items()}
        for item, part in zip(items, parts, strict=True):
            if part.digest:
                item.user_properties.append((DIGEST, {"key": part.key, "digest": part.digest}))
        if not (self.shard or self.changed):
            return
        shard = Shard.parse(self.shard) if self.shard else None
        record = Record.load(config.rootpath) if self.changed else None
        chosen, told = choose(parts, shard=shard, seconds=seconds, record=record)
        gone = [item for item, part in zip(items, parts, strict=True) if part.key not in chosen]
        items[:] = [item for item, part in zip(items, parts, strict=True) if part.key in chosen]
        config.hook.pytest_deselected(items=gone)
        struck = {self.case_of(item)[1] for item in gone if self.case_of(item)}
        self.registered[:] = [key for key in self.registered if key not in struck]
        self.left_out[:] = told

    def _part(self, item: pytest.Item, digest: str) -> "Part":
        from refiners.parity.selection import Part

        ids = self.case_of(item)
        return Part(ids[1], ids[0], digest) if ids else Part(item.nodeid, item.nodeid, digest)

    def _digests(self, config: pytest.Config, items: list[pytest.Item]) -> Iterator[tuple[pytest.Item, str]]:
        """Each item with its digest; "" for what is neither a case nor a function of a module."""
        if not self.collected:
            yield from ((item, "") for item in items)
            return
        from refiners.parity.changed import Digests
        from refiners.parity.selection import digests_of

        of_cases: dict[str, str] = {}
        for one in self.collected:
            of_cases |= digests_of(one.registry.cases, one.registry, one.ledger)
        others = Digests()
        conftests = [name for name in map(_name_of_conftest, config.pluginmanager.get_plugins()) if name]
        for item in items:
            ids = self.case_of(item)
            if ids:
                yield item, of_cases.get(ids[0], "")
            elif isinstance(item, pytest.Function):
                module = item.getparent(pytest.Module)
                name = str(module.obj.__name__) if module is not None else ""
                yield item, others.of_modules([name, *conftests]) if name else ""
            else:
                yield item, ""


def _name_of_conftest(plugin: object) -> str:
    is_one = Path(getattr(plugin, "__file__", None) or "").name == "conftest.py"
    return str(getattr(plugin, "__name__", "")) if is_one else ""


@dataclass(eq=False)
class Harvest:
    """What the items left behind in their properties; taken out, since it is not for other reports to print.

    Receives:
        name: of the property that holds the result of a case.
        is_worker: of pytest-xdist: what is taken out there never arrives.
    """

    name: str
    is_worker: bool
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    other_tests: dict[str, float] = field(default_factory=dict[str, float])
    """Test → seconds."""
    outcomes: dict[str, tuple[str, bool]] = field(default_factory=dict[str, tuple[str, bool]])
    """Key → digest, and whether it passed."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Before anybody prints or writes the report."""
        if self.is_worker:
            return
        given: dict[str, Any] = dict(report.user_properties)
        report.user_properties = [pair for pair in report.user_properties if pair[0] not in (self.name, DIGEST)]
        if report.when == "call" and self.name in given:
            self.rows.append(given[self.name])
        elif report.when == "call" and report.outcome == "passed":
            self.other_tests[report.nodeid] = round(report.duration, 4)
        if DIGEST in given:
            key, digest = given[DIGEST]["key"], given[DIGEST]["digest"]
            passed = report.outcome == "passed" or bool(getattr(report, "wasxfail", ""))
            self.outcomes[key] = digest, passed and self.outcomes.get(key, ("", True))[1]

    def keep_record(self, folder: Path) -> None:
        """Writes down which items passed with which digest."""
        if not self.outcomes:
            return
        from refiners.parity.changed import Record

        record = Record.load(folder)
        for key, (digest, passed) in self.outcomes.items():
            record.take(key, digest, passed=passed)
        record.save()
