"""The tree of one side for the page: a line for each module, coloured by what was found there.

Equal neighbours are folded into one line, as in a printed tree; neighbours that differ in what was found are not.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from refiners.fluxion.layers.tree import describe
from refiners.parity.case import Case
from refiners.parity.lanes import Lane
from refiners.parity.time_limit import time_limit
from refiners.parity.told import Told
from refiners.parity.torch_state import default_dtype, forked_random_state, seed_torch

_LINE = re.compile(r"(?P<tag>\([A-Z]+\))? ?(?P<name>[^(]*)(?P<attributes>\(.*\))?$", re.S)
_RANK = {"": 0, "tap": 0, "equal": 1, "propagates": 2, "introduces": 3}
_NOISE = re.compile(r",? ?(device=\w+|dtype=\w+)")
_SECONDS = 20.0


@dataclass(frozen=True)
class Node:
    """A line of the tree and the lines below it."""

    path: str
    tag: str
    name: str
    attributes: str
    mark: str = ""
    """`equal`, `introduces`, `propagates`, or "" where nothing was compared."""
    inside: str = ""
    """The worst mark of all nodes below."""
    other: str = ""
    """The path on the other side of the leaf that holds the same weights."""
    error: str = ""
    is_tap: bool = False
    is_open: bool = False
    anchor: str = ""
    times: int = 1
    children: tuple["Node", ...] = field(default=())

    @property
    def worst(self) -> str:
        """The worse of its own mark and those below."""
        return max(self.mark, self.inside, key=_RANK.__getitem__)


@dataclass(frozen=True)
class Marks:
    """What is known about the nodes of one side, by path."""

    marks: Mapping[str, str] = field(default_factory=dict[str, str])
    errors: Mapping[str, str] = field(default_factory=dict[str, str])
    others: Mapping[str, str] = field(default_factory=dict[str, str])
    taps: frozenset[str] = frozenset()
    first: str | None = None
    """The path of the first divergence: the way to it is open."""


def build_on_meta(builder: Callable[[], nn.Module], case: Case) -> nn.Module:
    """A side without its weights; on the CPU where it cannot be built without."""
    seed_torch(case.seed)
    try:
        with torch.device("meta"):
            return builder()
    except Exception:  # a builder that reads values; whether it can be built at all shows next
        return builder()


def trees_of(case: Case, told: Told | None, raised: str = "") -> tuple[Node | None, Node | None, str]:
    """The trees of upstream and port, and a note where one cannot be shown.

    Receives:
        told: where both part.
        raised: the path of the node of the port that raised, with the name of its root.
    """
    ours, theirs = marks_of(case, told)
    if raised:
        place = raised.partition(".")[2]
        theirs = Marks({place: "introduces"}, taps=theirs.taps, first=place)
    dtype = Lane(told.lane.split("-")[0]).dtype if told else torch.float32
    found: list[Node | None] = []
    notes: list[str] = []
    for builder, marks, side in ((case.upstream, ours, "upstream"), (case.port, theirs, "the port")):
        try:
            with forked_random_state(cuda=False), default_dtype(dtype), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with time_limit(min(case.time_limit, _SECONDS)):
                    found.append(tree(build_on_meta(builder, case), marks))
        except Exception as error:
            found.append(None)
            first = next(iter(str(error).strip().splitlines()), "")
            notes.append(f"{side} cannot be built here: {type(error).__name__}: {first}")
    return found[0], found[1], "; ".join(notes)


def marks_of(case: Case, told: Told | None) -> tuple[Marks, Marks]:
    """What is known about the nodes of upstream and of the port."""
    taps = frozenset(case.taps.values()), frozenset(case.taps)
    if told is None:
        return Marks(taps=taps[0]), Marks(taps=taps[1])
    leaves = [leaf for leaf in told.depth if leaf.mark != "output"]
    ours: dict[str, str] = {}
    theirs: dict[str, str] = {}
    for leaf in leaves:
        theirs[leaf.port] = max(theirs.get(leaf.port, ""), leaf.mark, key=_RANK.__getitem__)
        ours[leaf.upstream] = max(ours.get(leaf.upstream, ""), leaf.mark, key=_RANK.__getitem__)
    for fault in told.faults:
        theirs[fault.port] = "introduces"
        if fault.upstream:
            ours[fault.upstream] = "introduces"
    port_errors = {leaf.port: short_error(leaf.error) for leaf in reversed(leaves)}
    upstream_errors = {leaf.upstream: short_error(leaf.error) for leaf in reversed(leaves)}
    first = told.faults[0] if told.faults else None
    return (
        Marks(ours, upstream_errors, {leaf.upstream: leaf.port for leaf in leaves}, taps[0], first and first.upstream),
        Marks(theirs, port_errors, {leaf.port: leaf.upstream for leaf in leaves}, taps[1], first and first.port),
    )


def short_error(error: float | None) -> str:
    """An error in a few characters."""
    if error is None:
        return "not finite"
    return "0" if error == 0 else f"{error:.1e}"


def tree(model: nn.Module, marks: Marks) -> Node:
    """The tree of a side."""
    return _node(model, "", marks)


def _node(module: nn.Module, path: str, marks: Marks) -> Node:
    # named_children() would hide a module that occurs twice
    below = module._modules.items()  # pyright: ignore[reportPrivateUsage]  # torch has no public name for it
    children = [_node(m, f"{path}.{name}" if path else name, marks) for name, m in below if m is not None]
    match = _LINE.match(_NOISE.sub("", describe(module)).replace("(, ", "(").replace("(,", "("))
    parts = match.groupdict() if match else {}
    key = path.rpartition(".")[2]
    name = (parts.get("name") or "").strip() or type(module).__name__
    attributes = parts.get("attributes") or ""
    is_first = marks.first is not None and path == marks.first
    return Node(
        path=path,
        tag=parts.get("tag") or "",
        name=f"{key}: {name}" if key and not key.startswith(name) else key or name,
        attributes="" if attributes == "()" else attributes,
        mark=marks.marks.get(path, ""),
        inside=max((child.worst for child in children), key=_RANK.__getitem__, default=""),
        other=marks.others.get(path, ""),
        error=marks.errors.get(path, ""),
        is_tap=path in marks.taps,
        is_open=not path or is_first or any(child.is_open for child in children),
        anchor="first" if is_first else "",
        children=tuple(_folded(children)),
    )


def _folded(children: list[Node]) -> list[Node]:
    kept: list[tuple[tuple[object, ...], Node]] = []
    for child in children:
        look = _look(child)
        if kept and kept[-1][0] == look and not child.is_open:
            before = kept[-1][1]
            kept[-1] = (look, replace(before, times=before.times + 1))
        else:
            kept.append((look, child))
    return [node for _, node in kept]


def _look(node: Node) -> tuple[object, ...]:
    """What two neighbours have in common when they look alike."""
    name = re.sub(r"^\w+: ", "", re.sub(r"_\d+$", "", node.name))
    inside = tuple((_look(child), child.times) for child in node.children)
    return (node.tag, name, node.attributes, node.mark, node.error, node.is_tap, inside)
