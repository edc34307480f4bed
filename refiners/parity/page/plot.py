"""The error along the forward as an SVG drawing, which scales with the page and needs no script."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from refiners.parity.told import LeafError

WIDTH, HEIGHT = 720.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 12.0, 14.0, 34.0
ZERO_BAND = 26.0
"""Below the axis of logarithms: errors of exactly zero, which have none."""
LOWEST, HIGHEST = 1e-18, 1e3


@dataclass(frozen=True)
class Dot:
    """A leaf in the drawing."""

    x: float
    y: float
    mark: str
    title: str


@dataclass(frozen=True)
class Plot:
    """What the template draws."""

    dots: list[Dot]
    ticks: list[tuple[float, str]]
    line: str
    zero: float
    told: str
    """The drawing in words, for those who do not see it."""


def plot(errors: Sequence[LeafError]) -> Plot | None:
    """The drawing of some errors; None where there is nothing to draw."""
    finite = [leaf.error for leaf in errors if leaf.error]
    if not errors or not (finite or any(leaf.error is None for leaf in errors)):
        return None
    low = math.floor(math.log10(max(LOWEST, min(finite, default=1e-9))))
    high = math.ceil(math.log10(min(HIGHEST, max(finite, default=1.0))))
    high = max(high, low + 2)
    zero = HEIGHT - BOTTOM
    floor = zero - ZERO_BAND
    step = (WIDTH - LEFT - RIGHT) / max(1, len(errors))

    def height(error: float | None) -> float:
        if error is None:
            return TOP
        if error == 0:
            return zero
        share = (math.log10(min(max(error, 10.0**low), 10.0**high)) - low) / (high - low)
        return floor - share * (floor - TOP)

    dots = [
        Dot(round(LEFT + (i + 0.5) * step, 1), round(height(leaf.error), 1), leaf.mark, _title(leaf))
        for i, leaf in enumerate(errors)
    ]
    every = max(1, math.ceil((high - low) / 6))
    ticks = [(round(height(10.0**power), 1), f"1e{power}") for power in range(low, high + 1, every)]
    line = " ".join(f"{dot.x},{dot.y}" for dot in dots)
    return Plot(dots, ticks, line, zero, _in_words(errors))


def _title(leaf: LeafError) -> str:
    error = "not finite" if leaf.error is None else "0, equal bit for bit" if leaf.error == 0 else f"{leaf.error:.3g}"
    mark = f" ({leaf.mark})" if leaf.mark and leaf.mark not in ("equal", "output") else ""
    return f"{leaf.port or 'the port itself'}: {error}{mark}"


def _in_words(errors: Sequence[LeafError]) -> str:
    first = next((i for i, leaf in enumerate(errors) if leaf.error != 0), None)
    if first is None:
        return f"The error is zero behind all {len(errors)} leaves."
    last = errors[-1]
    end = "not finite" if last.error is None else f"{last.error:.2g}"
    return (
        f"The error is zero behind the first {first} of {len(errors)} steps, "
        f"leaves zero at {errors[first].port or 'the port itself'}, and is {end} at the end."
    )
