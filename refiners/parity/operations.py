"""What a trace is made of: operations with the module, the line and the numbers of the values they read and write."""

import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

_PLAIN = frozenset({int, float, str, bool, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
"""What most arguments are that are no tensors, asked for first: a trace asks this of everything a model computes."""


@dataclass(frozen=True, slots=True)
class Source:
    """A line of code."""

    file: str
    line: int

    @property
    def code(self) -> str:
        """The line as it is written."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        parts = Path(self.file).parts
        short = parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else parts[-3:]
        return f"{'/'.join(short)}:{self.line}"


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for a tensor among arguments: its place among the tensors of the operation."""

    place: int


def taken_apart(args: Any, kwargs: Any) -> tuple[list[Tensor], Any]:
    """The tensors among arguments, in order, and the arguments with a `Slot` in place of each."""
    found: list[Tensor] = []
    return found, (_slotted(args, found), _slotted(kwargs, found) if kwargs else {})


def _slotted(value: Any, found: list[Tensor]) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        found.append(value)
        return Slot(len(found) - 1)
    if isinstance(value, list | tuple):
        slotted = [_slotted(item, found) for item in cast(Sequence[Any], value)]
        return slotted if isinstance(value, list) else tuple(slotted)
    if isinstance(value, Mapping):
        return {key: _slotted(item, found) for key, item in cast(Mapping[Any, Any], value).items()}
    return value


def fill_template(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The same nesting of dicts, lists and tuples with every object of a kind replaced."""
    if isinstance(value, kind):
        return function(value)
    if type(value) in _PLAIN:
        return value
    if isinstance(value, list | tuple):
        filled = [fill_template(item, kind, function) for item in cast(Sequence[Any], value)]
        return filled if isinstance(value, list) else tuple(filled)
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {key: fill_template(item, kind, function) for key, item in items}
    return value


@dataclass(slots=True)
class Operation:
    """One operation of torch."""

    index: int
    name: str
    """As torch calls it: `aten.native_layer_norm`."""
    call: int
    """The innermost module call it belongs to; -1 outside of all modules."""
    source: Source | None
    inputs: tuple[int, ...]
    """Numbers of the values of its tensors, in the order of its arguments."""
    outputs: tuple[int | None, ...]
    """The same of its results; None for a view that nobody has read."""
    tensors: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    """Dtypes and shapes of its tensors, in the order of its arguments."""
    given: tuple[torch.dtype, ...]
    """Of its floating inputs; a number in a tensor without axes counts where there is no other, as for torch itself."""
    made: torch.dtype | None
    """Of its first result, if that is floating."""
    is_view: bool = False
    backward_of: int | None = None
    """For an operation of the backward pass: the index of the one whose gradient it computes."""
    function: Any = None
    template: Any = None
    """Its arguments and keyword arguments, with a `Slot` in place of each tensor."""
    makers: tuple[int, ...] = ()
    """For each of its tensors the index of the operation that returned it; -1 where that is not known."""
    before: "Operation | None" = None
    """For a view of a view that nobody read: that one, of which it is the rest."""

    @property
    def arguments(self) -> str:
        """All its arguments as text, with the shapes of tensors in place of their values."""

        def told(value: Any) -> str:
            if isinstance(value, Slot):
                dtype, shape = self.tensors[value.place]
                return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
            if isinstance(value, list | tuple):
                return f"[{', '.join(map(told, cast(Sequence[Any], value)))}]"
            return repr(value)

        args, kwargs = self.template
        own = f"({', '.join([*map(told, args), *(f'{key}={told(value)}' for key, value in kwargs.items())])})"
        return f"{self.before.arguments} → {own}" if self.before else own

    def __str__(self) -> str:
        return f"{self.name.removeprefix('aten.')}{self.arguments}"


@dataclass(slots=True)
class ModuleCall:
    """One call of a module."""

    index: int
    path: str
    kind: str
    parent: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()
    makers: tuple[int, ...] = ()
    """For each of its inputs the index of the operation that returned it; -1 where that is not known."""


@dataclass
class Trace:
    """What one side did, in order."""

    operations: list[Operation] = field(default_factory=list[Operation])
    calls: list[ModuleCall] = field(default_factory=list[ModuleCall])
    outputs: dict[str, int] = field(default_factory=dict[str, int])
    """The numbers of the compared outputs."""
    weights: set[int] = field(default_factory=set[int])
    """The numbers of the parameters and buffers."""
    unread: tuple[str, ...] = ()
    """Entries of the state dict that no operation read."""
    gradients: dict[str, int] = field(default_factory=dict[str, int])
    """The numbers of the gradients of the parameters, where there was a backward pass that reached them."""

    def path_of(self, operation: Operation) -> str:
        """The path of the module that ran an operation."""
        return self.calls[operation.call].path if operation.call >= 0 else ""

    def place_of(self, operation: Operation) -> str:
        """Where an operation runs, for people: its module, and the line of code if there is one."""
        path = self.path_of(operation)
        module = f"`{path}`" if path else "the model itself" if operation.call >= 0 else "no module"
        return f"{module} ({operation.source})" if operation.source else module

    def known(self) -> set[int]:
        """The numbers of all values that occur."""
        found = {number for op in self.operations for number in (*op.inputs, *op.outputs) if number is not None}
        found |= {number for call in self.calls for number in (*call.inputs, *call.outputs)}
        return found | self.weights | set(self.outputs.values())


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor of nested dicts, lists and tuples, in order."""
    found: list[Tensor] = []
    _gather(value, found)
    return found


def _gather(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        for item in cast(Sequence[Any], value):
            _gather(item, found)
    elif type(value) not in _PLAIN and isinstance(value, Mapping):
        for item in cast(Mapping[Any, Any], value).values():
            _gather(item, found)


@cache
def facts_of(function: Any) -> tuple[str, bool, bool]:
    """Of an operation of torch: its name, whether its results are views, whether it writes into its arguments.

    A constant that is lifted into a model, as a tensor made of a list, is a value like others.
    """
    name = str(function)
    return name.rsplit(".", 1)[0], function.is_view and "lift_fresh" not in name, bool(function._schema.is_mutable)


def draws(function: Any) -> bool:
    """Whether an operation asks a generator. Attention could, for its dropout; here models are evaluated."""
    return torch.Tag.nondeterministic_seeded in function.tags and "scaled_dot_product" not in str(function)


def floats_in(tensors: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
    """The dtypes of the floating tensors that decide in which one torch computes; of complex ones, of their parts."""
    found = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    deciding = [tensor for tensor in found if tensor.ndim] or found
    return tuple(tensor.dtype.to_real() for tensor in deciding)
