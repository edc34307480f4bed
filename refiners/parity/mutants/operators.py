"""Operators of mutation: each plants one kind of mistake that people make when they port a model.

An operator looks at one node, with what the node did in a forward that was watched, and tells every way in which it can
spoil it: a parameter that names the way, and the edit that does it. `refiners.parity.mutants.call_operators` has those
that spoil what a leaf calls; here are those that spoil nodes and how they stand together.
"""

# What a spoilt node is called with is anything: the lambdas below have no types.
# pyright: reportUnknownLambdaType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownParameterType=false
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.combinators import Concatenate, Distribute, Parallel, Residual, Sum
from refiners.parity.modules import named_modules
from refiners.parity.mutants.calls import Seen
from refiners.parity.mutants.planting import (
    Edit,
    Forward,
    own_parameters,
    with_attribute,
    with_exchanged_children,
    with_exchanged_parameters,
    with_forward,
    with_members,
)

Lanes = Literal["any", "half"]


@dataclass(frozen=True)
class Site:
    """A node that may be spoilt, where it stands, and what it did."""

    path: str
    module: nn.Module
    parent: nn.Module | None
    seen: Seen

    @property
    def is_leaf(self) -> bool:
        """Whether it has no children."""
        return not any(True for _ in self.module.children())

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors it was called with."""
        return [value for value in self.seen.args if isinstance(value, Tensor)]

    @property
    def keeps_shape(self) -> bool:
        """Whether it makes one tensor of one, of the same shape and dtype."""
        output = self.seen.output
        return (
            isinstance(output, Tensor)
            and len(self.seen.args) == len(self.inputs) == 1
            and output.shape == self.inputs[0].shape
            and output.dtype == self.inputs[0].dtype
        )


Ways = Iterator[tuple[str, Edit]]
Find = Callable[[Site], Ways]


@dataclass(frozen=True)
class Operator:
    """One kind of mistake."""

    name: str
    find: Find
    lanes: Lanes = "any"
    """"half": a mistake of precision, planted in the bfloat16 lane as well where float64 does not tell it."""

    @property
    def what(self) -> str:
        """The mistake, in one sentence."""
        return self.find.__doc__ or ""


OPERATORS: dict[str, Operator] = {}


def operator(name: str, lanes: Lanes = "any") -> Callable[[Find], Find]:
    """Registers a function as an operator. Its docstring says what the mistake is."""

    def register(find: Find) -> Find:
        OPERATORS[name] = Operator(name, find, lanes)
        return find

    return register


def sites(model: nn.Module, seen: Mapping[str, Seen]) -> list[Site]:
    """Every node below the model that ran, each once, in the order of the tree; or the model, if it is a leaf."""
    modules = dict(named_modules(model, every_name=True))
    return [
        Site(path, module, modules[path.rpartition(".")[0]] if path else None, seen[path])
        for path, module in named_modules(model)
        if path in seen and (path or not any(True for _ in module.children()))
    ]


def siblings(site: Site) -> list[nn.Module]:
    """The children of the node's parent, itself included, in order."""
    return list(site.parent.children()) if site.parent is not None else []


# --- nodes that are missing, or there too often -------------------------------------------------------------------


@operator("drop")
def drop(site: Site) -> Ways:
    """A node is missing: it returns its first input."""
    output = site.seen.output
    if not site.inputs or not isinstance(output, Tensor) or output is site.inputs[0]:
        return
    if output.shape == site.inputs[0].shape:
        yield "", with_forward(site.module, lambda original, x, *args, **kwargs: x)
    elif output.ndim == site.inputs[0].ndim and output.is_floating_point() == site.inputs[0].is_floating_point():
        yield "cut to size", with_forward(site.module, _cut_to(output.shape))


def _cut_to(shape: Sequence[int]) -> Forward:
    def forward(original: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shape = original(x, *args, **kwargs).shape
        index = [torch.arange(size, device=x.device) % x.shape[dim] for dim, size in enumerate(shape)]
        return x[torch.meshgrid(*index, indexing="ij")]

    return forward


@operator("drop-term")
def drop_term(site: Site) -> Ways:
    """What one child of a sum gives is left out."""
    if isinstance(site.parent, Sum) and isinstance(site.seen.output, Tensor) and len(siblings(site)) > 1:
        yield "", with_forward(site.module, lambda original, *args: torch.zeros_like(original(*args)))


@operator("repeat")
def repeat(site: Site) -> Ways:
    """A node is applied twice."""
    if site.keeps_shape and site.inputs[0].is_floating_point() and site.seen.output is not site.inputs[0]:
        yield "", with_forward(site.module, lambda original, x: original(original(x)))


@operator("swap-order", lanes="half")
def swap_order(site: Site) -> Ways:
    """Two neighbours stand in each other's place."""
    children, parent = siblings(site), site.parent
    index = next((i for i, child in enumerate(children) if child is site.module), -1)
    is_sequence = isinstance(parent, nn.Sequential | Chain) and not isinstance(parent, Sum)
    if is_sequence and 0 <= index < len(children) - 1 and len({id(child) for child in children}) == len(children):
        assert parent is not None
        yield f"with {type(children[index + 1]).__name__}", with_exchanged_children(parent, index, index + 1)


@operator("swap-weights")
def swap_weights(site: Site) -> Ways:
    """Two nodes of equal shape hold each other's weights."""
    shapes = _shapes(site.module)
    later = False
    for index, other in enumerate(siblings(site)):
        later |= other is site.module
        if later and other is not site.module and shapes and _shapes(other) == shapes:
            yield f"with child {index}, {type(other).__name__}", with_exchanged_parameters(site.module, other)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters(recurse=False)}


@operator("swap-inner-weights")
def swap_inner_weights(site: Site) -> Ways:
    """Two neighbours' leaves of equal shape hold each other's weights."""
    children = siblings(site)
    index = next((i for i, child in enumerate(children) if child is site.module), -1)
    if site.is_leaf or not 0 <= index < len(children) - 1:
        return
    others = {(path, *sorted(_shapes(leaf).items())): leaf for path, leaf in named_modules(children[index + 1])}
    for path, leaf in named_modules(site.module):
        other = others.get((path, *sorted(_shapes(leaf).items())))
        if other is not None and _shapes(leaf):
            yield path, with_exchanged_parameters(leaf, other)


@operator("swap-tables")
def swap_tables(site: Site) -> Ways:
    """Two embeddings of one width read each other's table."""
    if not isinstance(site.module, nn.Embedding) or site.parent is None:
        return
    for path, other in _tables_beside(site):
        table = other

        def forward(original: Any, ids: Tensor, table: nn.Embedding = table) -> Tensor:
            return functional.embedding(ids % table.num_embeddings, table.weight)

        yield f"with {path}", with_forward(site.module, forward)


def _tables_beside(site: Site) -> Iterator[tuple[str, nn.Embedding]]:
    above: Any = site.parent
    outer = getattr(above, "parent", None)
    own = site.module
    assert isinstance(own, nn.Embedding)
    for path, other in named_modules(outer if isinstance(outer, nn.Module) else above):
        if isinstance(other, nn.Embedding) and other is not own and other.embedding_dim == own.embedding_dim:
            yield path, other


# --- how nodes are joined -----------------------------------------------------------------------------------------


@operator("residual")
def residual(site: Site) -> Ways:
    """A residual is missing, added twice, or subtracted."""
    if isinstance(site.module, Residual):
        yield "missing", with_members(site.module, _finish=None)
        yield "twice", with_members(site.module, _finish=lambda self, inputs, output: output + 2 * inputs[0])
        yield "subtracted", with_members(site.module, _finish=lambda self, inputs, output: output - inputs[0])


@operator("swap-inputs")
def swap_inputs(site: Site) -> Ways:
    """Two inputs of a node are exchanged."""
    shapes = [getattr(value, "shape", None) for value in site.seen.args]
    for i in range(len(shapes)):
        for j in range(i + 1, len(shapes)):
            if shapes[i] is not None and (shapes[i] == shapes[j] or isinstance(site.module, Distribute)):
                yield f"{i} and {j}", with_forward(site.module, _exchanged(i, j))


def _exchanged(i: int, j: int) -> Forward:
    def forward(original: Any, *args: Any) -> Any:
        swapped = list(args)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        return original(*swapped)

    return forward


@operator("join-order")
def join_order(site: Site) -> Ways:
    """What the children of a node give is joined in the other order."""
    if isinstance(site.module, Parallel) and isinstance(site.seen.output, tuple):
        yield "reversed", with_forward(site.module, lambda original, *args: tuple(reversed(original(*args))))
    if isinstance(site.module, Concatenate):

        def reversed_result(self: Concatenate, folded: list[Tensor]) -> Tensor:
            return torch.cat(folded[::-1], dim=self.dim)

        yield "reversed", with_members(site.module, _result=reversed_result)


# --- activations --------------------------------------------------------------------------------------------------

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu through tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
_IS_ACTIVATION = re.compile(r"LU|Tanh|Sigmoid|Activation|Mish|Softplus|Hardswish", re.IGNORECASE)


@operator("activation")
def activation(site: Site) -> Ways:
    """Another activation."""
    if not (site.is_leaf and site.keeps_shape and _IS_ACTIVATION.search(_kinds(site.module))):
        return
    if any(True for _ in site.module.parameters()):
        return
    probe = torch.linspace(-3, 3, 101, dtype=torch.float64)
    own = site.module(probe)
    for name, function in ACTIVATIONS.items():
        if not torch.equal(function(probe), own):
            yield name, with_forward(site.module, lambda original, x, function=function: function(x))


def _kinds(module: nn.Module) -> str:
    return " ".join(kind.__name__ for kind in type(module).__mro__ if kind not in (nn.Module, object))


# --- attributes ---------------------------------------------------------------------------------------------------


@operator("heads")
def heads(site: Site) -> Ways:
    """The heads are counted or cut differently."""
    count = getattr(site.module, "num_heads", None)
    if not (site.is_leaf and isinstance(count, int) and site.inputs):
        return
    width = site.inputs[0].shape[-1]
    for other in (2 * count, count // 2, 1):
        if other > 0 and other != count and width % other == 0:
            yield f"{count} to {other}", with_attribute(site.module, "num_heads", other)
    if 1 < count < width:

        def interleaved(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, count)).transpose(-1, -2).flatten(-2)

        yield "interleaved", with_forward(site.module, lambda original, *args: original(*map(interleaved, args)))
        yield "rolled", with_forward(site.module, lambda original, *args: original(*args).roll(width // count, -1))


_HANDED_ON = ("training", "inplace", "norm_type", "sparse", "scale_grad_by_freq", "transposed", "output_padding")
"""Attributes that torch's own layers hand on to functions that make no use of them here."""
_NOT_HERE = frozenset((*_HANDED_ON, "num_heads", "num_groups", "groups", "kernel_size", "padding_idx"))
"""Those, and what other operators spoil."""


@operator("attribute", lanes="half")
def attribute(site: Site) -> Ways:
    """A number or a switch of a node is another."""
    if not (site.is_leaf or isinstance(site.module, Concatenate)):
        return
    names = site.seen.reads if site.is_leaf else {"dim"}
    for name, value in list(site.module.__dict__.items()):  # an edit may add to them meanwhile
        if name not in names or name in _NOT_HERE:
            continue
        if isinstance(value, bool):
            yield f"{name} {not value}", with_attribute(site.module, name, not value)
        elif isinstance(value, int):
            for other in (value + 1, value - 1):
                yield f"{name} {value} to {other}", with_attribute(site.module, name, other)
        elif isinstance(value, float):
            other = value * 1.1 if value else 0.1
            yield f"{name} {value:g} to {other:g}", with_attribute(site.module, name, other)


# --- precision and the backward pass ------------------------------------------------------------------------------


_MOVES = (
    "__getitem__ transpose permute t flatten unflatten reshape view expand unsqueeze squeeze contiguous to embedding "
    "relu cat stack roll flip shape ndim dtype device size dim numel arange chunk split narrow"
)
MOVES = frozenset(_MOVES.split())
"""Functions that give numbers back as they are: no precision changes them."""


@operator("upcast", lanes="half")
def upcast(site: Site) -> Ways:
    """A leaf computes in float32 and rounds at its end."""
    output = site.seen.output
    if not (site.is_leaf and isinstance(output, Tensor) and output.is_floating_point()):
        return
    if all(call.name in MOVES for call in site.seen.calls):
        return
    if any(value.is_floating_point() for value in site.inputs):
        yield "float32", with_forward(site.module, _in_float32(site.module))


def _in_float32(module: nn.Module) -> Forward:
    def forward(original: Any, *args: Any) -> Any:
        held = own_parameters(module)
        wide = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        dtype = next(x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point())
        try:
            module.__dict__["_parameters"] = {
                name: parameter if parameter is None else parameter.float() for name, parameter in held.items()
            }
            return original(*wide).to(dtype)
        finally:
            module.__dict__["_parameters"] = held

    return forward


@operator("detach")
def detach(site: Site) -> Ways:
    """No gradient flows back through a node."""
    output = site.seen.output
    if isinstance(output, Tensor) and output.is_floating_point():
        yield "", with_forward(site.module, lambda original, *args: cut_off(original(*args)))


def cut_off(x: Tensor) -> Tensor:
    """The same numbers without their past.

    They ask for a gradient of their own, as what follows them is used to: the backward pass of a group norm crashes
    torch 2.13.0 where its input asks for none.
    """
    return x.detach().requires_grad_(torch.is_grad_enabled())
