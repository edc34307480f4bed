"""The lines of a key map, read and checked once, with the indexes that find the line for a key of either side."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from refiners.conversion.patterns import Pattern, PatternIndex
from refiners.conversion.rules import Merge, Recomputed, Rename, Rule
from refiners.errors import ConversionError

UpstreamKey = str | tuple[str, ...]
Lines = Mapping[str, str | Rule] | Mapping[tuple[str, ...], str | Rule] | Mapping[UpstreamKey, str | Rule]
Reason = str | Recomputed


@dataclass(frozen=True, eq=False)
class Line:
    """One line of the table: the upstream patterns, the port patterns, and the rule between them."""

    upstream: tuple[Pattern, ...]
    port: tuple[Pattern, ...]
    rule: Rule

    @classmethod
    def read(cls, upstream: UpstreamKey, value: str | Rule) -> "Line":
        """Reads and checks a line.

        Raises:
            ConversionError: a name stands on one side only, or the rule does not take that many tensors.
        """
        keys = (upstream,) if isinstance(upstream, str) else upstream
        rule = Rename(value) if isinstance(value, str) else value
        if isinstance(rule, Merge):
            rule = rule.with_count(len(keys))
        elif rule.inputs is not None and rule.inputs != len(keys):
            raise ConversionError(
                f"The line {upstream!r} has {len(keys)} upstream keys, {value!r} takes {rule.inputs}. "
                "Use Merge for several."
            )
        line = cls(tuple(map(Pattern, keys)), tuple(map(Pattern, rule.leaves)), rule)
        names = line.upstream[0].names
        for pattern in (*line.upstream, *line.port):
            if pattern.names != names:
                odd = ", ".join(f"{{{name}}}" for name in sorted(pattern.names ^ names))
                raise ConversionError(
                    f"In the line {upstream!r}: {value!r}, {odd} does not stand in every pattern, so that the line has "
                    "no inverse. Write it on both sides, or one line for each case."
                )
        return line


@dataclass(frozen=True, eq=False)
class Slot:
    """The place of one pattern in a line."""

    line: Line
    index: int


@dataclass(frozen=True, eq=False)
class Ignored:
    """Upstream keys that the port does not hold: why, and their value where it can be computed."""

    pattern: Pattern
    reason: str
    value: Callable[[torch.Size], Tensor] | None
    upstream_reads: bool = True


@dataclass(frozen=True, eq=False)
class Tied:
    """Upstream keys whose bytes are those of another upstream key."""

    pattern: Pattern
    original: Pattern


@dataclass(frozen=True, eq=False)
class Alias:
    """Another spelling of upstream keys."""

    pattern: Pattern
    spelling: Pattern


class Table:
    """All lines of a key map with their indexes.

    Raises:
        ConversionError: a pattern, a line or a reason that cannot be used.
    """

    def __init__(
        self,
        lines: Lines,
        ignore: Mapping[str, Reason],
        aliases: Mapping[str, str],
        tied: Mapping[str, str],
    ) -> None:
        self.upstream: PatternIndex[Slot | Ignored | Tied] = PatternIndex()
        self.port: PatternIndex[Slot] = PatternIndex(bare=True)
        self.aliases: PatternIndex[Alias] = PatternIndex()
        for key, value in lines.items():
            self._add_line(Line.read(key, value))
        for pattern, reason in ignore.items():
            self._add_ignored(pattern, reason)
        for pattern, original in tied.items():
            both = _same_names(pattern, original, "tied")
            self.upstream.add(both[0], Tied(*both))
        for pattern, spelling in aliases.items():
            both = _same_names(pattern, spelling, "aliases")
            self.aliases.add(both[0], Alias(*both))
        self._has_aliases = bool(aliases)

    def _add_line(self, line: Line) -> None:
        for index, pattern in enumerate(line.upstream):
            self.upstream.add(pattern, Slot(line, index))
        for index, pattern in enumerate(line.port):
            self.port.add(pattern, Slot(line, index))

    def _add_ignored(self, pattern: str, reason: Reason) -> None:
        text = reason if isinstance(reason, str) else reason.reason
        if not text.strip():
            raise ConversionError(
                f"ignore={{{pattern!r}: …}} has no reason. Say why the port does not need these weights."
            )
        value, is_read = (None, True) if isinstance(reason, str) else (reason.value, reason.upstream_reads)
        key = Pattern(pattern)
        self.upstream.add(key, Ignored(key, text, value, is_read))

    def canonical(self, key: str) -> str:
        """The spelling of an upstream key that the lines use: each alias applied once at most."""
        used: set[Alias] = set()
        while self._has_aliases:
            matches = [match for match in self.aliases.find(key) if not match.below and match.value not in used]
            if not matches:
                break
            alias, bindings, _, _ = matches[0]
            used.add(alias)
            key = alias.spelling.fill(bindings)
        return key

    def expected_upstream(self, port_key: str) -> tuple[str, ...]:
        """The upstream keys that would fill a port key, none when no line covers it."""
        matches = self.port.find(port_key)
        if not matches:
            return ()
        slot, bindings, below, _ = matches[0]
        return tuple(pattern.fill(bindings, below) for pattern in slot.line.upstream)

    def source_of(self, port_key: str) -> str | None:
        """The upstream key that a line renames to this port key, if that is all it does."""
        matches = self.port.find(port_key)
        if not matches or not isinstance(matches[0].value.line.rule, Rename):
            return None
        slot, bindings, below, _ = matches[0]
        return slot.line.upstream[0].fill(bindings, below)


def _same_names(key: str, value: str, where: str) -> tuple[Pattern, Pattern]:
    patterns = Pattern(key), Pattern(value)
    if patterns[0].names != patterns[1].names:
        raise ConversionError(
            f"{where}={{{key!r}: {value!r}}} has other names between braces on each side. Write the same ones."
        )
    return patterns
