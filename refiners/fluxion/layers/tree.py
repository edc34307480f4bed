"""The tree of a model, as names and as text.

Every module has a place in the tree, and a line in its picture. This file names the children of a Chain and draws
the tree. It works on any `torch.nn.Module` and knows nothing of forwards or contexts.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import groupby
from typing import NamedTuple, TypedDict

from torch import nn

# The classes whose line in the tree is their tag alone, since their name says nothing more.
PLAIN_CLASSES = frozenset({"Chain", "Parallel", "Distribute", "Passthrough", "Sum", "Concatenate"})


def child_names(modules: Iterable[nn.Module]) -> list[str]:
    """The names of the children of a Chain, in order.

    A child is named after its class. When a class occurs more than once, all of its occurrences are numbered from 1.
    """
    return list(_names_of(tuple(map(type, modules))))


@lru_cache(maxsize=256)
def _names_of(types: tuple[type, ...]) -> list[str]:
    classes = [class_name(kind) for kind in types]
    if len(set(classes)) == len(classes):
        return classes
    totals: dict[str, int] = {}
    for name in classes:
        totals[name] = totals.get(name, 0) + 1
    numbered = {name for name, total in totals.items() if total > 1}
    while True:
        seen = dict.fromkeys(totals, 0)
        names: list[str] = []
        for name in classes:
            seen[name] += 1
            names.append(f"{name}_{seen[name]}" if name in numbered else name)
        if len(set(names)) == len(names):
            return names
        # A class that is itself called `Linear_1` must not take the name of the first of several `Linear`.
        numbered |= {name for name in totals if name not in numbered and names.count(name) > 1}


@cache
def class_name(cls: type) -> str:
    """The name of a class as it was written: torch puts classes of its own in front to parametrize and to shard."""
    if cls.__module__ == "torch.nn.utils.parametrize":
        return class_name(cls.__mro__[1])
    if cls.__name__.startswith("FSDP") and any(base.__name__ == "FSDPModule" for base in cls.__mro__[1:2]):
        return class_name(cls.__mro__[2])
    return cls.__name__


# Given a module and its path of keys, the label of the place to point at, or None.
Mark = Callable[[nn.Module, str], str | None]


class TreeNode(TypedDict):
    """One line of the picture and the lines below it."""

    value: str
    class_name: str
    children: list["TreeNode"]


def describe(module: nn.Module) -> str:
    """The line of one module: `(TAG) Name(attribute=value)`."""
    class_name = type(module).__name__
    tag = getattr(type(module), "_tag", None)  # of the class: a wrapper may answer for what it wraps
    if tag is None:  # a module that is not one of ours
        return f"{class_name}({' '.join(module.extra_repr().split())})"
    if not tag:
        return str(module)
    return f"({tag})" if class_name in PLAIN_CLASSES else f"({tag}) {module}"


class ModuleTree:
    """The picture of a module and of everything below it, with equal neighbours folded into one line."""

    def __init__(self, module: nn.Module, mark: Mark | None = None) -> None:
        # The first of the modules that each node stands for, by the id of the node.
        self.modules: dict[int, nn.Module] = {}
        self.root = _build(module, mark, self.modules)

    def __str__(self) -> str:
        return f"{type(self).__name__}(root={self.root['value']})"

    def __iter__(self) -> Iterator[TreeNode]:
        return iter(self.root["children"])

    @staticmethod
    def generate_tree_repr(node: TreeNode, /, *, depth: int = -1) -> str:
        """The picture as text, cut below `depth` levels unless that is negative."""
        return "\n".join(_lines(node, depth))

    @staticmethod
    def shorten_tree_repr(tree_repr: str, /, line_index: int = 0, max_lines: int = 20) -> str:
        """At most `max_lines` lines of the picture, around the line of that index."""
        lines = tree_repr.splitlines()
        if len(lines) <= max_lines:
            return tree_repr
        start = max(0, min(line_index - max_lines // 2, len(lines) - max_lines))
        shown = lines[start : start + max_lines]
        if start > 0:
            shown[0] = "..."
        if start + max_lines < len(lines):
            shown[-1] = "..."
        return "\n".join(shown)


class _Drawn(NamedTuple):
    node: TreeNode
    module: nn.Module
    signature: int


class _Level:
    """A module whose children are being drawn."""

    def __init__(self, module: nn.Module, path: str, value: str) -> None:
        self.path = path
        self.value = value
        self.class_name = type(module).__name__
        # named_children() would hide a module that occurs twice
        children = module._modules.items()  # pyright: ignore[reportPrivateUsage] (torch has no public name for it)
        self.waiting = iter([(name, child) for name, child in children if child is not None])
        self.module = module
        self.drawn: list[_Drawn] = []


def _build(module: nn.Module, mark: Mark | None, modules: dict[int, nn.Module]) -> TreeNode:
    # Two pictures are equal when their signatures are. A stack of our own, since a tree may be deeper than Python's.
    signatures: dict[tuple[str, str, tuple[int, ...]], int] = {}
    levels = [_Level(module, "", _value(module, "", mark))]
    while True:
        level = levels[-1]
        following = next(level.waiting, None)
        if following is not None:
            name, child = following
            path = f"{level.path}.{name}" if level.path else name
            levels.append(_Level(child, path, _value(child, path, mark)))
            continue
        key = (level.value, level.class_name, tuple(drawn.signature for drawn in level.drawn))
        node = TreeNode(value=level.value, class_name=level.class_name, children=_fold(level.drawn, modules))
        levels.pop()
        if not levels:
            modules[id(node)] = module
            return node
        levels[-1].drawn.append(_Drawn(node, level.module, signatures.setdefault(key, len(signatures))))


def _value(module: nn.Module, path: str, mark: Mark | None) -> str:
    label = None if mark is None else mark(module, path)
    return describe(module) if label is None else f">>> {describe(module)} | {label}"


def _fold(drawn: Sequence[_Drawn], modules: dict[int, nn.Module]) -> list[TreeNode]:
    """Equal neighbours become one line with their number; other nodes of one class are numbered."""
    runs = [list(run) for _, run in groupby(drawn, key=lambda node: node.signature)]
    totals = Counter(run[0].node["class_name"] for run in runs)
    seen: Counter[str] = Counter()
    folded: list[TreeNode] = []
    for run in runs:
        node = run[0].node
        name = node["class_name"]
        seen[name] += 1
        suffix = f" (x{len(run)})" if len(run) > 1 else ""
        if totals[name] > 1 and not node["value"].startswith(">>>"):
            suffix += f" #{seen[name]}"
        folded.append(TreeNode(value=node["value"] + suffix, class_name=name, children=node["children"]))
        modules[id(folded[-1])] = run[0].module
    return folded


def _lines(node: TreeNode, depth: int) -> Iterator[str]:
    # A stack of our own: a tree may be deeper than Python's stack.
    stack: list[tuple[TreeNode, str, str, int]] = [(node, "", "    ", depth)]
    while stack:
        node, head, indent, depth = stack.pop()
        if depth == 0 and node["children"]:
            yield f"{head}{node['value']} ... "
            continue
        yield f"{head}{node['value']}"
        last = len(node["children"]) - 1
        for i in range(last, -1, -1):
            icon, step = ("└── ", "    ") if i == last else ("├── ", "│   ")
            stack.append((node["children"][i], indent + icon, indent + step, depth - 1))
