"""Proof that the compared outputs depend on each weight: a weight without influence could hold any bug.

In float64 the gradient of a weight that cannot change the outputs is exactly zero or rounding noise. Such weights (the
bias of keys under a softmax, the rows of an unused head) have to be declared, with the reason; a declared weight that
does influence the outputs is a stale line, and as wrong as a missing one.

A gradient says that a weight could change the outputs; that its values do is another matter. A bias of zeros can be
dropped and a scale of ones left out with no trace, and so upstream's own initialisation fails this proof.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from refiners.parity.rounding import FLOAT64_AGREEMENT


@dataclass(frozen=True)
class Influence:
    """What the gradients of upstream's weights show."""

    faults: tuple[str, ...]
    noise: frozenset[str]
    """Declared keys: their gradients are noise around zero."""
    magnitude: float
    """The typical largest gradient of the other weights: the scale of that noise."""
    without_gradient: float
    """Share of all weights, counted by element, whose gradient is exactly zero."""


def some(names: Sequence[str], *, limit: int = 20) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(f"`{name}`" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def matches(pattern: str, key: str) -> bool:
    """Whether a declared pattern covers a key: `{i}` (any name) is a number, `*` is anything."""
    parts = re.split(r"(\{\w*\}|\*)", pattern)
    regex = "".join(".*" if p == "*" else r"\d+" if p.startswith("{") else re.escape(p) for p in parts)
    return re.fullmatch(regex, key) is not None


def neutral(weights: Mapping[str, Tensor]) -> list[str]:
    """The weights whose values are all one number, so that something may ignore them, or their places, with no trace.

    Receives:
        weights: the floating ones of a model, by key.
    """

    def is_neutral(values: Tensor) -> bool:
        flat = values.detach().flatten()
        return bool((flat == flat[:1]).all()) and (flat.numel() > 1 or float(flat[0]) in (0.0, 1.0))

    return [key for key, values in weights.items() if values.numel() and is_neutral(values)]


def never_read(unread: Mapping[str, Collection[str]], declared: Mapping[str, str]) -> list[str]:
    """The fault of a port that holds weights its forward never reads.

    Receives:
        unread: keys of the port, with the upstream keys that they stand for.
        declared: pattern → reason, the case's `without_influence`. A weight is excused when all it stands for is there.
    """

    def is_declared(key: str) -> bool:
        return any(matches(pattern, key) for pattern in declared)

    left = [key for key, origins in unread.items() if not origins or not all(is_declared(key) for key in origins)]
    return [f"the port's forward never reads {some(left)}"] if left else []


def counts_batches(model: nn.Module, key: str) -> bool:
    """Whether an entry is a BatchNorm's count of the batches of its training: no other forward reads it."""
    path, _, name = key.rpartition(".")
    return name == "num_batches_tracked" and isinstance(model.get_submodule(path), nn.modules.batchnorm._BatchNorm)  # pyright: ignore[reportPrivateUsage] (torch has no public name for all of them)


def examine(
    gradients: Mapping[str, Tensor | None],
    sizes: Mapping[str, int],
    declared: Mapping[str, str],
    *,
    buffers: Collection[str] = (),
    judge: bool,
) -> Influence:
    """Looks at the gradients of upstream's weights.

    Receives:
        gradients: by upstream's keys.
        sizes: number of elements of each of those weights.
        declared: pattern → reason, the case's `without_influence`.
        buffers: upstream's keys of what has no gradient. It may be declared, and `never_read` looks at it.
        judge: whether missing and stale declarations are faults (in float64, on informative weights).
    """
    largest = {key: float(g.abs().max()) if g is not None and g.numel() else 0.0 for key, g in gradients.items()}
    noise = frozenset(key for key in largest if any(matches(pattern, key) for pattern in declared))
    others = sorted(value for key, value in largest.items() if key not in noise and 0 < value < math.inf)
    magnitude = others[len(others) // 2] if others else 0.0
    zeros = sum(sizes[key] if g is None else int((g == 0).sum()) for key, g in gradients.items())
    share = zeros / max(1, sum(sizes[key] for key in gradients))
    faults = _faults(largest, noise, FLOAT64_AGREEMENT * magnitude) if judge else []
    if judge:
        known = (*largest, *buffers)
        unknown = [pattern for pattern in declared if not any(matches(pattern, key) for key in known)]
        faults += [f"`{pattern}` in `without_influence` matches no weight of upstream" for pattern in unknown]
    return Influence(tuple(faults), noise, magnitude, share)


def _faults(largest: Mapping[str, float], noise: Collection[str], limit: float) -> list[str]:
    faults: list[str] = []
    broken = [key for key, value in largest.items() if not math.isfinite(value)]
    if broken:
        faults.append(f"the gradient of {some(broken)} is not finite, so it proves nothing")
    idle = [key for key, value in largest.items() if value <= limit and key not in noise]
    if idle:
        faults.append(
            f"{some(idle)} cannot influence the compared outputs: compare more outputs, or declare the weight in "
            "`without_influence` with the reason"
        )
    stale = [key for key in sorted(noise) if largest[key] > limit]
    if stale:
        faults.append(f"{some(stale)} is declared in `without_influence` but influences the outputs: the line is stale")
    return faults
