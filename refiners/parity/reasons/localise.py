"""Where two traces part: the first operation whose inputs agree and whose output does not, on both sides.

A value is *known* when the other side has it too. From a point at which the sides disagree, the way leads back through
values that the other side does not have, to the operations that made them from values it has: the frontier. Walking
back rather than forward leaves out what the sides compute in different ways to the same end.

The same walk on upstream's side, from the value that should have arrived, finds what upstream did instead. A frontier
that is empty says something too: the port passed on a value of upstream's that belongs elsewhere (something is
missing), or upstream did (something is too much).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from refiners.parity.leaves import Pairing
from refiners.parity.operations import ModuleCall, Operation, Trace
from refiners.parity.reasons.teacher import Point, Where
from refiners.parity.reasons.ways import (
    RESHAPES,
    Walk,
    common_path,
    counterpart,
    first_unlike,
    made_of,
    maker_at,
    moved_from,
    only_lacks,
    passes_on,
    producers,
    uncut,
    walk,
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A place where the port parts from upstream."""

    port: str
    """Path of the node of the port that is to blame."""
    upstream: str
    """Path of upstream's module that does it right."""
    point: Point
    """Where it shows."""
    is_leaf: bool
    """Whether a leaf with weights gives another result from the same inputs."""
    port_operations: tuple[Operation, ...] = ()
    """The frontier in the port; empty when something is missing there."""
    upstream_operations: tuple[Operation, ...] = ()
    """The frontier upstream; empty when something is too much in the port."""
    region: tuple[Operation, ...] = ()
    """All that upstream does between the values both have and the one that should have arrived."""
    port_region: tuple[Operation, ...] = ()
    """The same of the port, for the value that arrived."""
    expected: int | None = None
    """The number of the value that should have arrived."""
    actual: int | None = None
    """The number of the one that did."""
    others: "tuple[Finding, ...]" = ()
    """Of the same node, further on."""
    passed_on: int | None = None
    """Where something is missing in the port: the value that it passed on unchanged."""
    suspects: tuple[str, ...] = ()
    """Other paths of the port that a fault could lie at, the likeliest first."""
    carried: Mapping[int, int] = field(default_factory=dict[int, int])
    """Values that were found wrong before, on which the port's way goes on → the right ones."""

    @property
    def key(self) -> tuple[str, bool]:
        """Findings of one key are one fault."""
        return self.port, self.is_leaf


MOST_IN_REGION = 160

_JOINING = frozenset({"aten.add", "aten.sub", "aten.mul", "aten.div", "aten.cat"})


class Locator:
    """Finds the faults behind the points of a forced run.

    Receives:
        upstream: its trace.
        port: the trace of the forced run.
        pairing: of the leaves.
        wrong_leaves: paths of leaves that are not paired and do not hold what the key map gives them.
    """

    def __init__(self, upstream: Trace, port: Trace, pairing: Pairing, wrong_leaves: Sequence[str] = ()) -> None:
        self.upstream, self.port, self.pairing = upstream, port, pairing
        self.wrong_leaves = set(wrong_leaves)
        self._known_upstream = upstream.known()
        self._known_here = port.known()
        self._made_upstream = producers(upstream)
        self._made_here = producers(port)
        self._weights_here = uncut(port.weights, self._made_here)
        self._weights_upstream = uncut(upstream.weights, self._made_upstream)
        self._took_for: dict[int, int] = {}

    def find(self, points: Sequence[Point]) -> list[Finding]:
        """One finding for each fault, in the order of the port's forward."""
        found: dict[tuple[str, bool], Finding] = {}
        self._known_upstream.update(ours for point in points for ours, _ in point.turned)
        self._known_here.update(theirs for point in points for _, theirs in point.turned)
        for point in points:
            if point.agrees:
                continue
            is_leaf = point.where is Where.RETURNS and not point.is_way
            several = [self._leaf(point)] if is_leaf else self._between(point)
            for finding in several:
                first = found.setdefault(finding.key, finding)
                if first is not finding:
                    found[finding.key] = replace(first, others=(*first.others, finding))
        untaught = {p.port for p in points if p.where is Where.RECEIVES and p.is_other_size and not p.agrees}
        leaves = {finding.port for finding in found.values() if finding.is_leaf} | untaught
        return _without_echoes([one for one in found.values() if one.is_leaf or not self._is_of_leaf(one, leaves)])

    def _is_of_leaf(self, finding: Finding, leaves: set[str]) -> bool:
        """Whether what is found between leaves was made by a leaf that is wrong itself, or given what is."""
        made = finding.port_operations
        return finding.port in leaves and bool(made) and all(self.port.path_of(op) == finding.port for op in made)

    def _leaf(self, point: Point) -> Finding:
        ours = [op for op in self.port.operations if self.port.path_of(op) == point.port]
        theirs = [op for op in self.upstream.operations if self.upstream.path_of(op) == point.upstream]
        there, here = first_unlike(theirs, ours)
        finding = Finding(
            port=point.port,
            upstream=point.upstream,
            point=point,
            is_leaf=True,
            upstream_operations=there,
            port_operations=here,
        )
        expected, actual = next(((e, a) for e, a in zip(point.expected, point.actual, strict=False) if e != a), (0, 0))
        if expected == actual:
            return finding
        region = walk(self._made_upstream, expected, self._known_here - {expected} | self._weights_upstream).visited
        port_region = walk(self._made_here, actual, self._known_upstream | self._weights_here).visited
        return replace(
            finding,
            expected=expected,
            actual=actual,
            region=tuple(region[:MOST_IN_REGION]),
            port_region=tuple(port_region[:MOST_IN_REGION]),
        )

    def _between(self, point: Point) -> list[Finding]:
        wrong = [(e, a) for e, a in zip(point.expected, point.actual, strict=False) if e != a]
        wrong = wrong or [(e, -1) for e in point.expected[len(point.actual) :]]  # the number of tensors differs
        # What a leaf was taught is known in the port from there on, in each shape, but nobody there has made it.
        shapes = {one for number in point.expected for one in moved_from(number, self._made_upstream)}
        taught = {n for n in shapes if self._is_taught(n) and (n in point.expected or self._reads(point, n))}
        findings: list[Finding] = []
        for expected, actual in wrong:
            carried = {wrong: right for wrong, right in self._took_for.items() if wrong != actual}
            here = self._way(self.port, point, actual, self._known_upstream | self._weights_here | carried.keys())
            there = self._way(self.upstream, point, expected, (self._known_here - taught) | self._weights_upstream)
            new = [operation for operation in here.frontier if self._echoed(operation) is None]
            if new or not here.frontier:
                found = self._blame(point, actual, replace(here, frontier=new), there)
            else:
                found = self._behind_echo(point, actual, expected, (self._known_here - taught) | self._weights_upstream)
            made = [replace(one, expected=expected, actual=actual, carried=carried) for one in found]
            findings += [self._where_both_are(finding) for finding in made]
            self._took_for.setdefault(actual, expected)
        return findings

    def _behind_echo(self, point: Point, actual: int, expected: int, known: set[int]) -> list[Finding]:
        """Something is missing where an echo's result is passed on, and upstream does more with its own."""
        number = made_of(actual, self._made_here, lambda operation: operation.name in RESHAPES)
        made = self._made_here.get(number)
        other = None if made is None else self._echoed(made)
        right = None if made is None or other is None else other.outputs[made.outputs.index(number)]
        if right is None:
            return []
        there = self._way(self.upstream, point, expected, known | {right})
        if not any(right in operation.inputs for operation in there.visited):
            return []
        self._took_for[actual] = right
        found = self._blame(point, actual, Walk([], []), there)
        self._took_for[actual] = expected  # that is what it stands for from here on
        return [replace(one, passed_on=right) for one in found]

    def _way(self, trace: Trace, point: Point, number: int, known: set[int]) -> Walk:
        """The way back from what arrives at a point, through what really returned it."""
        made, path = (self._made_here, point.port) if trace is self.port else (self._made_upstream, point.upstream)
        return walk(made, number, known, trace.operations, maker_at(trace, path, point.call, number))

    def _where_both_are(self, finding: Finding) -> Finding:
        """Where only another value is read: the node that holds both the reader and the leaf that it should read."""
        if finding.port_operations or finding.upstream_operations or finding.point.where is Where.OUTPUT:
            return finding
        maker = next((c.path for c in self.port.calls if finding.expected in c.outputs and c.path in self.pairing), "")
        shared = common_path(finding.point.port, maker)
        return replace(finding, port=shared) if len(shared) > len(finding.port) else finding

    def _is_taught(self, number: int) -> bool:
        made = self._made_here.get(number)
        return made is None or (made.name in RESHAPES and all(map(self._is_taught, made.inputs)))

    def _reads(self, point: Point, number: int) -> bool:
        """Whether only the leaf of a point reads a value, which it was taught in a shape and order of its own."""
        return {self.port.path_of(op) for op in self.port.operations if number in op.inputs} == {point.port}

    def _echoed(self, operation: Operation) -> Operation | None:
        """Upstream's own, where an operation does the same with a value that an earlier fault has put there."""
        right = [self._took_for.get(number, number) for number in operation.inputs]
        if right == list(operation.inputs):
            return None
        same = (other for other in self.upstream.operations if other.function is operation.function)
        return next((other for other in same if sorted(other.inputs) == sorted(right)), None)

    def _blame(self, point: Point, actual: int, here: Walk, there: Walk) -> list[Finding]:
        upstream = self.upstream.path_of(there.frontier[0]) if there.frontier else point.module
        made = Finding(
            port="",
            upstream=upstream,
            point=point,
            is_leaf=False,
            upstream_operations=tuple(there.frontier[:8]),
            region=tuple(there.visited[:MOST_IN_REGION]),
            port_region=tuple(here.visited[:MOST_IN_REGION]),
        )
        behind = passes_on(here, there)
        if behind is not None:
            return [self._missing_at(made, behind, "" if point.where is Where.OUTPUT else point.port)]
        findings: list[Finding] = []
        by_path: dict[str, list[Operation]] = {}
        for operation in here.frontier:
            skipped = self._skipped_before(operation, there) if only_lacks(here, there) else None
            if skipped is not None:
                findings.append(self._missing_at(made, skipped, self.port.path_of(operation)))
            else:
                by_path.setdefault(self._path_to_blame(self._user_of(operation, here)), []).append(operation)
        if not here.frontier:
            findings.append(self._missing_at(made, actual, "" if point.where is Where.OUTPUT else point.port))
        for path, operations in by_path.items():
            related = [op for op in there.frontier if any(set(op.inputs) & set(own.inputs) for own in operations)]
            related = related or there.frontier
            findings.append(
                replace(
                    made,
                    port=path,
                    upstream=self.upstream.path_of(related[0]) if related else upstream,
                    port_operations=tuple(operations[:8]),
                    upstream_operations=tuple(related[:8]),
                    suspects=self._suspects(operations, related),
                )
            )
        return findings

    def _user_of(self, operation: Operation, here: Walk) -> Operation:
        """What reads a value that a leaf only puts into shape at its end: the leaf itself was found right."""
        while operation.name in RESHAPES and self.port.path_of(operation) in self.pairing:
            after = next((op for op in here.visited if set(op.inputs) & set(operation.outputs)), None)
            if after is None:
                break
            operation = after
        return operation

    def _path_to_blame(self, operation: Operation) -> str:
        """The node that runs an operation, unless it was given the output of a leaf that holds wrong weights."""
        for call in self.port.calls:
            if call.path in self.wrong_leaves and set(call.outputs) & set(operation.inputs):
                return call.path
        return self._repeated(operation) or self.port.path_of(operation)

    def _repeated(self, operation: Operation) -> str:
        """The largest node around a leaf that runs more often than upstream's, all of which does; "" if none does."""
        path = self.port.path_of(operation)
        often = Counter(call.path for call in self.port.calls)
        upstream = sum(call.path == self.pairing.get(path) for call in self.upstream.calls)
        if path not in self.pairing or often[path] <= upstream:
            return ""
        call = self.port.calls[operation.call]
        while call.parent >= 0 and often[self.port.calls[call.parent].path] > 1:
            call = self.port.calls[call.parent]
        return call.path

    def _missing_at(self, made: Finding, actual: int, consumer: str) -> Finding:
        there = list(made.upstream_operations)
        path, suspects = self._missing(consumer, actual, there)
        upstream = self._unpaired_module(there) or made.upstream
        return replace(made, port=path, suspects=suspects, upstream=upstream, passed_on=actual)

    def _skipped_before(self, operation: Operation, there: Walk) -> int | None:
        """The value that upstream changes before the very same operation; None if it does not."""
        if not there.frontier:
            return None
        consumed = {number for op in there.frontier for number in op.inputs}
        for other in there.visited:
            if other in there.frontier or other.function is not operation.function:
                continue
            if self.upstream.path_of(other) == self.upstream.path_of(there.frontier[0]):
                continue  # one module of upstream does both: it is the node itself that leaves something out
            if other.template == operation.template and len(other.inputs) == len(operation.inputs):
                changed = [a for a, b in zip(operation.inputs, other.inputs, strict=True) if a != b]
                if changed and all(number in consumed for number in changed):
                    return changed[0]
        return None

    # Something upstream does and the port does not

    def _missing(self, consumer: str, actual: int, there: list[Operation]) -> tuple[str, tuple[str, ...]]:
        """The node through which a value passes that upstream changes on the way."""
        consumed = {number for op in there for number in op.inputs} - self.upstream.weights
        consumed |= {wrong for wrong, right in self._took_for.items() if right in consumed}
        same = self._shaped(actual)
        through = [
            call
            for call in self.port.calls
            if same & set(call.outputs) and set(call.inputs) & consumed and call.parent >= 0
        ]
        joined = [op for op in there if same & set(op.inputs) and op.name in _JOINING and len(set(op.inputs)) > 1]
        changed = [call.path for call in through if not same & set(call.inputs)]
        unchanged = [call.path for call in through if same & set(call.inputs)]
        paths = [*changed, *unchanged] if joined else [*unchanged, *changed]
        if paths:
            return paths[0], tuple(dict.fromkeys(paths[1:]))
        makers = [call.path for call in self.port.calls if actual in call.outputs and call.path not in self.pairing]
        if joined and makers and makers[0]:
            return makers[0], tuple(makers[1:])
        # Else it is missing in the innermost node that holds both the maker of the value and whoever receives it.
        maker = next((call.path for call in reversed(self.port.calls) if actual in call.outputs), "")
        made = [call.path for call in self.port.calls if actual in call.outputs and actual not in call.inputs]
        suspects = tuple(path for path in made[-1:] if path and path not in self.pairing)
        shared = common_path(consumer, maker) if maker else consumer
        inside = counterpart(self.upstream.path_of(there[0]), self.pairing) if there else ""  # where upstream does it
        return max(shared, common_path(consumer, inside), key=len), suspects

    def _shaped(self, number: int) -> set[int]:
        """A value and what it is in other shapes."""
        same = {number}
        reshapes = [op for op in self.port.operations if op.name in RESHAPES]
        for operations in (reshapes, reshapes[::-1]):
            for operation in operations:
                if same & {*operation.inputs, *operation.outputs}:
                    same.update(one for one in (*operation.inputs, *operation.outputs) if one is not None)
        return same

    def _unpaired_module(self, there: list[Operation]) -> str:
        """The largest module of upstream around the frontier none of whose leaves the port runs."""
        if not there or there[0].call < 0:
            return ""
        taken = {self.pairing[call.path] for call in self.port.calls if call.path in self.pairing}
        call: ModuleCall = self.upstream.calls[there[0].call]
        best = ""
        while True:
            inside = [path for path in taken if path == call.path or path.startswith(f"{call.path}.") or not call.path]
            if inside or call.parent < 0:
                return best
            best = call.path
            call = self.upstream.calls[call.parent]

    # Something that both do, with the same values at other places

    def _suspects(self, here: list[Operation], there: list[Operation]) -> tuple[str, ...]:
        """The makers of values that arrive at an operation in another order than upstream's."""
        for ours in here:
            for theirs in there:
                if ours.inputs != theirs.inputs and sorted(ours.inputs) == sorted(theirs.inputs):
                    moved = [a for a, b in zip(ours.inputs, theirs.inputs, strict=True) if a != b]
                    makers = [self._maker(number) for number in moved]
                    return tuple(dict.fromkeys([*makers, common_path(makers[0], makers[-1])]))
        return ()

    def _maker(self, number: int) -> str:
        """The path of the leaf from which a value comes, through views."""

        def passes(operation: Operation) -> bool:
            return len(operation.inputs) == 1 and self.port.path_of(operation) not in self.pairing

        number = made_of(number, self._made_here, passes)
        operation = self._made_here.get(number)
        if operation is not None and len(operation.inputs) == 1 and not passes(operation):
            return self.port.path_of(operation)
        call = next((c for c in self.port.calls if number in c.outputs and c.path in self.pairing), None)
        if call is not None:
            return call.path
        return self.port.path_of(operation) if operation is not None else ""


def _without_echoes(findings: list[Finding]) -> list[Finding]:
    """A fault that shows at several points, one of them inside a node that is already blamed, is one fault."""
    kept: list[Finding] = []
    for finding in findings:
        same = any(
            not other.is_leaf
            and not finding.is_leaf
            and not finding.port_operations
            and not other.port_operations
            and [str(op) for op in other.upstream_operations] == [str(op) for op in finding.upstream_operations]
            and other.upstream == finding.upstream
            for other in kept
        )
        if not same:
            kept.append(finding)
    return kept
