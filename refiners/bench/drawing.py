"""Drawings without a script: bars as shares of a width, points and lines as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

WIDTH, HEIGHT = 460.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 14.0, 12.0, 34.0


@dataclass(frozen=True)
class Scale:
    """Maps values to places, evenly or by their logarithms."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (self._of(x) for x in (self.low, self.high, min(max(value, self.low), self.high)))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 2)

    def _of(self, value: float) -> float:
        return math.log(value) if self.is_log else value


@dataclass(frozen=True)
class Point:
    """A dot, with its whisker."""

    x: float
    y: float
    low: float
    high: float
    label: str
    title: str
    anchor: str = "start"
    label_y: float = 0.0


@dataclass(frozen=True)
class Line:
    """Points in a row, of one colour."""

    label: str
    color: int
    points: Sequence[Point]

    @property
    def path(self) -> str:
        """What SVG draws."""
        return " ".join(f"{point.x},{point.y}" for point in self.points)


@dataclass(frozen=True)
class Plot:
    """What the template draws."""

    lines: Sequence[Line]
    across: Sequence[tuple[float, str]]
    up: Sequence[tuple[float, str]]
    one: float | None
    x_label: str
    y_label: str
    told: str
    """The drawing in words, for those who do not see it."""


Sample = tuple[float, float, float, float, str]
"""x, median, low, high, what it is."""


def plot(
    samples: Mapping[str, Sequence[Sample]], x_label: str, y_label: str, *, log: bool = False, labels: bool = False
) -> Plot | None:
    """Lines through samples; None without any.

    Args:
        samples: For each line, its points.
        x_label: What goes to the right.
        y_label: What goes up.
        log: The axis to the right is one of logarithms.
        labels: Points carry their names, and nothing connects them.
    """
    every = [sample for line in samples.values() for sample in line]
    if not every:
        return None
    xs = sorted({sample[0] for sample in every})
    low, high = min(1.0, *(s[2] for s in every)), max(1.0, *(s[3] for s in every))
    room = 0.06 * (high - low) or 0.1
    left, right = (xs[0] / 1.4, xs[-1] * 1.4) if log else (xs[0] - 0.25, xs[-1] + 0.25)
    across = Scale(left, right, LEFT, WIDTH - RIGHT, is_log=log)
    up = Scale(low - room, high + room, HEIGHT - BOTTOM, TOP)

    def point(sample: Sample) -> Point:
        x, median, lowest, highest, label = sample
        is_right = across(x) > WIDTH * 0.62
        title = f"{label}: {median:.3f} [{lowest:.3f}, {highest:.3f}]"
        return Point(
            across(x),
            up(median),
            up(lowest),
            up(highest),
            label if labels else "",
            title,
            "end" if is_right else "start",
        )

    lines = [Line(name, i, apart([point(s) for s in line])) for i, (name, line) in enumerate(samples.items())]
    return Plot(
        lines=lines,
        across=[(across(x), short(x)) for x in (powers(left, right) if log else xs)],
        up=[(up(y), f"{y:g}") for y in steps(low - room, high + room)],
        one=up(1.0),
        x_label=x_label,
        y_label=y_label,
        told=f"{y_label}, by {x_label}: " + "; ".join(p.title for line in lines for p in line.points),
    )


def apart(points: list[Point], width: float = 110.0, height: float = 12.0) -> list[Point]:
    """Move the labels of points down until none lies on another."""
    placed: list[Point] = []
    for point in sorted(points, key=lambda point: point.y):
        y = point.y - 5
        while any(
            abs(other.x - point.x) < width and abs(other.label_y - y) < height for other in placed if other.label
        ):
            y += height / 4
        placed.append(replace(point, label_y=round(y, 2)))
    return sorted(placed, key=lambda point: point.x)


def steps(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, a few of them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def powers(low: float, high: float) -> list[float]:
    """The powers of ten from low to high, and between them 3 times each where there are few."""
    tens = [10.0**i for i in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    marks = tens if len(tens) > 4 else sorted([*tens, *(3 * ten for ten in tens)])
    return [mark for mark in marks if low <= mark <= high]


def short(value: float) -> str:
    """A number as people say it: 12k, 3.4M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"
