"""Exact counts of what Python does: calls of its functions, calls of C, and lines of our own that run.

A timing tells what a change costs, a count tells that something changed at all. Counts need no interval, no budget and
no quiet machine, so they are what a check on CI can stand on; timings see what counts cannot, such as a list copied by
one call. Operations and memory are counted by `watch`.
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.engine.watch import no_garbage_collection, watch

CHECKOUT = Path(__file__).resolve().parents[2]
OURS = ("refiners/", "reference_ports/")


@dataclass
class Calls:
    """What was called in an act, by name."""

    python: Counter[str] = field(default_factory=Counter)
    """By file and qualified name, such as `torch/nn/functional.py:silu`."""
    c: Counter[str] = field(default_factory=Counter)
    """Functions and methods that are no Python: PyTorch's, and Python's own."""


def calls(act: Callable[[], object]) -> Calls:
    """Every call in an act. Its own frame does not count."""
    seen = Calls()
    python: Counter[Any] = Counter()
    c: Counter[Any] = Counter()
    own = getattr(act, "__code__", None)

    def note(frame: FrameType, event: str, called: Any) -> None:
        if event == "call":
            python[frame.f_code] += 1
        elif event == "c_call":
            c[_name_of_c(called)] += 1

    with no_garbage_collection():
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            act()
        finally:
            sys.setprofile(before)
    if own is not None:
        python[own] -= 1
    del c["sys.setprofile"]
    for code, count in python.items():
        seen.python[f"{place(code.co_filename)}:{code.co_qualname}"] += count
    seen.python, seen.c = +seen.python, +c
    return seen


def _name_of_c(called: Any) -> str:
    module = getattr(called, "__module__", None)
    name = getattr(called, "__qualname__", None) or getattr(called, "__name__", "?")
    return f"{module}.{name}" if module else name


@cache
def place(path: str) -> str:
    """A file as it is called on every machine: below the checkout, or below the folder of installed packages."""
    parts = Path(path).parts
    # First: an environment may lie below the checkout, as that of nox does.
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            return Path(*parts[parts.index(folder) + 1 :]).as_posix()
    if path.startswith(str(CHECKOUT)):
        return Path(path).relative_to(CHECKOUT).as_posix()
    library = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if library in parts:
        return Path(*parts[parts.index(library) + 1 :]).as_posix()
    return Path(path).name if path.startswith("/") else path


def lines(act: Callable[[], object]) -> Counter[str]:
    """How many lines of `refiners` and `reference_ports` run in an act, by file: a loop without calls shows here."""
    seen: Counter[str] = Counter()

    def inside(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            seen[frame.f_code.co_filename] += 1
        return inside

    def enter(frame: FrameType, *_: Any) -> Any:
        return inside if place(frame.f_code.co_filename).startswith(OURS) else None

    with no_garbage_collection():
        before = sys.gettrace()
        sys.settrace(enter)
        try:
            act()
        finally:
            sys.settrace(before)
    return Counter({place(path): count for path, count in seen.items()})


def python_calls(act: Callable[[], object]) -> Counter[str]:
    """How often each Python function was called by an act, by its qualified name. Its own frame does not count."""
    counted: Counter[str] = Counter()
    for name, count in calls(act).python.items():
        counted[name.partition(":")[2]] += count
    return counted


def operations(act: Callable[[], object]) -> Counter[str]:
    """How often each ATen operation ran in an act."""
    return watch(act).operations
