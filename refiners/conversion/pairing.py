"""Which upstream tensors become which port tensors: the key map applied to the keys that are really there."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from refiners.conversion.patterns import Bindings, Match, Pattern
from refiners.conversion.problems import Problems, hint
from refiners.conversion.rules import Rule
from refiners.conversion.table import Ignored, Line, Slot, Table, Tied


@dataclass(frozen=True)
class Pairing:
    """Upstream tensors and the port tensors that hold the same numbers.

    Attributes:
        upstream: the upstream keys, several when they are merged.
        port: the port keys, several when one upstream tensor is split.
        rule: the change between them.
    """

    upstream: tuple[str, ...]
    port: tuple[str, ...]
    rule: Rule

    def to_port(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The port's tensors for upstream's: values, gradients, anything of these shapes."""
        return self.rule.to_port(tensors)

    def to_upstream(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Upstream's tensors for the port's: values, gradients, anything of these shapes."""
        return self.rule.to_upstream(tensors)


@dataclass
class Plan:
    """All pairings of two sets of keys, and what does not fit.

    Attributes:
        pairings: what goes where.
        ignored: upstream keys that stay out.
        tied: upstream keys whose bytes have to be those of another one.
        problems: the keys that have no place, and those that nothing fills.
    """

    pairings: list[Pairing] = field(default_factory=list[Pairing])
    ignored: dict[str, Ignored] = field(default_factory=dict[str, Ignored])
    tied: dict[str, str] = field(default_factory=dict[str, str])
    problems: Problems = field(default_factory=Problems)


class _PortNames:
    """The port's keys, found although an only child has no number."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = dict.fromkeys(keys)

    @cached_property
    def _nodes(self) -> set[str]:
        nodes: set[str] = set()
        for key in self.keys:
            while key and key not in nodes:
                nodes.add(key)
                key = key.rpartition(".")[0]
        return nodes

    def find(self, pattern: Pattern, bindings: Bindings, below: str) -> str | None:
        key = pattern.fill(bindings, below)
        if key in self.keys:
            return key
        path = ""
        for text, only_child in pattern.segments_of(bindings):
            prefix = f"{path}." if path else ""
            path = prefix + text
            if only_child is not None and path not in self._nodes and prefix + only_child in self._nodes:
                path = prefix + only_child
        return path + below if path + below in self.keys else None


class _Group:
    """The upstream keys that one line makes one group of port keys from."""

    def __init__(self, line: Line, match: Match[Slot]) -> None:
        self.line = line
        self.bindings = match.bindings
        self.below = match.below
        self.upstream: dict[int, str] = {}

    @property
    def missing(self) -> list[str]:
        return [
            pattern.fill(self.bindings, self.below)
            for index, pattern in enumerate(self.line.upstream)
            if index not in self.upstream
        ]


class Planner:
    """Pairs the keys of one upstream state dict with those of one port.

    Receives:
        table: the lines of the key map.
        upstream: the upstream keys.
        port: the port's keys.
        port_ties: port keys that are the same parameter as an earlier one, with that earlier key.
        given_ties: upstream keys that share memory with an earlier one, for a better message only.
    """

    def __init__(
        self,
        table: Table,
        upstream: Collection[str],
        port: Collection[str],
        port_ties: Mapping[str, str],
        given_ties: Mapping[str, str] | None = None,
    ) -> None:
        self.table = table
        self.names = _PortNames(port)
        self.port_ties = port_ties
        self.given_ties = given_ties or {}
        self.plan = Plan()
        self._groups: dict[tuple[int, frozenset[tuple[str, int | str]], str], _Group] = {}
        self._filled: dict[str, str] = {}
        self._given = self._spellings(upstream)
        self._unknown: list[tuple[str, str]] = []

    def run(self) -> Plan:
        """The pairings, in the order of the upstream keys, and everything that does not fit."""
        for canonical, key in self._given.items():
            self._place(canonical, key)
        for group in self._groups.values():
            self._pair(group)
        self._report_unfilled()
        return self.plan

    def _spellings(self, upstream: Collection[str]) -> dict[str, str]:
        given: dict[str, str] = {}
        for key in upstream:
            other = given.setdefault(self.table.canonical(key), key)
            if other != key:
                self.plan.problems.add("twice", key, f"is another spelling of {other!r}, which is there too")
        return given

    def _place(self, canonical: str, key: str) -> None:
        matches = self.table.upstream.find(canonical)
        if not matches:
            self._unknown.append((canonical, key))
            return
        if len(matches) > 1:
            lines = " and ".join(repr(_pattern_of(match.value).text) for match in matches)
            self.plan.problems.add("ambiguous", key, f"is covered by {lines}; make one of them longer")
            return
        match = matches[0]
        value, bindings, below, _ = match
        if isinstance(value, Ignored):
            self.plan.ignored[key] = value
        elif isinstance(value, Tied):
            self._tie(value.original.fill(bindings, below), key)
        else:
            identity = (id(value.line), frozenset(bindings.items()), below)
            group = self._groups.setdefault(identity, _Group(value.line, Match(value, bindings, below, (0, 0, 0))))
            group.upstream[value.index] = key

    def _tie(self, original: str, key: str) -> None:
        if original in self._given:
            self.plan.tied[key] = self._given[original]
        else:
            self._place(original, key)

    def _pair(self, group: _Group) -> None:
        keys = tuple(group.upstream.values())
        if group.missing:
            absent = ", ".join(map(repr, group.missing))
            self.plan.problems.add("incomplete", keys[0], f"is joined with {absent}, which is not there")
            found = (self.names.find(pattern, group.bindings, group.below) for pattern in group.line.port)
            self._filled.update({name: keys[0] for name in found if name is not None})
            return
        upstream = tuple(group.upstream[index] for index in range(len(group.line.upstream)))
        port: list[str] = []
        for pattern in group.line.port:
            found = self.names.find(pattern, group.bindings, group.below)
            if found is None:
                wanted = pattern.fill(group.bindings, group.below)
                where = f"goes to {wanted!r}, which the port does not have"
                self.plan.problems.add("unexpected", keys[0], where + hint(wanted, self._free_names()))
                continue
            other = self._filled.setdefault(found, keys[0])
            if other != keys[0] or found in port:
                self.plan.problems.add("twice", found, f"is filled from {other!r} and from {keys[0]!r}")
            port.append(found)
        if len(port) == len(group.line.port):
            self.plan.pairings.append(Pairing(upstream, tuple(port), group.line.rule))

    def _free_names(self) -> list[str]:
        return [key for key in self.names.keys if key not in self._filled]

    def _report_unfilled(self) -> None:
        problems = self.plan.problems
        filled = {self.port_ties.get(key, key) for key in self._filled}
        absent: list[str] = []
        unplaced = [key for _, key in self._unknown] + problems.keys("unexpected")
        for key in self.names.keys:
            if self.port_ties.get(key, key) in filled:
                continue
            expected = self.table.expected_upstream(key)
            if not expected:
                problems.add("missing", key, "no line of the key map fills it")
                continue
            absent += [name for name in expected if name not in self._given]
            text = f"is filled from {' and '.join(map(repr, expected))}, which is not there"
            looks_like = hint(expected[0], unplaced) if len(problems.keys("missing")) < 40 else ""
            problems.add("missing", key, text + looks_like)
        for count, (canonical, key) in enumerate(self._unknown):
            looks_like = (
                hint(canonical, absent or [key for key in self._given if key != canonical]) if count < 40 else ""
            )
            if (other := self.given_ties.get(key)) is not None:
                looks_like = f"; it is the same memory as {other!r}: declare it in tied={{…}} if it repeats that"
            problems.add("unexpected", key, "no line of the key map covers it" + looks_like)


def _pattern_of(value: Slot | Ignored | Tied) -> Pattern:
    return value.line.upstream[value.index] if isinstance(value, Slot) else value.pattern
