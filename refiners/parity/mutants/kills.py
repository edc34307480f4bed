"""The kill table: which planted faults the cases of a family tell, and which case earns its keep.

A fault (`operator::path::parameter`) stands for one mistake in the code of a port, so it is planted in every case whose
port has that node, and counts as killed when one of them turns red. A mutant that its own case does not tell, though
another one does, is *masked* there: the case has no mask, one token, or upstream's own tiny weights.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from refiners.errors import ParityError
from refiners.parity.case import Case
from refiners.parity.lanes import Lane
from refiners.parity.mutants.equivalent import Line, why_not_equivalent
from refiners.parity.mutants.mutate import Bench, How, Mutant, Outcome, Trial, bench, lanes_of
from refiners.parity.mutants.operators import OPERATORS
from refiners.parity.mutants.witness import one_of_each_role, witnesses

SLOW = 0.5
"""Seconds of a forward, on a processor. Of a case that takes longer (real weights, say) only some mutants are tried."""
MUTANTS_OF_SLOW_CASES = 20


@dataclass(frozen=True)
class Settings:
    """How far a run goes."""

    budget: float | None = None
    """Seconds, shared among the cases. None: all there is."""
    seed: int = 0
    """Of the order in which the mutants of a case are tried."""
    per_case: int | None = None
    """Tries at most that many mutants of each case."""
    every_case: bool = False
    """Tells what each case and each input earns: a fault is planted until two cases have told it, not one, and of the
    faults of layers that play one role only the first."""
    equivalents: Sequence[Line] = ()
    keyword: str = ""
    """Only mutants whose id contains this text."""


@dataclass
class Family:
    """What became of the mutants of one family."""

    name: str
    trials: list[Trial] = field(default_factory=list[Trial])
    proved: dict[str, str] = field(default_factory=dict[str, str])
    """Fault that is none → why."""
    problems: list[str] = field(default_factory=list[str])
    inputs: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    """Case → input → the fault that only it lets the case tell, "" where there is none."""
    left_out: int = 0
    """Mutants that were not tried: the budget was spent, or their case is slow."""
    seconds: float = 0.0

    @property
    def faults(self) -> dict[str, list[Trial]]:
        """The trials of each fault."""
        found: dict[str, list[Trial]] = {}
        for trial in self.trials:
            found.setdefault(trial.fault, []).append(trial)
        return found

    @property
    def killed(self) -> dict[str, Trial]:
        """Fault → the first trial that killed it."""
        killed: dict[str, Trial] = {}
        for trial in self.trials:
            if trial.outcome is Outcome.KILLED:
                killed.setdefault(trial.fault, trial)
        return killed

    @property
    def inert(self) -> list[str]:
        """Mutants whose operator changed nothing."""
        return [trial.id for trial in self.trials if trial.outcome is Outcome.INERT]

    @property
    def open(self) -> dict[str, Trial]:
        """Fault that no case has killed → the first trial it survived, proved equivalent or not."""
        killed = self.killed
        found: dict[str, Trial] = {}
        for trial in self.trials:
            if trial.outcome is Outcome.SURVIVED and trial.fault not in killed:
                found.setdefault(trial.fault, trial)
        return found

    @property
    def survived(self) -> dict[str, Trial]:
        """Those of them that are not proved equivalent."""
        return {fault: trial for fault, trial in self.open.items() if fault not in self.proved}

    @property
    def masked(self) -> list[str]:
        """Mutants that their own case did not tell and another case did."""
        killed = self.killed
        return [t.id for t in self.trials if t.outcome is Outcome.SURVIVED and t.fault in killed]

    @property
    def revealing(self) -> list[str]:
        """Faults by the number of cases that did not tell them, most first: what tells inputs apart soonest."""
        return [
            fault for fault, _ in Counter(t.fault for t in self.trials if t.outcome is Outcome.SURVIVED).most_common()
        ]

    @property
    def how(self) -> Counter[How]:
        """What told, by number of faults killed."""
        return Counter(trial.how for trial in self.killed.values() if trial.how)

    @property
    def kill_rate(self) -> float:
        """Share of the faults killed, of all that are not proved equivalent."""
        killed, survived = len(self.killed), len(self.survived)
        return killed / max(1, killed + survived)

    def earned(self) -> dict[str, list[str]]:
        """Case → the roles of faults that it kills and no other case does."""
        killers: dict[str, set[str]] = {}
        for trial in self.trials:
            if trial.outcome is Outcome.KILLED:
                killers.setdefault(trial.role, set()).add(trial.case)
        earned: dict[str, list[str]] = {trial.case: [] for trial in self.trials}
        for role, cases in killers.items():
            if len(cases) == 1:
                earned[min(cases)].append(role)
        return earned

    def to_json(self, *, earned: bool) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            "family": self.name,
            "mutants": len(self.trials),
            "faults": len(self.faults),
            "killed": len(self.killed),
            "kill_rate": self.kill_rate,
            "how": {str(how): count for how, count in self.how.items()},
            "survived": [trial.id for trial in self.survived.values()],
            "equivalent": self.proved,
            "masked": self.masked,
            "inert": self.inert,
            "exceptions": [t.id for t in self.killed.values() if t.how is How.EXCEPTION],
            "earned": {case: len(roles) for case, roles in self.earned().items()} if earned else None,
            "inputs": self.inputs if earned else None,
            "left_out": self.left_out,
            "problems": self.problems,
            "seconds": round(self.seconds, 1),
        }


Progress = Callable[[str, int, int, Family], None]
"""Called with what is being run, how many of its mutants were tried, how many there are, and the family so far."""


def hunt(cases: Sequence[Case], settings: Settings, progress: Progress | None = None) -> list[Family]:
    """Plants faults in the ports of some cases. Ctrl-C keeps what was tried.

    Receives:
        cases: of one family or several; each has to be BITWISE without a fault.

    Returns:
        One table a family.
    """
    names = list(dict.fromkeys(case.family for case in cases))
    return [_Hunt(name, [c for c in cases if c.family == name], settings, len(names), progress).run() for name in names]


class _Hunt:
    """The mutants of one family."""

    def __init__(
        self, name: str, cases: Sequence[Case], settings: Settings, families: int, progress: Progress | None
    ) -> None:
        self.family = Family(name)
        self.cases, self.settings, self.progress = cases, settings, progress
        self.killed: set[str] = set()
        self.killers: dict[str, set[str]] = {}
        self.started = time.monotonic()
        self.budget = None if settings.budget is None else settings.budget / families

    def run(self) -> Family:
        try:
            for number, case in enumerate(self.cases, start=1):
                self._try_case(case, until=self._time_of(number / len(self.cases)))
            self._tie_inputs()
            self._try_open_elsewhere()
            self._prove()
        except KeyboardInterrupt:
            self.family.problems.append("interrupted: what follows was not tried")
        self.family.problems += [f"{mutant}: the operator changes nothing" for mutant in self.family.inert]
        self.family.seconds = time.monotonic() - self.started
        return self.family

    def _time_of(self, share: float) -> float:
        """When that share of the budget is spent. A tenth is kept for what is open then."""
        return self.started + 0.9 * share * self.budget if self.budget is not None else float("inf")

    def _benches(self, case: Case) -> Iterator[Bench]:
        """The case in each lane that operators want, built anew."""
        lanes = dict.fromkeys(lane for name in OPERATORS for lane in lanes_of(name, case))
        for lane in sorted(lanes, key=lambda lane: not lane.is_truth):
            try:
                with bench(case, lane) as built:
                    yield built
                    built.require_equal()
            except Exception as error:
                self.family.problems.append(f"{case.id}[{lane.name}]: {next(iter(str(error).splitlines()), error)}")

    def _try_case(self, case: Case, until: float) -> None:
        for built in self._benches(case):
            planned = [m for m in built.mutants_of_lane() if self.settings.keyword in m.id]
            if self.settings.every_case:
                planned = [m for m in one_of_each_role(planned) if len(self.killers.get(m.role, ())) < 2]
            else:
                planned = [mutant for mutant in planned if mutant.fault not in self.killed]
            # By the fault alone: where time runs out, all cases have tried the same faults.
            planned.sort(key=lambda mutant: random.Random(f"{self.settings.seed}:{mutant.fault}").random())
            if built.seconds > SLOW:
                self.family.left_out += max(0, len(planned) - MUTANTS_OF_SLOW_CASES)
            self._try(built, planned[: self._most(built)], until)
            if not any(m.fault not in self.killed and OPERATORS[m.operator].lanes == "half" for m in built.mutants()):
                break  # no mistake of precision is left for the other lane: it need not be built

    def _tie_inputs(self) -> None:
        """Looks for a fault that only one input lets its case tell, for each input of each case."""
        for number, case in enumerate(self.cases if self.settings.every_case else (), start=1):
            if self.progress:
                self.progress(f"{case.id}, its inputs: case", number, len(self.cases), self.family)
            self.family.inputs[case.id] = witnesses(case, self.family.revealing, self._most)

    def _most(self, built: Bench) -> int | None:
        """How many faults are tried in a case: few where it is slow."""
        limits = [self.settings.per_case, MUTANTS_OF_SLOW_CASES if built.seconds > SLOW else None]
        return min((limit for limit in limits if limit is not None), default=None)

    def _try(self, built: Bench, planned: Sequence[Mutant], until: float) -> None:
        for number, mutant in enumerate(planned):
            if time.monotonic() > until:
                self.family.left_out += len(planned) - number
                break
            trial = built.try_out(mutant)
            self.family.trials.append(trial)
            if trial.outcome is Outcome.KILLED:
                self.killed.add(mutant.fault)
                self.killers.setdefault(mutant.role, set()).add(mutant.case)
            if self.progress:
                where = f"{built.case.id}[{built.lane.name}]"
                self.progress(where, number + 1, len(planned), self.family)

    def _try_open_elsewhere(self) -> None:
        """Faults that survived are planted in the cases and lanes of the family in which they were not tried."""
        tried = {(trial.case, trial.lane, trial.fault) for trial in self.family.trials}
        until = self._time_of(1 / 0.9)
        for case in self.cases if self.family.open else ():
            if time.monotonic() > until:
                break
            if all(self._is_done(case, fault, tried) for fault in self.family.open):
                continue
            for built in self._benches(case):
                left = self.family.open
                wanted = [m for m in built.mutants_of_lane() if m.fault in left]
                wanted = [m for m in wanted if (case.id, built.lane.name, m.fault) not in tried]
                self._try(built, wanted, until)

    def _is_done(self, case: Case, fault: str, tried: Collection[tuple[str, str, str]]) -> bool:
        """Whether a case has tried a fault in all of its lanes."""
        return all((case.id, lane.name, fault) in tried for lane in lanes_of(fault.split("::")[0], case))

    def _prove(self) -> None:
        """Holds the claims about equivalent mutants against what survived."""
        stale = {line.fault for line in self.settings.equivalents if self._is_about(line)}
        cases = {case.id: case for case in self.cases}
        for fault, trial in self.family.open.items():
            line = next((line for line in self.settings.equivalents if line.covers(fault)), None)
            if line is None:
                continue
            stale.discard(line.fault)
            with bench(cases[trial.case], Lane(trial.lane)) as built:
                mutant = next(m for m in built.mutants_of_lane() if m.fault == fault)
                why_not = why_not_equivalent(built, mutant, line.scope)
            if why_not:
                self.family.problems.append(f"{trial.id} is said to be equivalent, but {why_not}")
            else:
                self.family.proved[fault] = line.reason
        self.family.problems += [f"equivalent.toml: {fault} is killed now: remove the line" for fault in sorted(stale)]

    def _is_about(self, line: Line) -> bool:
        """Whether a claim covers a fault of this family that was tried."""
        return any(line.covers(fault) for fault in self.family.faults)


def require_case(cases: Sequence[Case], keyword: str) -> list[Case]:
    """The cases that a keyword leaves: those whose id it contains, or that a mutant's id begins with.

    Raises:
        ParityError: there is none.
    """
    found = [case for case in cases if keyword in case.id or keyword.startswith(f"{case.id}::")] or (
        list(cases) if "::" in keyword else []
    )
    if not found:
        raise ParityError(f"No case id contains {keyword!r}.")
    return found
