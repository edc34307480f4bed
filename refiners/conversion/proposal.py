"""A key map proposed from pairs of paths: what varies from pair to pair becomes `{i}`, `{i+1}`."""

import re
from collections.abc import Mapping, Sequence

_NUMBER = re.compile(r"(?:(?<=\.)|(?<=_)|^)\d+(?=\.|$)")
_NAMES = "ijklmn"

Pair = tuple[str, str]


def propose_lines(pairs: Sequence[Pair]) -> dict[str, str]:
    """The lines of a `KeyMap`, as few as the numbers in the paths allow.

    Receives:
        pairs: upstream path and port path of modules that hold the same weights.

    Example:
        >>> propose_lines([("fc.0", "Block_1.Linear"), ("fc.1", "Block_2.Linear"), ("out", "Linear")])
        {'fc.{i}': 'Block_{i+1}.Linear', 'out': 'Linear'}
    """
    groups: dict[Pair, list[Pair]] = {}
    for upstream, port in pairs:
        groups.setdefault((_NUMBER.sub("#", upstream), _NUMBER.sub("#", port)), []).append((upstream, port))
    lines: dict[str, str] = {}
    for group in groups.values():
        lines |= _lines_of(group)
    return lines


def format_lines(lines: Mapping[str, str]) -> str:
    """The lines as Python, to paste and to check."""
    body = "".join(f"        {upstream!r}: {port!r},\n" for upstream, port in lines.items())
    return "KeyMap(\n    {\n" + body.replace("'", '"') + "    }\n)"


def _lines_of(group: list[Pair]) -> dict[str, str]:
    """One line for the group if there is one, else those of the groups that share their last varying number."""
    line = _one_line(group)
    if line is not None:
        return dict([line])
    upstream = [_numbers(pair[0]) for pair in group]
    varying = [at for at in range(len(upstream[0])) if len({numbers[at] for numbers in upstream}) > 1]
    if not varying:
        return dict(group)
    parts: dict[int, list[Pair]] = {}
    for numbers, pair in zip(upstream, group, strict=True):
        parts.setdefault(numbers[varying[-1]], []).append(pair)
    lines: dict[str, str] = {}
    for part in parts.values():
        lines |= _lines_of(part)
    return lines


def _one_line(group: list[Pair]) -> Pair | None:
    upstream = list(zip(*(_numbers(pair[0]) for pair in group), strict=True))
    port = list(zip(*(_numbers(pair[1]) for pair in group), strict=True))
    names: dict[int, str] = {}
    port_texts: list[str] = []
    for values in port:
        if len(set(values)) == 1:
            port_texts.append(str(values[0]))
            continue
        found = next((at for at, given in enumerate(upstream) if _offset(given, values) is not None), None)
        if found is None:
            return None
        name = names.setdefault(found, _NAMES[len(names)])
        offset = _offset(upstream[found], values)
        port_texts.append(f"{{{name}{offset:+d}}}" if offset else f"{{{name}}}")
    if any(len(set(values)) > 1 and at not in names for at, values in enumerate(upstream)):
        return None
    upstream_texts = [f"{{{names[at]}}}" if at in names else str(values[0]) for at, values in enumerate(upstream)]
    return _fill(group[0][0], upstream_texts), _fill(group[0][1], port_texts)


def _offset(given: tuple[int, ...], made: tuple[int, ...]) -> int | None:
    """The number that has to be added to each, None when it is not the same for all."""
    offsets = {after - before for before, after in zip(given, made, strict=True)}
    return offsets.pop() if len(offsets) == 1 else None


def _numbers(path: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _NUMBER.findall(path))


def _fill(path: str, texts: Sequence[str]) -> str:
    remaining = iter(texts)
    return _NUMBER.sub(lambda _: next(remaining), path)
