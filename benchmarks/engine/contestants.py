"""Contestants: what is timed against what, in one process, on one thread, in turns.

Two runs one after the other compare two moments of the machine. Here the two contestants take turns within
milliseconds, in the order A B B A, some rounds of it for each draw, and the fastest turn of each counts: what a
neighbour does to caches and clocks only ever adds, and rarely lasts for a whole draw. On a shared machine of two cores
such draws spread by 0.3 to 1 %, those of the sum of two turns by 3 to 6 %. An act that is slow only now and then is not
seen in return; what it does is counted elsewhere.

What the machine's other users take is no cost of a contestant, so seconds are those that the processor worked for this
process. With four busy neighbours per core, the clock on the wall said 0.21 [0.20, 0.86] of a ratio that is 1.03: whole
turns were spent waiting. What a contestant waits for is not seen in return; nothing here waits.

What existed before is hidden from the garbage collector, so that no contestant pays for the objects of the test suite.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from math import inf, sqrt
from typing import Any, Generic, Protocol, TypeVar

from benchmarks.engine.figures import BUDGET, FEWEST_DRAWS, PRECISION, Clock, Figure, measure
from benchmarks.engine.timers import Act, ByClock, Timer

T = TypeVar("T")

# Seconds of one turn of each contestant: long against the clock's resolution, short against a burst.
TURNS = 0.0025
# Seconds of a draw, at most, and its rounds of A B B A.
DRAW = 0.2
ROUNDS = range(2, 9)
WARM_UP = 0.05
REPEATS = 5


class Contest(Protocol):
    """What can be measured, and handed to pytest-benchmark, whose JSON, histogram and compare read it."""

    def figure(self, budget: float = ..., /) -> Figure: ...

    def replay(self, benchmark: Any) -> None: ...


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """Hide everything that exists now from the garbage collector, as long as this is open."""
    if gc.get_freeze_count():
        yield  # an outer one does
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The time of a contestant divided by that of a reference.

    Both are given as functions that build what is to be timed, and every draw builds them anew, in turns the one or the
    other first: where they happen to lie in memory makes two equal models differ by 3 %, and from a single pair of them
    that would be taken for a difference of their classes.
    """

    contestant: Callable[[], Act]
    reference: Callable[[], Act]
    limit: float | None
    precision: float = PRECISION
    clock: Clock = time.process_time
    timer: Timer | None = None
    """How a turn is timed. None: by the clock."""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def figure(self, budget: float = BUDGET) -> Figure:
        with frozen_garbage():
            seconds = [self._seconds(build()) for build in (self.contestant, self.reference)]
            # As many of both: who has the shorter turns finds the caches cold more often.
            calls = max(1, round(TURNS / sum(seconds)))
            rounds = min(max(round(DRAW / (2 * calls * sum(seconds))), ROUNDS[0]), ROUNDS[-1])
            is_first = cycle((True, False))
            figure = measure(
                lambda: self._ratio(calls, rounds, is_first=next(is_first)),
                limit=self.limit,
                precision=self.precision,
                budget=budget,
                clock=self.clock,
            )
        return replace(figure, facts={**self.facts, "seconds": seconds})

    def replay(self, benchmark: Any) -> None:
        benchmark.pedantic(self.contestant(), rounds=20, iterations=5, warmup_rounds=2)

    def _seconds(self, act: Act) -> float:
        """Warm up, and find how long a call takes."""
        start, seconds = self.clock(), inf
        while self.clock() - start < WARM_UP or seconds == inf:
            seconds = min(seconds, self._turn(act, 1))
        return seconds

    def _turn(self, act: Act, calls: int) -> float:
        return (self.timer or ByClock(self.clock))(act, calls)

    def _ratio(self, calls: int, rounds: int, is_first: bool) -> float:
        build, build_other = (self.contestant, self.reference) if is_first else (self.reference, self.contestant)
        act, other = build(), build_other()
        for _ in range(3):
            act()
            other()
        outer, inner = inf, inf
        for _ in range(rounds):
            outer = min(outer, self._turn(act, calls))
            inner = min(inner, self._turn(other, calls), self._turn(other, calls))
            outer = min(outer, self._turn(act, calls))
        return outer / inner if is_first else inner / outer


@dataclass(frozen=True, kw_only=True)
class Work(Generic[T]):
    """An act on something of size n. Each timing gets a `build(n)`: a fresh one if the act changes it."""

    build: Callable[[int], T]
    act: Callable[[T], object]
    n: int
    limit: float | None
    precision: float = 0.05
    clock: Clock = time.process_time
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    repeats: int = REPEATS
    """How many timings a draw is the fastest of. An act of seconds needs but one."""
    fewest: int = FEWEST_DRAWS

    def figure(self, budget: float = BUDGET) -> Figure:
        """The seconds that the act takes. Each draw is the fastest of a few: what neighbours do only ever adds."""
        with frozen_garbage():
            self._seconds(self.n)
            return self._measure(lambda: min(self._seconds(self.n) for _ in range(self.repeats)), budget, unit="s")

    def replay(self, benchmark: Any) -> None:
        benchmark.pedantic(self.act, setup=lambda: ((self.build(self.n),), {}), rounds=min(5, self.fewest))

    def _seconds(self, n: int) -> float:
        subject = self.build(n)
        # Whether a collection falls into so short a time is chance, so it comes before.
        gc.collect()
        gc.disable()
        try:
            start = self.clock()
            self.act(subject)
            return self.clock() - start
        finally:
            gc.enable()

    def _measure(self, draw: Callable[[], float], budget: float, unit: str) -> Figure:
        options = {"limit": self.limit, "unit": unit, "precision": self.precision, "clock": self.clock}
        return replace(measure(draw, budget=budget, fewest=self.fewest, **options), facts=dict(self.facts))


class Growth(Work[T]):
    """By how much the time of the act grows when its size doubles: 2 is linear, 4 is quadratic.

    A size at which something leaves a cache of the processor makes one doubling look slow, so it is the mean of two,
    from n / 2 to 2n: the root of how much the time grows when the size is four times as large. Noise halves with it.
    """

    def figure(self, budget: float = BUDGET) -> Figure:
        with frozen_garbage():
            self._seconds(self.n // 2)
            self._seconds(2 * self.n)
            return self._measure(self._ratio, budget, unit="×")

    def _ratio(self) -> float:
        # The faster of two each, since what neighbours do only ever adds.
        small = self._seconds(self.n // 2)
        large = min(self._seconds(2 * self.n), self._seconds(2 * self.n))
        return sqrt(large / min(small, self._seconds(self.n // 2)))
