"""Patterns of keys: `encoder.layers.{i}.self_attn.{p}` stands for many state-dict keys at once.

A pattern is a dotted key in which a name between braces stands for what varies. The same names on the other side of
a `KeyMap` say where it goes:

    {i} {j} {k} {l} {m} {n}   a number; `{i+1}`, `{i-1}`, `{2*i}`, `{2*i+1}` compute with it
    {name:int}                a number under a longer name
    {p}                       `weight` or `bias`
    {name:a|b|c}              one of these words
    {rest}                    one or more whole segments
    {name}                    any other name: one segment, or a part of one (`{side}_blocks`)

A pattern also covers every key below it: `pooler.dense` covers `pooler.dense.weight`. When several patterns cover a
key, the one with the most literal segments wins, then the longest, then the one with the fewest `{rest}`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Generic, Literal, NamedTuple, TypeVar

from refiners.errors import ConversionError

T = TypeVar("T")

Bindings = Mapping[str, int | str]

_NUMBER_NAMES = frozenset("ijklmn")
_NUMBER = re.compile(r"(?:(?P<factor>[1-9]\d*)\*)?(?P<name>[A-Za-z_]\w*)(?:(?P<offset>[+-]\d+))?")
_WORD = re.compile(r"(?P<name>[A-Za-z_]\w*)(?::(?P<kind>[^{}]+))?")
_SPLIT = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Term:
    """What stands between two braces: a name, the texts it matches, and its arithmetic if it is a number."""

    name: str
    kind: Literal["number", "word", "rest"]
    regex: str
    factor: int = 1
    offset: int = 0

    @classmethod
    def parse(cls, text: str, pattern: str) -> "Term":
        """Reads the text between two braces of `pattern`."""
        if (word := _WORD.fullmatch(text)) is not None and word["name"] not in _NUMBER_NAMES and word["kind"] != "int":
            name, kind = word["name"], word["kind"]
            if kind is not None:
                return cls(name, "word", "|".join(re.escape(choice) for choice in kind.split("|")))
            if name == "rest":
                return cls(name, "rest", r".+")
            return cls(name, "word", "weight|bias" if name == "p" else r"[^.]+")
        if (number := _NUMBER.fullmatch(text.removesuffix(":int"))) is not None:
            name = number["name"]
            if name in _NUMBER_NAMES or text.endswith(":int"):
                factor, offset = int(number["factor"] or 1), int(number["offset"] or 0)
                return cls(name, "number", r"0|[1-9]\d*", factor, offset)
        raise ConversionError(
            f"{{{text}}} in the pattern {pattern!r} is not understood. Write {{i}}, {{i+1}} or {{2*i+1}} for a number "
            "(names i to n, or {name:int}), {p} for weight or bias, {name:a|b} for one of two words, {rest} for "
            "several segments."
        )

    def read(self, text: str) -> int | str | None:
        """The value this term has when it stands for `text`, None when it cannot."""
        if self.kind != "number":
            return text
        value, remainder = divmod(int(text) - self.offset, self.factor)
        return value if remainder == 0 and value >= 0 else None

    def write(self, value: int | str) -> str:
        """The text this term stands for when it has this value."""
        return str(self.factor * value + self.offset) if isinstance(value, int) else value


@dataclass(frozen=True)
class Segment:
    """What stands between two dots of a pattern: literal text and terms."""

    text: str
    pieces: tuple[str | Term, ...]

    @cached_property
    def literal(self) -> str | None:
        """The text, when the segment has no term."""
        return self.text if all(isinstance(piece, str) for piece in self.pieces) else None

    @cached_property
    def rest(self) -> str | None:
        """The name of the term that stands for several segments, when that is what this segment is."""
        first = self.pieces[0]
        return first.name if isinstance(first, Term) and first.kind == "rest" else None

    @cached_property
    def numbered(self) -> tuple[str, Term] | None:
        """`("Name", {i+1})` for `Name_{i+1}`, the name of a child that its Chain numbers if it has sisters."""
        match self.pieces:
            case (str() as name, Term(kind="number") as term) if name.endswith("_") and len(name) > 1:
                return name[:-1], term
            case _:
                return None

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile("".join(re.escape(p) if isinstance(p, str) else f"({p.regex})" for p in self.pieces))

    @cached_property
    def _terms(self) -> tuple[Term, ...]:
        return tuple(piece for piece in self.pieces if isinstance(piece, Term))

    def match(self, text: str, bindings: Bindings, bare: bool) -> Bindings | None:
        """The bindings with those that make this segment `text`, None when there are none.

        With `bare`, `Name_{i+1}` also stands for `Name`, as the name of an only child.
        """
        found = self._regex.fullmatch(text)
        groups: tuple[str, ...] = found.groups() if found is not None else ()
        if found is None:
            if not bare or self.numbered is None or self.numbered[0] != text:
                return None
            groups = ("1",)
        bound = dict(bindings)
        for term, group in zip(self._terms, groups, strict=True):
            value = term.read(group)
            if value is None or bound.setdefault(term.name, value) != value:
                return None
        return bound

    def fill(self, bindings: Bindings) -> str:
        """The text of this segment under these bindings."""
        return "".join(p if isinstance(p, str) else p.write(bindings[p.name]) for p in self.pieces)


@lru_cache(maxsize=1 << 14)
def _segments_of(pattern: str) -> tuple[Segment, ...]:
    """The segments of a pattern. Tables repeat one another's, with another prefix or for another variant."""
    segments: list[Segment] = []
    for text in pattern.split("."):
        parts = _SPLIT.split(text)
        pieces = tuple(
            Term.parse(part, pattern) if index % 2 else part for index, part in enumerate(parts) if index % 2 or part
        )
        if any(isinstance(piece, str) and ("{" in piece or "}" in piece) for piece in pieces):
            raise ConversionError(f"The braces of the pattern {pattern!r} do not pair up inside one segment.")
        if len(pieces) > 1 and any(isinstance(piece, Term) and piece.kind == "rest" for piece in pieces):
            raise ConversionError(f"In the pattern {pattern!r}, {{rest}} has to stand alone between two dots.")
        segments.append(Segment(text, pieces))
    return tuple(segments)


@dataclass(frozen=True)
class Pattern:
    """A dotted key whose parts between braces vary.

    Raises:
        ConversionError: a brace or a name that is not understood.
    """

    text: str
    segments: tuple[Segment, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if "" in self.text.split("."):
            raise ConversionError(
                f"The pattern {self.text!r} has an empty segment. Write names separated by single dots."
            )
        object.__setattr__(self, "segments", _segments_of(self.text))

    @cached_property
    def names(self) -> frozenset[str]:
        """The names between braces."""
        return frozenset(p.name for segment in self.segments for p in segment.pieces if isinstance(p, Term))

    @cached_property
    def _pieces(self) -> tuple[str | Term, ...]:
        pieces: list[str | Term] = []
        for segment in self.segments:
            pieces += [".", *segment.pieces] if pieces else segment.pieces
        return tuple(pieces)

    def fill(self, bindings: Bindings, below: str = "") -> str:
        """The key under these bindings, `below` appended (`""` or `".weight"`)."""
        return "".join([p if isinstance(p, str) else p.write(bindings[p.name]) for p in self._pieces]) + below

    def segments_of(self, bindings: Bindings) -> list[tuple[str, str | None]]:
        """Each segment's text, with the name it has when it is an only child (None when it has no such name)."""
        filled: list[tuple[str, str | None]] = []
        for segment in self.segments:
            text = segment.fill(bindings)
            numbered = segment.numbered
            filled.append((text, numbered[0] if numbered is not None and text == f"{numbered[0]}_1" else None))
        return filled


class Match(NamedTuple, Generic[T]):
    """That a pattern covers a key: what the pattern stands for, its bindings, and the part of the key below it."""

    value: T
    bindings: Bindings
    below: str
    rank: tuple[int, int, int]


class _Node(Generic[T]):
    __slots__ = ("literals", "rests", "segments", "values")

    def __init__(self) -> None:
        self.values: list[T] = []
        self.literals: dict[str, _Node[T]] = {}
        self.segments: dict[Segment, _Node[T]] = {}
        self.rests: dict[str, _Node[T]] = {}

    def child(self, segment: Segment) -> "_Node[T]":
        if segment.literal is not None:
            return self.literals.setdefault(segment.literal, _Node())
        if segment.rest is not None:
            return self.rests.setdefault(segment.rest, _Node())
        return self.segments.setdefault(segment, _Node())


class PatternIndex(Generic[T]):
    """Finds the patterns that cover a key, in a time that does not grow with the number of patterns.

    Receives:
        bare: `Name_{i+1}` also covers `Name`, the name of an only child.
    """

    def __init__(self, bare: bool = False) -> None:
        self._root: _Node[T] = _Node()
        self._bare = bare

    def add(self, pattern: Pattern, value: T) -> None:
        """Adds a pattern and what it stands for."""
        node = self._root
        for segment in pattern.segments:
            node = node.child(segment)
        node.values.append(value)

    def find(self, key: str) -> list[Match[T]]:
        """The best matches of a key: none, one, or several that are equally good."""
        segments = key.split(".")
        best: list[Match[T]] = []
        stack: list[tuple[_Node[T], int, Bindings, int, int]] = [(self._root, 0, {}, 0, 0)]
        while stack:
            node, at, bindings, literals, rests = stack.pop()
            if node.values:
                rank = (literals, at, -rests)
                if not best or rank >= best[0].rank:
                    below = "".join([f".{segment}" for segment in segments[at:]])
                    found = [Match(value, bindings, below, rank) for value in node.values]
                    best = found if not best or rank > best[0].rank else best + found
            if at == len(segments):
                continue
            if (child := node.literals.get(segments[at])) is not None:
                stack.append((child, at + 1, bindings, literals + 1, rests))
            for segment, child in node.segments.items():
                if (bound := segment.match(segments[at], bindings, self._bare)) is not None:
                    stack.append((child, at + 1, bound, literals, rests))
            for name, child in node.rests.items():
                for stop in range(at + 1, len(segments) + 1):
                    text = ".".join(segments[at:stop])
                    if bindings.get(name, text) == text:
                        stack.append((child, stop, {**bindings, name: text}, literals, rests + 1))
        return best
