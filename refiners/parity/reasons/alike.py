"""One mistake that is made in every layer is told once: faults of like leaves with the same words are grouped.

Paths are alike when they differ in numbers only. Words are alike when they differ in the numbers of paths and in the
shapes of tensors, not in the values that they name.
"""

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
_Numbers = tuple[tuple[str, ...], ...]
"""Those of a path, in order: one for each place, or several that stand there in turn."""

_NUMBER = re.compile(r"\d+")
_SHAPE = re.compile(r"\[[\d, ]*\]")
_TENSOR = re.compile(r"\b(?:b?float|u?int|bool|complex)\d*\[[\d, ]*\]")
_PATH = re.compile(r"`[A-Za-z_][\w.]*\.[\w.]*`|`\w*_\d+`")
MOST_PATHS = 6


class Look(NamedTuple):
    """What of a fault says whether another one is like it."""

    port: str
    """Its path."""
    words: str
    kind: Hashable
    """All else that must be equal."""


@dataclass(frozen=True)
class Alike(Generic[T]):
    """Faults that differ in the numbers of their paths only."""

    first: T
    paths: tuple[str, ...]

    @property
    def where(self) -> str:
        """The paths as one: `layers.{0,1,2}.norm`; "" is the port itself."""
        return in_one(self.paths)


def alike(faults: Sequence[T], look: Callable[[T], Look]) -> list[Alike[T]]:
    """Groups of faults, in the order of the first of each."""
    groups: dict[Hashable, list[tuple[T, str]]] = {}
    for fault in faults:
        seen = look(fault)
        key = _role(seen.port), _in_general(seen.words), seen.kind
        groups.setdefault(key, []).append((fault, seen.port))
    return [Alike(some[0][0], tuple(dict.fromkeys(path for _, path in some))) for some in groups.values()]


def in_one(paths: Sequence[str]) -> str:
    """Paths that differ in numbers only, in as few words as one of braces can say: `a.{0,1}.b, a.2.c`."""
    ways: list[_Numbers] = [tuple((number,) for number in _NUMBER.findall(path)) for path in paths]
    for slot in reversed(range(len(ways[0]))):
        others: dict[_Numbers, list[str]] = {}
        for way in ways:
            others.setdefault((*way[:slot], *way[slot + 1 :]), []).extend(way[slot])
        ways = [(*rest[:slot], tuple(dict.fromkeys(values)), *rest[slot:]) for rest, values in others.items()]
    more = f" and {len(ways) - MOST_PATHS} more" if len(ways) > MOST_PATHS else ""
    return ", ".join(_with_numbers(paths[0], way) for way in ways[:MOST_PATHS]) + more


def _with_numbers(path: str, numbers: _Numbers) -> str:
    told = iter(numbers)

    def slot(_: re.Match[str]) -> str:
        values = next(told)
        return values[0] if len(values) == 1 else f"{{{','.join(values)}}}"

    return _NUMBER.sub(slot, path)


def _role(path: str) -> str:
    return _NUMBER.sub("#", path)


def _in_general(words: str) -> str:
    """Words without the shapes of tensors and the numbers of paths."""
    without_shapes = _TENSOR.sub(lambda found: _SHAPE.sub("", found[0]), words)
    return _PATH.sub(lambda found: _role(found[0]), without_shapes)
