"""Files of figures, as `nox -s benchmarks -- --figures FILE` writes them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refiners.errors import FileFormatError

FORMAT = "refiners-benchmarks-1"


@dataclass(frozen=True)
class Figure:
    """One measured figure, with the interval of its median."""

    name: str
    median: float
    low: float
    high: float
    unit: str
    limit: float | None
    verdict: str
    standing: str
    draws: int
    facts: Mapping[str, Any]

    @property
    def is_exact(self) -> bool:
        """Counted, not timed."""
        return self.low == self.high

    @property
    def is_ratio(self) -> bool:
        """The time of one contestant divided by another's."""
        return self.unit == "×" and not self.is_exact

    @property
    def number(self) -> str:
        """The median with its unit."""
        return f"{self._written(self.median)} {self.unit}"

    @property
    def spread(self) -> str:
        """The interval."""
        return "exact" if self.is_exact else f"[{self._written(self.low)}, {self._written(self.high)}]"

    @property
    def title(self) -> str:
        """The name, as people read it: what it is about behind a colon."""
        return title_of(self.name)

    @property
    def suite(self) -> str:
        """Which suite measured it."""
        return str(self.facts.get("suite", "others"))

    def _written(self, value: float) -> str:
        if value == int(value):
            return f"{int(value):,}"
        return f"{value:.4f}" if self.unit == "s" else f"{value:.3f}"


@dataclass(frozen=True)
class Run:
    """All figures of one run, and where it took place."""

    figures: Sequence[Figure]
    errors: Mapping[str, str]
    device: Mapping[str, str]
    commit: str
    started: str
    complete: bool
    throttled: Sequence[str]

    def of(self, *, suite: str) -> list[Figure]:
        """The figures of a suite."""
        return [figure for figure in self.figures if figure.suite == suite]


def title_of(name: str) -> str:
    """The name of a benchmark, as people read it."""
    return name.replace("[", ": ").rstrip("]")


def read_run(path: Path) -> Run:
    """The run that a file holds.

    Raises:
        FileFormatError: (a ValueError) The file is broken, or holds no figures.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{path} is broken: {error}. Measure again, or restore it.") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:  # pyright: ignore[reportUnknownMemberType] (JSON)
        raise FileFormatError(
            f"{path} holds no figures: its format is not {FORMAT!r}. "
            "`nox -s benchmarks -- --figures FILE` writes such a file."
        )
    try:
        return _run(told)  # pyright: ignore[reportUnknownArgumentType] because JSON can hold anything
    except (KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path} is incomplete: {type(error).__name__} {error}. Measure again.") from error


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of files and of folders of files, the latest first.

    Raises:
        FileFormatError: (a ValueError) A file is broken, or there is none.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise FileFormatError(f"There are no figures in {', '.join(map(str, paths))}: no file there ends in .json.")
    return sorted((read_run(file) for file in files), key=lambda run: run.started, reverse=True)


def _run(told: Mapping[str, Any]) -> Run:
    device = told["device"]
    reasons = [reason for state in told["states"] for reason in state["throttled"]]
    return Run(
        figures=[*_figures(told["figures"])],
        errors=dict(told["errors"]),
        device={"device": device["name"], "kind": device["kind"], **device["properties"]},
        commit=told["commit"],
        started=told["started"],
        complete=told["complete"],
        throttled=list(dict.fromkeys(reasons)),
    )


def _figures(told: Mapping[str, Any]) -> Iterator[Figure]:
    for name, figure in told.items():
        interval = figure["interval"]
        yield Figure(
            name=name,
            median=interval["median"],
            low=interval["low"],
            high=interval["high"],
            unit=figure["unit"],
            limit=figure["limit"],
            verdict=figure["verdict"],
            standing=figure.get("standing", ""),
            draws=figure.get("draws", len(figure["samples"])),
            facts=figure["facts"],
        )
