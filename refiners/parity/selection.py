"""Which parts of a run take place here and now: one shard of it, or what changed since it passed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from refiners.parity.case import Case
from refiners.parity.changed import Digests, Record
from refiners.parity.ledger import Ledger
from refiners.parity.registry import Registry
from refiners.parity.shards import Shard
from refiners.parity.suite import Item, Report


@dataclass(frozen=True)
class Part:
    """Something that runs or does not."""

    key: str
    """Its id: `bert/tiny[float32]`, or that of a test."""
    group: str
    """What stays together in a shard: the lanes of a case share their inputs."""
    digest: str = ""
    """Of all that decides how it goes; "" for what always runs."""


def choose(
    parts: Sequence[Part], *, shard: Shard | None = None, seconds: Mapping[str, float], record: Record | None = None
) -> tuple[set[str], list[str]]:
    """The keys that run, and a line for each reason why others do not.

    Receives:
        parts: all of them; the same on every machine.
        shard: keeps one share of the groups. Chosen first, so that shares do not depend on what changed where.
        seconds: group → how long it took.
        record: keeps only what did not pass with its present digest.
    """
    chosen, told = list(parts), list[str]()
    if shard is not None:
        mine = shard.share(list(dict.fromkeys(part.group for part in parts)), seconds)
        chosen = [part for part in chosen if part.group in mine]
        told.append(f"shard {shard}: {len(chosen)} of {len(parts)} run here")
    if record is not None:
        before = len(chosen)
        chosen = [part for part in chosen if not part.digest or not record.is_unchanged([part.key], part.digest)]
        told.append(
            f"changed: {len(chosen)} of {before} run, {before - len(chosen)} passed before with the same digest"
        )
    return {part.key for part in chosen}, told


def modules_of(case: Case, registry: Registry) -> list[str]:
    """The modules that define a case: the one that lists it, and those of its functions."""
    found = [registry.homes[case.id], type(case.key_map).__module__]
    for function in (case.upstream, case.port, case.inputs, case.run_upstream, case.run_port, case.weights, case.pad):
        while hasattr(function, "func"):  # functools.partial
            function = function.func  # type: ignore[union-attr]  checked above
        found.append(getattr(function, "__module__", None) or registry.homes[case.id])
    return sorted(set(found))


def digests_of(cases: Iterable[Case], registry: Registry, ledger: Ledger) -> dict[str, str]:
    """Case id → digest."""
    lines: dict[str, str] = {}
    for line in ledger.lines.values():
        lines[line.id] = f"{lines.get(line.id, '')}{line}\n"
    digests = Digests(lines)
    return {case.id: digests.of_case(case.id, modules_of(case, registry)) for case in cases}


@dataclass
class Selection:
    """The choice among the items of a run, and the record of how those went that ran.

    Receives:
        folder: in which the record is kept.
        changed: leave out what passed before with the same digest.
    """

    registry: Registry
    ledger: Ledger
    seconds: Mapping[str, float]
    shard: Shard | None
    folder: Path
    changed: bool
    _record: Record = field(init=False)
    _digests: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self._record = Record.load(self.folder)
        self._digests = {}

    def choose(self, items: Sequence[Item]) -> tuple[Sequence[Item], list[str]]:
        """The items that run, and why others do not."""
        cases = {item.case.id: item.case for item in items}
        self._digests = digests_of(cases.values(), self.registry, self.ledger)
        parts = [Part(item.id, item.case.id, self._digests[item.case.id]) for item in items]
        record = self._record if self.changed else None
        chosen, told = choose(parts, shard=self.shard, seconds=self.seconds, record=record)
        return [item for item in items if item.id in chosen], told

    def keep(self, report: Report) -> None:
        """Writes down how the items went."""
        for result in report.all_results:
            passed = report.judged[result.id].accepted
            self._record.take(result.id, self._digests[result.case], passed=passed)
        if report.all_results:
            self._record.save()
