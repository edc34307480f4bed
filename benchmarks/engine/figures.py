"""Figures: a number that was measured many times, an interval for its median, and a verdict against a limit.

On a shared machine one timing says little and a mean less: a neighbour's burst moves both. So a figure is the *median*
of many draws, and what decides is a bootstrap interval of that median, never the number itself:

    MET         the whole interval is at or below the limit
    MISSED      the whole interval is above it
    UNDECIDED   the limit lies inside, and the time budget ended. No proof, so not green.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cache
from math import exp, lgamma, log
from statistics import median
from typing import Any

# A draw measures the figure once.
Draw = Callable[[], float]
Clock = Callable[[], float]

CONFIDENCE = 0.99
# An interval that is looked at several times errs more often than one that is looked at once.
LOOKS = 8
# Seconds that are spent on a figure.
BUDGET = 2.0
# An undecided figure is worth more time than one that is clear: four times the draws halve an interval.
PATIENCE = 8
HOPELESS = 10
# The half-width, as a share of the median, at which an interval is narrow enough.
PRECISION = 0.01
# With fewer draws, an interval of a median says nothing about its tails.
FEWEST_DRAWS = 16


class Verdict(StrEnum):
    """What an interval says about a limit."""

    MET = "MET"
    MISSED = "MISSED"
    UNDECIDED = "UNDECIDED"
    NO_LIMIT = "no limit"


class Standing(StrEnum):
    """What the interval of a ratio says about its two contestants, whatever the limit is."""

    FASTER = "FASTER"
    SLOWER = "SLOWER"
    SAME = "SAME"
    UNDECIDED = "UNDECIDED"


class LimitError(AssertionError):
    """A figure does not meet its limit, or nobody can tell whether it does."""


@dataclass(frozen=True)
class Interval:
    """A median, and where the true one lies with a confidence of 99 %, whenever the drawing stopped."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of its width, as a share of the median."""
        return (self.high - self.low) / (2 * self.median)

    def standing(self, precision: float = PRECISION) -> Standing:
        """Who is faster: SAME where 1 lies inside of an interval that is narrow, UNDECIDED where it is wide."""
        if self.high < 1:
            return Standing.FASTER
        if self.low > 1:
            return Standing.SLOWER
        return Standing.SAME if self.half_width <= precision else Standing.UNDECIDED

    def verdict(self, limit: float | None) -> Verdict:
        if limit is None:
            return Verdict.NO_LIMIT
        if self.high <= limit:
            return Verdict.MET
        return Verdict.MISSED if self.low > limit else Verdict.UNDECIDED


@dataclass(frozen=True)
class Figure:
    """A measured figure. `samples` are the raw draws, kept so that others can judge them again."""

    interval: Interval
    limit: float | None
    samples: tuple[float, ...]
    unit: str = "×"
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the report draws it by, such as the number of adapters."""

    @property
    def standing(self) -> Standing | None:
        """Who is faster, for a ratio of two contestants."""
        return self.interval.standing() if self.unit == "×" and len(self.samples) > 1 else None

    @property
    def verdict(self) -> Verdict:
        return self.interval.verdict(self.limit)

    def require(self) -> None:
        """Nothing, if the limit is met or there is none.

        Raises:
            LimitError: The limit is missed, or the figure is undecided.
        """
        if self.verdict in (Verdict.MISSED, Verdict.UNDECIDED):
            raise LimitError(str(self))

    def __str__(self) -> str:
        limit = "" if self.limit is None else f", limit {self.limit:g}"
        return f"{self.verdict}: {self.number}, {self.spread}{limit}, {len(self.samples)} draws"

    @property
    def number(self) -> str:
        """The median, to be read."""
        return f"{self._format(self.interval.median)} {self.unit}"

    @property
    def spread(self) -> str:
        """The interval, to be read; a count has none."""
        low, high = self.interval.low, self.interval.high
        return "exact" if low == high else f"[{self._format(low)}, {self._format(high)}]"

    def _format(self, value: float) -> str:
        return f"{value:.0f}" if value == int(value) else f"{value:.4f}" if self.unit == "s" else f"{value:.3f}"

    def as_json(self) -> dict[str, Any]:
        """What is written to the file of `--benchmark-json`."""
        standing = {} if self.standing is None else {"standing": str(self.standing)}
        return asdict(self) | {"verdict": str(self.verdict)} | standing


def exact(count: float, *, limit: float | None, unit: str, **facts: Any) -> Figure:
    """A figure that is counted and not timed, and so known without an interval."""
    return Figure(Interval(count, count, count), limit=limit, samples=(count,), unit=unit, facts=facts)


@cache
def _rank(n: int) -> int:
    """How many of n sorted samples lie beyond either end of the interval.

    No resampling is needed: a resample's median is at most the k-th sample exactly if at least half of its n draws are
    among the first k, so the bootstrap distribution of a median is a sum of binomial terms.
    """

    def chance(k: int) -> float:
        """That the median of a resample is at most the k-th sample, for 0 < k < n."""
        terms = [exp(log_of(k / n, hits)) for hits in range((n + 1) // 2, n + 1)]
        return sum(terms) if n % 2 else sum(terms) - terms[0] / 2

    def log_of(share: float, hits: int) -> float:
        ways = lgamma(n + 1) - lgamma(hits + 1) - lgamma(n - hits + 1)
        return ways + hits * log(share) + (n - hits) * log(1 - share)

    tail = (1 - CONFIDENCE) / 2 / LOOKS
    return bisect_right(range(1, n // 2), tail, key=chance)


def bootstrap(samples: Sequence[float]) -> Interval:
    """The median of the samples, and the bootstrap interval of it."""
    values = sorted(samples)
    rank = _rank(len(values))
    return Interval(median=median(values), low=values[rank], high=values[-1 - rank])


def measure(
    draw: Draw,
    *,
    limit: float | None,
    unit: str = "×",
    precision: float = PRECISION,
    budget: float = BUDGET,
    fewest: int = FEWEST_DRAWS,
    clock: Clock = time.perf_counter,
) -> Figure:
    """Draw until the interval is narrow and on one side of the limit, or the budget is spent.

    Args:
        draw: Measures the figure once.
        limit: What the figure may be at most. None: the figure is told, and judged by nobody.
        unit: The unit of the figure; "×" for a ratio.
        precision: The half-width, as a share of the median, at which the interval is narrow enough.
        budget: Seconds after which no further draw is made; eight times as many while the figure is undecided.
        fewest: The number of draws that are made in any case. The interval is looked at then, and each time the
            number has doubled: a look after every draw would stop at the first lucky one.
        clock: What tells the time; tests bring their own.
    """
    samples: list[float] = []
    look = fewest
    deadlines = [clock() + budget, clock() + PATIENCE * budget]
    hopeless = clock() + HOPELESS * max(budget, 1.0)
    while True:
        samples.append(draw())
        is_late = len(samples) >= fewest and clock() >= deadlines[0]
        # A machine that is so busy that not even the fewest draws come to an end decides nothing.
        if clock() >= hopeless and len(samples) >= 3:
            return Figure(interval=bootstrap(samples), limit=limit, samples=tuple(samples), unit=unit)
        if len(samples) < look and not is_late:
            continue
        look = 2 * len(samples)
        figure = Figure(interval=bootstrap(samples), limit=limit, samples=tuple(samples), unit=unit)
        is_decided = figure.verdict is not Verdict.UNDECIDED
        if is_decided and (is_late or figure.interval.half_width <= precision):
            return figure
        if is_late:
            deadlines.pop(0)
        if not deadlines:
            return figure
