"""One node at the wrong place shows at many: a norm behind a residual instead of inside of it, two norms exchanged.

Each value that passes there is another one, so each of them is a finding, and the words for each would tell a
consequence. So where there are several findings, nodes are put elsewhere, in all layers at once: a leaf of a Chain (or
of an `nn.Sequential`) a place further, out of its Chain or into the next one, or two leaves of one class in each
other's place. Of the arrangements with which values come right in a forced run, and none goes wrong, the one that
settles the most findings is told, in their place.
"""

import itertools
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from torch import nn

import refiners.fluxion.layers as fl
from refiners.parity.modules import named_modules, own_state
from refiners.parity.reasons.localise import Finding
from refiners.parity.reasons.session import Session
from refiners.parity.reasons.teacher import Point, Where

T = TypeVar("T")

SECONDS = 2.0
"""Of the processor, for all arrangements."""
LEAST = 2
"""Findings that an arrangement has to settle to be told before all else."""

Place = tuple[str, str, int]
"""What is compared, of which leaf of upstream, in which of its calls."""
Children = dict[int, tuple[nn.Module, list[nn.Module | None]]]
"""Id of a node that holds others → the node, and its children in another order."""


@dataclass(frozen=True)
class Arrangement:
    """Nodes at other places."""

    text: str
    """Completing "equal …"."""
    path: str
    """Of the first node that is moved."""
    beside: str
    """Of the node that it is moved around, or exchanged with: it could as well be that one which stands wrong."""
    children: Children


def rearranged(
    findings: Sequence[Finding], session: Session, *, least: int = LEAST
) -> tuple[list[tuple[Finding, str]], list[Finding]]:
    """Findings that one arrangement settles, as one; and those that are left.

    Receives:
        findings: of a forced run.
        session: the models.
        least: the number of findings that an arrangement has to settle.

    Returns:
        A finding with its diagnosis for each arrangement, which was run; then the others, in their order.
    """
    told: list[tuple[Finding, str]] = []
    left, until = list(findings), time.thread_time() + SECONDS
    while len(left) >= least and (best := _best(left, session, until, least)) is not None:
        arrangement, settled = best
        shown = next(finding for finding in left if finding in settled)
        made = replace(
            shown, port=arrangement.path, is_leaf=False, others=(), suspects=(arrangement.beside,), passed_on=None
        )
        told.append((made, arrangement.text))
        left = [finding for finding in left if finding not in settled]
    return told, left


def _best(
    findings: Sequence[Finding], session: Session, until: float, least: int
) -> tuple[Arrangement, list[Finding]] | None:
    places = {place_of(point) for point in session.points() if not point.agrees}
    best: tuple[Arrangement, list[Finding]] | None = None
    for arrangement in _arrangements(session):
        if session.is_late() or time.thread_time() > until:
            break
        wrong = _wrong_with(arrangement, session)
        if wrong is None or not wrong < places:
            continue
        settled = [finding for finding in findings if not wrong & _places_of(finding)]
        if len(settled) >= max(least, len(best[1]) + 1 if best else 0):
            best = arrangement, settled
        if len(settled) == len(findings):
            break
    return best


def place_of(point: Point) -> Place:
    """What identifies a point wherever the leaf of the port stands."""
    return point.where, point.upstream, point.call


def _places_of(finding: Finding) -> set[Place]:
    return {place_of(one.point) for one in (finding, *finding.others)}


def _wrong_with(arrangement: Arrangement, session: Session) -> set[Place] | None:
    """Where the sides disagree with an arrangement; None where it does not run."""
    upstream_of = {id(module): session.pairing.get(path) for path, module in named_modules(session.port)}
    try:
        with _arranged(arrangement.children):
            found = ((path, upstream_of.get(id(module))) for path, module in named_modules(session.port))
            points = session.points({path: other for path, other in found if other is not None})
    except Exception:  # a shape or a number of inputs that does not fit there
        return None
    return {place_of(point) for point in points if not point.agrees}


@contextmanager
def _arranged(children: Children) -> Generator[None, None, None]:
    """Inside, nodes hold their children in another order. The very tables come back, whatever happens."""
    before = [(node, cast("dict[str, Any]", node.__dict__["_modules"])) for node, _ in children.values()]
    try:
        for node, inside in children.values():
            held = cast("dict[str, nn.Module | None]", node.__dict__["_modules"])
            names = {id(child): name for name, child in held.items()}
            if isinstance(node, fl.Chain | nn.Sequential):
                made = {names.get(id(child), f"moved_{place}"): child for place, child in enumerate(inside)}
            else:
                made = dict(zip(held, inside, strict=True))
            node.__dict__["_modules"] = made
        yield
    finally:
        for node, held in before:
            node.__dict__["_modules"] = held


# Arrangements


def _arrangements(session: Session) -> Iterator[Arrangement]:
    """Those of all layers at once before those of one."""
    modules = dict(named_modules(session.port))
    wrong = {point.port for point in session.points() if point.where is Where.RECEIVES and not point.agrees}
    leaves = [path for path in modules if path in wrong]
    for pairs in _groups(_alike(leaves, modules), _role_of_pair):
        if len({path for pair in pairs for path in pair}) == 2 * len(pairs):  # none of them in two pairs
            yield _exchanged(pairs, modules)
    movable = dict.fromkeys(path for leaf in leaves for path in (leaf, *_beside(leaf, session, modules)))
    for paths in _groups(list(movable), _role):
        for move in _MOVES:
            made = _moved(paths, move, modules)
            if made is not None:
                yield made


def _role(path: str, count: int) -> Any:
    return re.sub(r"\d+", "#", path, count=count)


def _role_of_pair(pair: tuple[str, str], count: int) -> Any:
    return _role(pair[0], count), _role(pair[1], count)


def _groups(items: Sequence[T], role: Callable[[T, int], Any]) -> list[list[T]]:
    """Those that play one role: that differ in any number, then in the first number alone, then each by itself."""
    groups: dict[tuple[T, ...], None] = {}
    for count in (0, 1):
        roles: dict[Any, list[T]] = {}
        for item in items:
            roles.setdefault(role(item, count), []).append(item)
        groups |= dict.fromkeys(tuple(group) for group in roles.values())
    return [list(group) for group in groups | dict.fromkeys((item,) for item in items)]


def _alike(leaves: Sequence[str], modules: dict[str, nn.Module]) -> list[tuple[str, str]]:
    """Pairs of leaves of one class, with weights of one shape, in one layer."""

    def kind(path: str) -> object:
        number = re.search(r"\d+", path)
        shapes = [(name, tensor.shape) for name, tensor in own_state(modules[path])]
        return type(modules[path]), shapes, number and number.group()

    return [pair for pair in itertools.combinations(leaves, 2) if kind(pair[0]) == kind(pair[1])]


def _exchanged(pairs: Sequence[tuple[str, str]], modules: dict[str, nn.Module]) -> Arrangement:
    children: Children = {}
    for a, b in pairs:
        places = [_place(path, modules, children) for path in (a, b)]
        (first, i), (second, j) = places
        first[i], second[j] = second[j], first[i]
    a, b = pairs[0]
    more = f" (and {len(pairs) - 1} more such pairs)" if len(pairs) > 1 else ""
    return Arrangement(f"when `{a}` and `{b}` are exchanged{more}: each runs where the other should", a, b, children)


def _place(path: str, modules: dict[str, nn.Module], children: Children) -> tuple[list[nn.Module | None], int]:
    """The children of the node that holds a leaf, as they are arranged so far, and the place of the leaf among them."""
    inside = _children(path.rpartition(".")[0], modules, children)
    return inside, inside.index(modules[path])


def _children(owner: str, modules: dict[str, nn.Module], children: Children) -> list[nn.Module | None]:
    node = modules[owner]
    held = cast("dict[str, nn.Module | None]", node.__dict__["_modules"])
    return children.setdefault(id(node), (node, list(held.values())))[1]


def _beside(path: str, session: Session, modules: dict[str, nn.Module]) -> Iterator[str]:
    """The leaves without a pair that run beside a leaf, or beside the node that holds it: they may stand wrong too."""
    for _ in range(2):
        path = path.rpartition(".")[0]
        if _runs_in_order(modules[path]):
            names = (f"{path}.{name}" if path else name for name, _ in modules[path].named_children())
            yield from (
                one for one in names if one not in session.pairing and not any(True for _ in modules[one].children())
            )


def _runs_in_order(module: nn.Module) -> bool:
    """Whether a node gives each child what the one before it returns."""
    return isinstance(module, nn.Sequential) or (
        isinstance(module, fl.Chain) and type(module).forward in (fl.Chain.forward, fl.Residual.forward)
    )


@dataclass(frozen=True)
class _Move:
    """Where a leaf goes, seen from where it stands."""

    words: str
    step: int = 0
    """Inside of its node: so many places further."""
    out: int | None = None
    """Out of its node: 0 in front of it, 1 behind it."""
    into: tuple[int, int] | None = None
    """Into the node beside it: before it, -1, or behind it, 1; there to the start, 0, or the end, 1."""


_MOVES = (
    _Move("behind {}, not inside of it", out=1),
    _Move("in front of {}, not inside of it", out=0),
    _Move("inside of {}, at its start", into=(-1, 0)),
    _Move("inside of {}, at its start", into=(1, 0)),
    _Move("inside of {}, at its end", into=(-1, 1)),
    _Move("inside of {}, at its end", into=(1, 1)),
    _Move("behind {}", step=1),
    _Move("in front of {}", step=-1),
    _Move("behind {}", step=2),
    _Move("in front of {}", step=-2),
)


def _moved(paths: Sequence[str], move: _Move, modules: dict[str, nn.Module]) -> Arrangement | None:
    """Leaves elsewhere, all in one way; None where one of them cannot go there."""
    children: Children = {}
    moves = [_move_one(path, move, modules, children) for path in paths]
    if None in moves or moves[0] is None:
        return None
    words, beside = moves[0]
    more = f" (and {len(paths) - 1} more like it)" if len(paths) > 1 else ""
    return Arrangement(f"when `{paths[0]}`{more} comes {words}", paths[0], beside, children)


def _move_one(path: str, move: _Move, modules: dict[str, nn.Module], children: Children) -> tuple[str, str] | None:
    """Moves a leaf; in words where it comes, and the node around which; None where it cannot."""
    owner = path.rpartition(".")[0]
    outer = owner.rpartition(".")[0]
    names = {id(module): name for name, module in modules.items()}
    if not _runs_in_order(modules[owner]):
        return None
    inside, place = _place(path, modules, children)
    if move.out is not None:
        if not owner or not _runs_in_order(modules[outer]):
            return None
        around = _children(outer, modules, children)
        around.insert(around.index(modules[owner]) + move.out, inside.pop(place))
        return move.words.format(f"`{owner}`") + _of_norm(modules[path], modules[owner], is_inside=True), owner
    other = place + (move.step or (move.into[0] if move.into else 0))
    beside = inside[other] if 0 <= other < len(inside) else None
    if beside is None:
        return None
    name = names[id(beside)]
    words = move.words.format(f"`{name}`")
    if move.into is None:
        inside.insert(other, inside.pop(place))
        return words, name
    if not _runs_in_order(beside) or not any(True for _ in beside.children()):
        return None
    there = _children(name, modules, children)
    there.insert(move.into[1] * len(there), inside.pop(place))
    return words + ("" if move.into[1] else _of_norm(modules[path], beside, is_inside=False)), name


def _of_norm(leaf: nn.Module, node: nn.Module, *, is_inside: bool) -> str:
    """The name of the mistake, where a norm stands on the other side of a residual."""
    if "norm" not in type(leaf).__name__.lower() or not isinstance(node, fl.Residual):
        return ""
    right, wrong = ("behind the sum, post-norm", "pre-norm") if is_inside else ("in the branch, pre-norm", "post-norm")
    return f" (norm order: upstream's is {right}; here it is {wrong})"
