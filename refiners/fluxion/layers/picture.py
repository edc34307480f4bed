"""The tree as a picture: in colour on a terminal, collapsible in a notebook.

Both show what the text shows, and the number of parameters below each node. Injected adapters stand out, and what they
add is counted apart.
"""

import html
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from refiners.fluxion.layers.adapter import is_adapter
from refiners.fluxion.layers.tree import ModuleTree, TreeNode

# Notebooks open this many levels, and the way to each adapter; a click opens the others.
_OPEN_LEVELS = 2

_STYLE = """
.refiners-tree {font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-x: auto; white-space: nowrap}
.refiners-tree details > :not(summary) {margin-left: 1.1em; padding-left: .6em; border-left: 1px solid #8884}
.refiners-tree .leaf {padding-left: 1em} .refiners-tree summary {cursor: pointer}
.refiners-tree .tag {color: #888} .refiners-tree .name {font-weight: 600} .refiners-tree .attributes {color: #0a7ea4}
.refiners-tree .size {color: #888; padding-left: .6em} .refiners-tree .adapter > .name {color: #c026d3}
.refiners-tree .adapter > .name::before {content: "◆ "}
""".strip()


class _Parts:
    """A line of the tree, taken apart: `(TAG) Name(attributes) suffix`."""

    _pattern = re.compile(
        r"(?P<tag>\([A-Z]+\))? ?(?P<name>[^(]*)(?P<attributes>\(.*\))?(?P<suffix> \(x\d+\)| #\d+)*$", re.S
    )

    def __init__(self, node: TreeNode, module: nn.Module) -> None:
        match = self._pattern.match(node["value"])
        fields = {} if match is None else match.groupdict()
        self.tag = fields.get("tag") or ""
        self.name = fields.get("name") or ("" if self.tag else node["value"])
        attributes = fields.get("attributes") or ""
        self.suffix = node["value"][len(" ".join(part for part in (self.tag, self.name) if part) + attributes) :]
        self.attributes = "" if attributes == "()" else attributes
        self.size = human_count(sum(parameter.numel() for parameter in module.parameters()))
        self.is_adapter = is_adapter(module) and module.is_injected


def human_count(number: int) -> str:
    """A number of parameters in at most four characters and a unit: 950, 23.1k, 1.24B."""
    value, units = float(number), ["", "k", "M", "B", "T"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g}{units[0]}" if number else ""


def summary(module: nn.Module) -> str:
    """One line: parameters, dtypes, devices, adapters."""
    parameters = list(module.parameters())
    injected = [m for m in module.modules() if is_adapter(m) and m.is_injected]
    base = {id(p) for adapter in injected for p in adapter.target.parameters()}
    added = {id(p): p.numel() for adapter in injected for p in adapter.parameters() if id(p) not in base}
    parts = [f"{human_count(sum(p.numel() for p in parameters)) or 'no'} parameters"]
    parts += _kinds(Counter(str(p.dtype).removeprefix("torch.") for p in parameters))
    parts += _kinds(Counter(str(p.device) for p in parameters))
    if injected:
        plural = "s" if len(injected) > 1 else ""
        size = human_count(sum(added.values())) or "no"
        parts.append(f"{len(injected)} adapter{plural} injected with {size} parameters")
    return " · ".join(parts)


def _kinds(counts: Counter[str]) -> list[str]:
    if not counts:
        return []
    total = sum(counts.values())
    return [", ".join(kind if count == total else f"{kind} ({count} tensors)" for kind, count in counts.most_common())]


def print_tree(module: nn.Module, depth: int = -1, file: Any = None) -> None:
    """Print the tree: in colour on a terminal, else as plain text."""
    tree = ModuleTree(module)
    stream = file or sys.stdout
    if not (hasattr(stream, "isatty") and stream.isatty()):
        print(tree.generate_tree_repr(tree.root, depth=depth), file=stream)
        return
    from rich.console import Console

    Console(file=stream, highlight=False).print(rich_tree(module, depth))


def rich_tree(module: nn.Module, depth: int = -1) -> Any:
    """The tree as a `rich.tree.Tree`, with a summary below it."""
    from rich.console import Group
    from rich.text import Text
    from rich.tree import Tree

    picture = ModuleTree(module)

    def label(node: TreeNode) -> Text:
        parts = _Parts(node, picture.modules[id(node)])
        name_style = "bold magenta" if parts.is_adapter else "bold"
        mark = "◆ " if parts.is_adapter else ""
        return Text.assemble(
            (mark, "magenta"),
            (f"{parts.tag} " if parts.tag else "", "dim"),
            (parts.name, name_style),
            (parts.attributes, "cyan"),
            (parts.suffix, "yellow"),
            (f"  {parts.size}" if parts.size else "", "dim"),
        )

    root = Tree(label(picture.root), guide_style="dim")
    waiting = [(root, picture.root, depth)]
    while waiting:
        branch, node, levels = waiting.pop()
        if levels == 0 and node["children"]:
            branch.add(Text("…", style="dim"))
            continue
        for child in node["children"]:
            waiting.append((branch.add(label(child)), child, levels - 1))
    return Group(root, Text(summary(module), style="dim"))


def tree_html(module: nn.Module) -> str:
    """The tree as HTML that a notebook shows; nodes with children can be folded."""
    tree = ModuleTree(module)
    body = "".join(_html_lines(tree))
    footer = f'<div class="size">{html.escape(summary(module))}</div>'
    return f'<style>{_STYLE}</style><div class="refiners-tree">{body}{footer}</div>'


def _html_lines(tree: ModuleTree) -> Iterator[str]:
    waiting: list[tuple[TreeNode, int] | str] = [(tree.root, 0)]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
            continue
        node, level = item
        line = _html_line(_Parts(node, tree.modules[id(node)]))
        if not node["children"]:
            yield f'<div class="leaf">{line}</div>'
            continue
        is_open = level < _OPEN_LEVELS or any(is_adapter(module) for module in tree.modules[id(node)].modules())
        yield f"<details{' open' if is_open else ''}><summary>{line}</summary><div>"
        waiting.append("</div></details>")
        waiting.extend((child, level + 1) for child in reversed(node["children"]))


def _html_line(parts: _Parts) -> str:
    def span(kind: str, text: str) -> str:
        return f'<span class="{kind}">{html.escape(text)}</span>' if text else ""

    name = span("tag", parts.tag) + (" " if parts.tag else "") + span("name", parts.name)
    line = name + span("attributes", parts.attributes) + span("tag", parts.suffix) + span("size", parts.size)
    return f'<span class="adapter">{line}</span>' if parts.is_adapter else line
