"""How often the rule of the timings errs: equal contestants that it calls different, slower ones that it lets pass.

A check that raises false alarms is soon ignored, one that misses a slowdown guards nothing. Both rates are measured, on
the machine that the check runs on, and told with the interval of a share that was counted.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import comb
from typing import Any

from benchmarks.engine.contestants import Act, Pair
from benchmarks.engine.figures import Standing

# The slowdown that has to be found, as calls: 21 for 20.
CALLS, MORE = 20, 1
MOST_ALARMS, LEAST_POWER = 0.01, 0.95
# With fewer runs a share of 1 % cannot be told from none.
FEWEST_RUNS = 100
CONFIDENCE = 0.95


@dataclass
class Tries:
    """The standings that some runs gave."""

    standings: Counter[str] = field(default_factory=Counter)

    @property
    def runs(self) -> int:
        return self.standings.total()

    def share(self, *standings: Standing) -> tuple[int, float, float, float]:
        """How many runs gave one of them, their share, and its exact binomial interval."""
        hits = sum(self.standings[standing] for standing in standings)
        return hits, hits / self.runs if self.runs else 0.0, *binomial(hits, self.runs)

    def told(self, *standings: Standing) -> str:
        hits, share, low, high = self.share(*standings)
        return f"{hits} of {self.runs} ({share:.1%}, 95 % interval {low:.1%} to {high:.1%})"


@dataclass
class Gate:
    """Both rates of one workload."""

    equal: Tries = field(default_factory=Tries)
    slower: Tries = field(default_factory=Tries)

    @property
    def problems(self) -> list[str]:
        """Why it may not be trusted; empty where it may."""
        found: list[str] = []
        if min(self.equal.runs, self.slower.runs) < FEWEST_RUNS:
            found.append(f"{FEWEST_RUNS} runs of each are needed, {self.equal.runs} and {self.slower.runs} were made")
        if self.equal.share(Standing.SLOWER, Standing.FASTER)[1] > MOST_ALARMS:
            found.append(f"more than {MOST_ALARMS:.0%} false alarms")
        if self.slower.share(Standing.SLOWER)[1] < LEAST_POWER:
            found.append(f"less than {LEAST_POWER:.0%} of the slowdowns found")
        return found

    def lines(self) -> list[str]:
        return [
            f"false alarms, A against A:   {self.equal.told(Standing.SLOWER, Standing.FASTER)}",
            f"undecided, A against A:      {self.equal.told(Standing.UNDECIDED)}",
            f"slowdowns of 5 % found:      {self.slower.told(Standing.SLOWER)}",
            f"undecided, A against 1.05 A: {self.slower.told(Standing.UNDECIDED)}",
            f"verdict:                     {'; '.join(self.problems) or 'may be trusted'}",
        ]

    def as_json(self) -> dict[str, Any]:
        return {"equal": dict(self.equal.standings), "slower": dict(self.slower.standings), "problems": self.problems}


def repeated(act: Act, times: int) -> Act:
    def repeat() -> None:
        for _ in range(times):
            act()

    return repeat


def pair(build: Callable[[], Act], calls: int, **options: Any) -> Pair:
    """A workload against itself, of which the contestant is called that many times for every 20."""
    return Pair(
        contestant=lambda: repeated(build(), calls), reference=lambda: repeated(build(), CALLS), limit=None, **options
    )


def try_out(gate: Gate, equal: Pair, slower: Pair, runs: int, until: float, seconds: float) -> None:
    """Add runs of both to the counts, in turns, until there are enough or the time is over."""
    while gate.slower.runs < runs and time.monotonic() < until:
        for tries, contest in ((gate.equal, equal), (gate.slower, slower)):
            standing = contest.figure(seconds).standing
            tries.standings[str(standing)] += 1


def measure_gates(
    workloads: Mapping[str, Callable[[], Act]], runs: int, minutes: float, seconds: float = 2.0, more: int = MORE
) -> dict[str, Gate]:
    """The rates of each workload, which share the time among them; `more` calls for every 20 are the slowdown."""
    gates = {name: Gate() for name in workloads}
    start = time.monotonic()
    for i, (name, build) in enumerate(workloads.items()):
        until = start + 60 * minutes * (i + 1) / len(workloads)
        try_out(gates[name], pair(build, CALLS), pair(build, CALLS + more), runs, until, seconds)
    return gates


def binomial(hits: int, runs: int) -> tuple[float, float]:
    """The interval of Clopper and Pearson: the shares under which so many hits are not unlikely."""
    if not runs:
        return 0.0, 1.0
    tail = (1 - CONFIDENCE) / 2

    def at_most(k: int, share: float) -> float:
        return sum(comb(runs, i) * share**i * (1 - share) ** (runs - i) for i in range(k + 1))

    def solve(holds: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return (low + high) / 2

    low = 0.0 if hits == 0 else solve(lambda share: 1 - at_most(hits - 1, share) < tail)
    high = 1.0 if hits == runs else solve(lambda share: at_most(hits, share) > tail)
    return low, high
