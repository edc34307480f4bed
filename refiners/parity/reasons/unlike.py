"""Where two programs that should make one value part: the fewest changes that make the port's equal to upstream's.

Both are trees of operations over values that are known on both sides. They are walked together from the value that
differs. Values that are equal in float64 end the walk. Below, there is another argument, an operation too many or too
few, an exchange, or, where nothing is alike, one expression in place of another. Of all ways the cheapest is told.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from refiners.parity.operations import Operation
from refiners.parity.reasons import flow
from refiners.parity.reasons.replay import Program, is_same

_COMMUTES = frozenset({"aten.add", "aten.mul", "aten.maximum", "aten.minimum"})
_JOINS = frozenset({"aten.cat", "aten.stack"})
_MOVES = frozenset(
    {"clone", "contiguous", "_unsafe_view", "view", "expand", "_to_copy", "unsqueeze", "squeeze", "alias", "lift_fresh"}
)
"""Operations that say nothing by themselves: a value of another shape, in the same order."""

ARGUMENTS, TOO_FEW, TOO_MANY, REPLACED = 1.0, 1.4, 1.4, 2.0
MOVE, SIZE = 0.2, 0.3
MOST_CHANGES = 4


@dataclass(frozen=True)
class Other:
    """One difference between two programs."""

    kind: str
    """`arguments`, `order`, `missing`, `extra` or `instead`."""
    port: Operation | int | None = None
    """The operation, or the number of a value."""
    upstream: Operation | int | None = None

    key: tuple[object, ...] = ()
    """Differences of one key are one: at the same lines of both sides."""
    price: float = 0.0
    through: int = -1
    """Of an operation that is missing: the number of the value that it changes, on upstream's side."""
    order: tuple[int, ...] = ()
    """Of tensors that are joined: their places in the port, in upstream's order."""

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells it from all others."""
        sides = (side.index if isinstance(side, Operation) else side for side in (self.port, self.upstream))
        return self.kind, *sides, self.through


_Way = tuple[float, tuple[Other, ...]]


def differences(port: Program, upstream: Program) -> tuple[Other, ...]:
    """What has to change in the port's program; nothing when they make one value."""
    return _Walk(port, upstream).way(port.root, upstream.root)[1]


class _Walk:
    def __init__(self, port: Program, upstream: Program) -> None:
        self.port, self.upstream = port, upstream
        self._known: dict[tuple[int, int], _Way] = {}

    def way(self, ours: int, theirs: int) -> _Way:
        """The cheapest way from a value of the port to one of upstream."""
        pair = ours, theirs
        if pair not in self._known:
            self._known[pair] = math.inf, ()  # a value does not depend on itself
            self._known[pair] = self._cheapest(ours, theirs)
        return self._known[pair]

    def _cheapest(self, ours: int, theirs: int) -> _Way:
        if is_same(self.port.sketches[ours], self.upstream.sketches[theirs]):
            return 0.0, ()
        here, there = self.port.made.get(ours), self.upstream.made.get(theirs)
        size = len(self.port.part(ours).operations) + len(self.upstream.part(theirs).operations)
        ways = [_way([self._other("instead", ours, theirs, REPLACED + SIZE * size)])]
        if here and there and here[0].function is there[0].function and here[1] == there[1]:
            ways += self._same_function(here[0], there[0])
        if there:
            for number in _passing(self.upstream, there[0], theirs):
                price = _price(there[0], TOO_FEW) + self._lost(self.upstream, there[0], number)
                lacking = replace(self._other("missing", ours, there[0], price), through=number)
                ways.append(_way([lacking], self.way(ours, number)))
        if here:
            for number in _passing(self.port, here[0], ours):
                price = _price(here[0], TOO_MANY) + self._lost(self.port, here[0], number)
                ways.append(_way([self._other("extra", here[0], theirs, price)], self.way(number, theirs)))
        return min(ways, key=lambda found: found[0])

    def _lost(self, program: Program, operation: Operation, passing: int) -> float:
        """What leaving out an operation costs because its other values are lost with it."""
        return SIZE * sum(len(program.part(number).operations) for number in operation.inputs if number != passing)

    def _other(self, kind: str, ours: Operation | int, theirs: Operation | int, price: float) -> Other:
        def place(program: Program, side: Operation | int) -> object:
            operation = program.made[side][0] if isinstance(side, int) and side in program.made else side
            return (operation.name, operation.source) if isinstance(operation, Operation) else operation

        sides = (place(self.port, ours), place(self.upstream, theirs))
        key = sides[1:] if kind == "missing" else sides[:1] if kind == "extra" else sides
        return Other(kind, ours, theirs, (kind, *key), price)

    def _same_function(self, here: Operation, there: Operation) -> list[_Way]:
        if len(here.inputs) != len(there.inputs):
            return []
        apart = plain_arguments(here) != plain_arguments(there)
        if apart and is_move(here):
            apart = False  # the shape is another because what it was made of is
        own = [self._argument(here, there)] if apart else []
        if here.name in _JOINS and (order := self._order(here, there)):
            own.append(replace(self._other("order", here, there, ARGUMENTS), order=order))
            return [_way(own)]
        orders = [there.inputs, there.inputs[::-1]] if here.name in _COMMUTES else [there.inputs]
        return [_way(own, *(self.way(a, b) for a, b in zip(here.inputs, order, strict=True))) for order in orders]

    def _argument(self, here: Operation, there: Operation) -> Other:
        other = self._other("arguments", here, there, _price(here, ARGUMENTS))
        given, right = plain_arguments(here), plain_arguments(there)
        unlike = tuple(
            (name, repr(right.get(name))) for name in {**given, **right} if given.get(name) != right.get(name)
        )
        return replace(other, key=(*other.key, unlike))  # one line may do the same along several axes

    def _order(self, here: Operation, there: Operation) -> tuple[int, ...]:
        """The places of upstream's tensors among the port's, where they are the same in another order; else nothing."""
        ours = [self.port.sketches[number] for number in here.inputs]
        found: list[int] = []
        for number in there.inputs:
            right = self.upstream.sketches[number]
            free = (place for place, one in enumerate(ours) if place not in found and is_same(one, right))
            found += itertools.islice(free, 1)
        return tuple(found) if len(found) == len(ours) and found != sorted(found) else ()


def _way(own: Iterable[Other], *others: _Way) -> _Way:
    """Several ways at once; differences of one key are paid once."""
    found = {one.identity: one for one in (*own, *(one for _, way in others for one in way))}
    return sum({one.key: one.price for one in found.values()}.values()), tuple(found.values())


def _passing(program: Program, operation: Operation, root: int) -> list[int]:
    """The values that would pass if an operation were left out: of its size, or those that it repeats."""
    if "scaled_dot_product" in operation.name:
        return []
    size = program.sketches[root][0]
    repeats = operation.name.removeprefix("aten.") in ("expand", "repeat", "repeat_interleave")
    numbers = dict.fromkeys(operation.inputs)
    return [number for number in numbers if repeats or program.sketches[number][0] == size]


def plain_arguments(operation: Operation) -> dict[str, object]:
    """The arguments of an operation that are no tensors, those left out too."""
    found = flow.arguments(operation)
    scale = flow.default_scale(operation)
    return {**found, "scale": scale} if scale is not None and found.get("scale") is None else found


def is_move(operation: Operation) -> bool:
    """Whether an operation gives the same numbers in the same order."""
    return _MOVES.issuperset(operation.name.removeprefix("aten.").split(" → "))


def _price(operation: Operation, price: float) -> float:
    return MOVE if is_move(operation) else price


def exchanges(found: Sequence[Other], same: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """Pairs of values of the port that stand in each other's place; nothing unless all differences are such."""
    once = {one.key: one for one in reversed(found)}.values()
    waiting = [(one.port, one.upstream) for one in once if isinstance(one.port, int) and isinstance(one.upstream, int)]
    if len(waiting) < len(once) or any(one.kind != "instead" for one in found):
        return []
    pairs: list[tuple[int, int]] = []
    while waiting:
        ours, theirs = waiting.pop(0)
        back = next((pair for pair in waiting if same(ours, pair[1]) and same(pair[0], theirs)), None)
        if back is None:
            return []
        waiting.remove(back)
        pairs.append((ours, back[0]))
    return pairs
