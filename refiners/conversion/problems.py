"""Everything that does not fit between some weights and a port, gathered to be told at once."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from refiners.errors import ConversionError

Kind = Literal["missing", "unexpected", "shape", "dtype", "twice", "ambiguous", "incomplete", "value"]

_TITLES: Mapping[Kind, str] = {
    "missing": "missing: keys that nothing fills",
    "unexpected": "unexpected: keys that have no place",
    "shape": "shape: tensors that have another shape than they need",
    "dtype": "dtype: tensors of a type that cannot go there",
    "twice": "twice: keys that are given, or would be filled, more than once",
    "ambiguous": "ambiguous: keys that several lines of the key map cover equally well",
    "incomplete": "incomplete: tensors that are joined, of which a part is not there",
    "value": "value: tensors that hold other values than they may",
}
_SHOWN = 12


@dataclass
class Problems:
    """What does not fit, by kind: one line for each key. Falsy when everything fits.

    Example:
        >>> problems = Problems()
        >>> problems.add("missing", "Linear.bias", "upstream key 'fc.bias' is not there")
        >>> problems.keys("missing")
        ['Linear.bias']
    """

    lines: dict[Kind, dict[str, str]] = field(default_factory=dict[Kind, dict[str, str]])

    def add(self, kind: Kind, key: str, text: str) -> None:
        """Adds what is wrong with a key; what was said of the same key first stays."""
        self.lines.setdefault(kind, {}).setdefault(key, text)

    def update(self, others: "Problems") -> None:
        """Adds all of these."""
        for kind, lines in others.lines.items():
            for key, text in lines.items():
                self.add(kind, key, text)

    def __len__(self) -> int:
        return sum(map(len, self.lines.values()))

    def keys(self, kind: Kind) -> list[str]:
        """The keys that have a problem of this kind."""
        return list(self.lines.get(kind, {}))

    def __bool__(self) -> bool:
        return bool(self.lines)

    def __str__(self) -> str:
        parts: list[str] = []
        for kind, title in _TITLES.items():
            lines = self.lines.get(kind, {})
            if lines:
                parts.append(f"  {title} ({len(lines)})")
                parts += [f"    {key}: {text}" for key, text in list(lines.items())[:_SHOWN]]
                if len(lines) > _SHOWN:
                    parts.append(f"    … and {len(lines) - _SHOWN} more")
        return "\n".join(parts)

    def raise_if_any(self, what: str, advice: str) -> None:
        """Raises one error that lists them all.

        Raises:
            ConversionError: there is at least one problem.
        """
        if self:
            counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in self.lines.items())
            raise ConversionError(f"{what}: {counts}.\n{self}\n{advice}")


def nearest(name: str, names: Collection[str], count: int = 1) -> list[str]:
    """The names that look most like `name`, best first, none when nothing looks like it.

    Of hundreds of keys only those that share most segments are compared letter by letter, which keeps an error
    about a whole model quick.
    """
    candidates: Iterable[str] = names
    if len(names) > 40:
        segments = set(name.split("."))
        candidates = sorted(names, key=lambda other: -len(segments.intersection(other.split("."))))[:40]
    return difflib.get_close_matches(name, candidates, n=count, cutoff=0.6)


def hint(name: str, names: Collection[str], label: str = "nearest") -> str:
    """`"; nearest: 'x'"`, or nothing when no name looks like `name`."""
    found = nearest(name, names)
    return f"; {label}: {found[0]!r}" if found else ""
