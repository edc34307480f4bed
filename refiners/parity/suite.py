"""Running many cases, and the bookkeeping that keeps a run honest.

Everything that is going to run is registered first. A run is in order when all of it ran, every result may stand by
the ledger, and nothing was compared less than in the committed `parity.json`.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refiners.errors import ParityError
from refiners.parity.case import Case
from refiners.parity.environment import environment
from refiners.parity.full_size import FullSizeResult, check_full_size
from refiners.parity.influence import some
from refiners.parity.lanes import DEVICES, DTYPES, Lane, select_lanes
from refiners.parity.ledger import Judgement, Ledger
from refiners.parity.result import Result, Verdict
from refiners.parity.runner import CaseRunner
from refiners.parity.told import Told

AnyResult = Result | FullSizeResult
INTERRUPTED = "interrupted: what follows was not run"
COUNTED = ("tensors", "elements", "leaves")


class Baseline:
    """How much was compared when `parity.json` was committed, and how long it took; empty where there is none."""

    def __init__(
        self, counts: Mapping[str, Mapping[str, int]] | None = None, seconds: Mapping[str, float] | None = None
    ) -> None:
        self.counts = dict(counts or {})
        self.seconds = dict(seconds or {})
        """Case id, or the id of another test → seconds."""

    @classmethod
    def load(cls, path: Path) -> "Baseline":
        """Reads the counts of a `parity.json`.

        Raises:
            ParityError: the file is none.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            rows = [(f"{row['case']}[{row['lane']}]", row) for row in data["results"]]
            rows += [(f"{row['case']}[meta:{row['name']}]", row) for row in data["full_size"]]
            seconds = {str(test): float(took) for test, took in data.get("other_tests", {}).items()}
            for _, row in rows:
                seconds[row["case"]] = seconds.get(row["case"], 0.0) + float(row.get("seconds", 0.0))
            return cls({key: {name: int(row[name]) for name in COUNTED if name in row} for key, row in rows}, seconds)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ParityError(f"{path} is no parity.json: {type(error).__name__}: {error}.") from error

    def fewer(self, result: AnyResult) -> str:
        """What a result compared less than it once did; "" if nothing."""
        known = self.counts.get(result.id, {})
        less = [
            f"{getattr(result, name)} {name} instead of {count}"
            for name, count in known.items()
            if getattr(result, name) < count
        ]
        return f"it compares {', '.join(less)}; write parity.json anew if that is meant" if less else ""

    def unregistered(self, registered: Sequence[str], devices: Sequence[str]) -> list[str]:
        """What the committed run compared on these devices and is not registered any more."""
        others = [f"-{device}]" for device in DEVICES if device != "cpu" and device not in devices]
        return [
            f"{key} stands in the committed parity.json and is not registered: write it anew if that is meant"
            for key in self.counts
            if key not in registered and not any(key.endswith(other) for other in others)
        ]


def judge(result: AnyResult, ledger: Ledger, baseline: Baseline) -> Judgement:
    """Whether a result may stand, by the ledger and by the committed counts."""
    if isinstance(result, FullSizeResult):
        verdict = Verdict.BITWISE if result.equal else Verdict.DIFFERENT
        judged = ledger.judge(Result(case=result.case, lane=result.lane, verdict=verdict, reasons=(result.reason,)))
    else:
        judged = ledger.judge(result)
    fewer = baseline.fewer(result) if judged.accepted and not judged.known_gap else ""
    return Judgement(False, f"{result.id}: {fewer}") if fewer else judged


@dataclass
class Report:
    """What was registered, what ran, and what is wrong with it."""

    registered: tuple[str, ...]
    results: list[Result] = field(default_factory=list[Result])
    full_size: list[FullSizeResult] = field(default_factory=list[FullSizeResult])
    problems: list[str] = field(default_factory=list[str])
    environment: dict[str, Any] = field(default_factory=environment)
    judged: dict[str, Judgement] = field(default_factory=dict[str, Judgement])
    """Id of a result → whether it may stand."""
    explanations: dict[str, Told] = field(default_factory=dict[str, Told])
    """Id of a result → where and why its sides part, for those that were explained."""
    left_out: list[str] = field(default_factory=list[str])
    """A line for each reason why cases were left out on purpose: another shard has them, nothing changed."""
    other_tests: dict[str, float] = field(default_factory=dict[str, float])
    """Tests that ran beside the cases → seconds; shards are balanced by them."""

    @property
    def ok(self) -> bool:
        """Whether the run is green."""
        return not self.problems

    def take(self, result: AnyResult) -> None:
        """Adds a result."""
        if isinstance(result, FullSizeResult):
            self.full_size.append(result)
        else:
            self.results.append(result)

    @property
    def all_results(self) -> list[AnyResult]:
        """Computed and full-size results, in the order in which they were registered."""
        order = {item: index for index, item in enumerate(self.registered)}
        found: list[AnyResult] = [*self.results, *self.full_size]
        return sorted(found, key=lambda result: order.get(result.id, len(order)))

    def unran(self) -> list[str]:
        """Registered ids without a result."""
        ran = {result.id for result in (*self.results, *self.full_size)}
        return [item for item in self.registered if item not in ran]

    def to_json(self) -> dict[str, Any]:
        """The contents of `parity.json`."""
        results = self.all_results
        data: dict[str, Any] = {
            "environment": {**self.environment, "upstream": self.upstream},
            "registered": len(self.registered),
            "problems": self.problems,
            "results": [result.to_json() for result in results if isinstance(result, Result)],
            "full_size": [result.to_json() for result in results if isinstance(result, FullSizeResult)],
        }
        if self.left_out:
            data["left_out"] = self.left_out
        if self.other_tests:
            data["other_tests"] = dict(sorted(self.other_tests.items()))
        if self.explanations:
            data["explanations"] = {key: told.to_json() for key, told in self.explanations.items()}
        return data

    @property
    def upstream(self) -> list[str]:
        """The packages that upstreams came from, with their versions."""
        return sorted({result.upstream for result in self.results if result.upstream})


@dataclass(frozen=True)
class Item:
    """One thing to run: a case in a lane, or one of its full sizes."""

    case: Case
    lane: Lane | None
    full_size: str = ""

    @property
    def lane_name(self) -> str:
        """The dtype, with the device if it is not the CPU, or `meta:name`."""
        return self.lane.name if self.lane else f"meta:{self.full_size}"

    @property
    def id(self) -> str:
        """`case[lane]`."""
        return f"{self.case.id}[{self.lane_name}]"

    def run(self, runners: dict[str, CaseRunner]) -> AnyResult:
        """Runs it. `runners` keeps what lanes of one case share."""
        if self.lane is None:
            return check_full_size(self.case, self.full_size)
        return runners.setdefault(self.case.id, CaseRunner(self.case)).run(self.lane)


def register(
    cases: Sequence[Case], *, lanes: Sequence[str] | None = None, devices: Sequence[str] = ("cpu",)
) -> list[Item]:
    """Everything a run consists of: each case in each of its lanes on each device, and its full sizes.

    Receives:
        lanes: dtypes to restrict the run to; full sizes are left out then. None: all that the cases declare.

    Raises:
        ParityError: a lane does not exist, an id occurs twice, or nothing is left to run.
    """
    twice = [case_id for case_id, count in Counter(case.id for case in cases).items() if count > 1]
    if twice:
        raise ParityError(f"Several cases have the id {some(twice)}. Give each case an id of its own.")
    items = [Item(case, lane) for case in cases for lane in select_lanes(case.lanes, lanes, devices)]
    if lanes is None:
        items += [Item(case, None, name) for case in cases for name in case.full_size]
    if not items:
        raise ParityError("Nothing is registered: no case has one of the chosen lanes.")
    order = {case.id: index for index, case in enumerate(cases)}
    return sorted(items, key=lambda item: order[item.case.id])


def all_keys(cases: Sequence[Case]) -> set[tuple[str, str]]:
    """Case id and lane of everything that a ledger may have a line for, on any device."""
    lanes = {
        (case.id, Lane(name, device).name)
        for case in cases
        for name in DTYPES
        for device in DEVICES
        if name in case.lanes
    }
    return lanes | {(case.id, f"meta:{name}") for case in cases for name in case.full_size}


def run(
    cases: Sequence[Case],
    *,
    lanes: Sequence[str] | None = None,
    devices: Sequence[str] = ("cpu",),
    ledger: Ledger | None = None,
    baseline: Baseline | None = None,
    complete: bool = False,
    known: Sequence[Case] = (),
    choose: Callable[[Sequence[Item]], tuple[Sequence[Item], list[str]]] | None = None,
    runners: dict[str, CaseRunner] | None = None,
    progress: Callable[[Item, AnyResult | None], None] | None = None,
) -> Report:
    """Runs cases one after the other; a failing one never ends the run. Ctrl-C keeps what was measured.

    Receives:
        cases: with unique ids.
        lanes: dtypes to restrict the run to.
        devices: of `cpu` and `cuda`.
        ledger: known results that are not bitwise.
        baseline: committed counts.
        complete: whether these are all cases there are, so that ledger lines and counts of others are stale.
        known: all cases of the same modules, where `cases` are some of them: the ledger may have lines for them.
        choose: picks those items that run here, and tells why others do not.
        runners: keeps the runner of the last case, for whoever goes on with it.
        progress: called with an item before it runs, and again with its result.

    Raises:
        ParityError: nothing is left to run.
    """
    ledger, baseline = ledger or Ledger(), baseline or Baseline()
    items = register(cases, lanes=lanes, devices=devices)
    everything = [item.id for item in items]
    items, left_out = choose(items) if choose else (items, [])
    report = Report(tuple(item.id for item in items), left_out=left_out)
    runners = {} if runners is None else runners
    try:
        for item in items:
            if item.case.id not in runners:
                runners.clear()
            if progress:
                progress(item, None)
            result = item.run(runners)
            report.take(result)
            if progress:
                progress(item, result)
    except KeyboardInterrupt:
        report.problems.append(INTERRUPTED)
    report.problems += audit(report, ledger, baseline)
    report.problems += ledger.stale(all_keys([*cases, *known]), complete=complete)
    if complete and lanes is None:
        report.problems += baseline.unregistered(everything, devices)
    return report


def audit(report: Report, ledger: Ledger, baseline: Baseline) -> list[str]:
    """What is wrong with a finished run: results that may not stand, and what never ran."""
    problems: list[str] = []
    for result in report.all_results:
        judged = report.judged[result.id] = judge(result, ledger, baseline)
        if not judged.accepted:
            problems.append(
                judged.message if judged.message.startswith(result.id) else f"{result.id}: {judged.message}"
            )
    unran = report.unran()
    if unran:
        problems.append(
            f"{len(unran)} of {len(report.registered)} registered items did not run: {', '.join(unran[:5])}"
        )
    return problems
