"""A first draft of a port, read off the upstream model: one class a node, and the key map that fits it.

The draft has upstream's modules in the order in which upstream declares them, which is seldom the order in which it
calls them; what upstream writes between two modules is not in it at all. So it computes nothing right yet. But its
weights convert from the first minute, and so its case runs and says what is missing.

    upstream                          port
    layers.0.attention.q_proj    →    Layer_1.Attention.QProj      a class named by the attribute
    cls_token                    →    ClsToken.weight              a leaf that holds the parameter
    mlp.0, mlp.2                 →    Mlp.Linear_1, Mlp.Linear_2   what has a number only is called by its kind
"""

import keyword
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from torch import Tensor, nn

from refiners.conversion.proposal import propose_lines

WIDTH = 116
_TAKEN = ("Tensor", "Unpack")
_LISTS = (nn.ModuleList, nn.ModuleDict)
_LEAF = '''class {name}(fl.Module):
    """Upstream: {origin}. Write its forward."""

    def __init__(self, **factory: Unpack[fl.Factory]) -> None:
        super().__init__()
{parameters}

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("{name} has no forward yet: write what upstream does.")
'''
_CHAIN = '''class {name}(fl.Chain):
    """Upstream: {origin}. Bring its children into the order of the calls."""

    def __init__(self, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(
{children}
        )
'''
_ROLE = '''class {name}({base}):
    """Upstream: {origin}."""
'''


@dataclass(frozen=True)
class Draft:
    """The draft of a port: the name of its root, the source of its classes, and what its key map says."""

    root: str
    classes: tuple[str, ...]
    lines: Mapping[str, str]
    ignored: tuple[str, ...]
    tree: tuple[str, ...]


@dataclass(frozen=True)
class _Node:
    """A child of a Chain: the class of it, how it is built, and which upstream paths are below it."""

    name: str
    call: str
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass
class _Drafter:
    """Collects classes on the way through upstream's modules. Equal classes are written once."""

    sources: dict[str, str] = field(default_factory=lambda: dict.fromkeys(_TAKEN, ""))
    ignored: list[str] = field(default_factory=lambda: list[str]())

    def define(self, name: str, template: str, outer: str, **values: str) -> str:
        """The name under which such a class stands, a longer one where another class has that name already."""
        candidates = (name, f"{outer}{name}", *(f"{outer}{name}{number}" for number in range(2, 10_000)))
        for candidate in candidates:
            source = template.format(name=candidate, **values)
            if self.sources.setdefault(candidate, source) == source:
                return candidate
        raise AssertionError("unreachable: a model has no ten thousand classes of one name")

    def node(self, attribute: str, module: nn.Module, path: str, outer: str) -> _Node:
        """The child that stands for an upstream module with weights."""
        origin = f"`{type(module).__name__}`"
        name = class_name(attribute) or class_name(type(module).__name__)
        call = known_layer(module)
        if call is not None:
            base = call.partition("(")[0]
            if not class_name(attribute):
                return _Node(base.partition(".")[2], call, ((path, ""),))
            name = self.define(name, _ROLE, outer, base=base, origin=origin)
            return _Node(name, f"{name}({call.partition('(')[2]}", ((path, ""),))
        if not any(True for _ in module.children()):
            name = self.define(name, _LEAF, outer, origin=origin, parameters=_declarations(module))
            return _Node(name, f"{name}(**factory)", ((path, ""),))
        name, pairs = self.chain(name, module, path, outer)
        return _Node(name, f"{name}(**factory)", pairs)

    def chain(self, name: str, module: nn.Module, path: str, outer: str) -> tuple[str, tuple[tuple[str, str], ...]]:
        """Defines the Chain that stands for an upstream module with children: its name, and the pairs below it."""
        nodes, notes = self._children(module, path, name)
        counts, seen, pairs = Counter(node.name for node in nodes), Counter[str](), list[tuple[str, str]]()
        for node in nodes:
            seen[node.name] += 1
            key = f"{node.name}_{seen[node.name]}" if counts[node.name] > 1 else node.name
            pairs += [(upstream, f"{key}.{below}" if below else key) for upstream, below in node.pairs]
        lines = [f"            # Not here: {note}." for note in notes]
        for call, group in groupby(node.call for node in nodes):
            count = len(list(group))
            lines.append(f"            *({call} for _ in range({count}))," if count > 1 else f"            {call},")
        origin = f"`{type(module).__name__}`"
        name = self.define(name, _CHAIN, outer, origin=origin, children="\n".join(lines))
        return name, tuple(pairs)

    def _children(self, module: nn.Module, path: str, outer: str) -> tuple[list[_Node], list[str]]:
        nodes, notes = list[_Node](), list[str]()
        kept = set(module.state_dict())
        for attribute, parameter in module.named_parameters(recurse=False):
            name = class_name(attribute) or "Weight"
            body = _parameter("weight", parameter)
            name = self.define(name, _LEAF, outer, origin=f"the parameter `{attribute}`", parameters=body)
            nodes.append(_Node(name, f"{name}(**factory)", ((_join(path, attribute), "weight"),)))
        for attribute, _ in module.named_buffers(recurse=False):
            self.ignored += [_join(path, attribute)] if attribute in kept else []
        for attribute, child, below in _named_children(module, path):
            if any(True for _ in child.parameters()) or child.state_dict():
                nodes.append(self.node(attribute, child, below, outer))
            else:
                notes.append(f"`{below.removeprefix(f'{path}.')}`, {type(child).__name__}, which has no weights")
        return nodes, notes


def draft_port(model: nn.Module) -> Draft:
    """The draft of a port of an upstream model.

    Receives:
        model: any module; on `meta` it costs nothing.

    Example:
        >>> upstream = nn.Module()
        >>> upstream.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        >>> upstream.norm = nn.LayerNorm(2)
        >>> draft = draft_port(upstream)
        >>> draft.lines
        {'layers.{i}': 'Layer_{i+1}', 'norm': 'Norm'}
        >>> print(draft.classes[0])
        class Layer(fl.Linear):
            \"\"\"Upstream: `Linear`.\"\"\"
        <BLANKLINE>
    """
    drafter = _Drafter()
    root, pairs = drafter.chain(class_name(type(model).__name__) or "Model", model, "", "")
    return Draft(
        root=root,
        classes=tuple(source for source in drafter.sources.values() if source),
        lines=propose_lines(pairs),
        ignored=tuple(propose_lines([(key, key) for key in drafter.ignored])),
        tree=tuple(_cut(line) for line in upstream_tree(model)),
    )


def class_name(attribute: str) -> str:
    """`q_proj` → `QProj`, `layers` → `Layers`; empty for what is a number only."""
    words = [word for word in re.split(r"[^0-9A-Za-z]+", attribute) if word]
    name = "".join(word[0].upper() + word[1:] for word in words)
    return "" if not name or name[0].isdigit() else f"{name}_" if keyword.iskeyword(name) else name


def known_layer(module: nn.Module) -> str | None:
    """The call that builds the same layer, in `fl` or of torch; None where none has the same name and weights."""
    match module:
        case nn.Linear():
            bias = "" if _has_bias(module) else ", bias=False"
            return f"fl.Linear({module.in_features}, {module.out_features}{bias}, **factory)"
        case nn.LayerNorm() if _has_bias(module):
            [*shape] = module.normalized_shape
            sizes = shape[0] if len(shape) == 1 else tuple(shape)
            return f"fl.LayerNorm({sizes}, eps={module.eps!r}, **factory)"
        case nn.GroupNorm() if module.affine:
            return f"fl.GroupNorm({module.num_channels}, {module.num_groups}, eps={module.eps!r}, **factory)"
        case nn.Embedding():
            return f"fl.Embedding({module.num_embeddings}, {module.embedding_dim}, **factory)"
        case nn.Conv2d():
            return f"fl.Conv2d({', '.join(_convolution(module, 'use_bias'))}, **factory)"
        case nn.Conv1d() if type(module) is nn.Conv1d:
            return f"nn.Conv1d({', '.join(_convolution(module, 'bias'))}, **factory)"
        case nn.BatchNorm1d() | nn.BatchNorm2d() if module.affine and module.track_running_stats:
            kind = "BatchNorm2d" if isinstance(module, nn.BatchNorm2d) else "BatchNorm1d"
            return f"nn.{kind}({module.num_features}, eps={module.eps!r}, **factory)"
        case _:
            return None


def _has_bias(module: nn.Module) -> bool:
    return "bias" in module.state_dict()


def _convolution(module: nn.Conv1d | nn.Conv2d, bias: str) -> Iterator[str]:
    yield from (str(module.in_channels), str(module.out_channels), str(module.kernel_size))
    ones, zeros = (1,) * len(module.kernel_size), (0,) * len(module.kernel_size)
    defaults = {"stride": ones, "padding": zeros, "groups": 1, "dilation": ones, "padding_mode": "zeros"}
    for name, default in defaults.items():
        value = getattr(module, name)
        if value != default:
            yield f"{name}={value!r}"
    if not _has_bias(module):
        yield f"{bias}=False"


def _named_children(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Attribute, module and path of each child. The members of a list are children of what holds the list."""
    for attribute, child in module.named_children():
        below = _join(path, attribute)
        if not isinstance(child, _LISTS):
            yield attribute, child, below
            continue
        for member, inner, deeper in _named_children(child, below):
            yield singular(attribute) if member.isdigit() else f"{attribute}_{member}", inner, deeper


def singular(name: str) -> str:
    """`layers` → `layer`, for one of them."""
    return name[:-1] if name.endswith("s") and not name.endswith("ss") else name


def upstream_tree(model: nn.Module) -> list[str]:
    """Upstream's modules as a picture, with the shapes of its own parameters; equal neighbours are shown once."""
    return [_label(model), *_below(model)]


def _below(module: nn.Module) -> list[str]:
    own = [(f"{name}  Parameter{tuple(p.shape)}", list[str]()) for name, p in module.named_parameters(recurse=False)]
    entries = own if any(True for _ in module.children()) else []
    children = [(name, _label(child), _below(child)) for name, child in module.named_children()]
    # Members of a list have a number for a name; others are not folded, for the name says what they are for.
    for (_, label, lines), group in groupby(children, key=_same_picture):
        names = [name for name, _, _ in group]
        entries.append((f"{names[0]}{f' … {names[-1]}' if len(names) > 1 else ''}  {label}", lines))
    drawn: list[str] = []
    for position, (label, lines) in enumerate(entries):
        last = position == len(entries) - 1
        drawn.append(f"{'└' if last else '├'}── {label}")
        drawn += [f"{' ' if last else '│'}   {line}" for line in lines]
    return drawn


def _same_picture(child: tuple[str, str, list[str]]) -> tuple[str, str, list[str]]:
    name, label, lines = child
    return "" if name.isdigit() else name, label, lines


def _label(module: nn.Module) -> str:
    numbers = " ".join(module.extra_repr().split())
    return f"{type(module).__name__}({numbers})" if numbers else type(module).__name__


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _declarations(module: nn.Module) -> str:
    """The parameters and kept buffers of a leaf that `fl` does not have."""
    kept = module.state_dict()
    lines = [_parameter(name, parameter) for name, parameter in module.named_parameters(recurse=False)]
    for name, buffer in module.named_buffers(recurse=False):
        if name in kept:
            shape = ", ".join(map(str, buffer.shape)) or "()"
            lines.append(f'        self.register_buffer("{name}", torch.empty({shape}, dtype={buffer.dtype}))')
    return "\n".join(lines)


def _parameter(name: str, parameter: Tensor) -> str:
    shape = ", ".join(map(str, parameter.shape)) or "()"
    return f"        self.{name} = nn.Parameter(torch.empty({shape}, **factory))"
