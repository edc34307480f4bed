"""Modules: the nodes of a tree.

`Module` is what every node is. `WeightedModule` is a leaf with a weight, which gives a tree its device and dtype.
`ContextModule` is a node that knows its parent, and so can reach the contexts of the Chains above it.
"""

import inspect
import pickle
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast
from weakref import ref

import torch
from torch import nn

from refiners.errors import ContextError, ParentError, SerializationError, TreeError
from refiners.fluxion.context import Context, ContextProvider, find_context
from refiners.fluxion.layers.tree import ModuleTree as ModuleTree

if TYPE_CHECKING:
    from refiners.fluxion.layers.chain import Chain

TContextModule = TypeVar("TContextModule", bound="ContextModule")

_SCALARS = (str, float, int, bool)
# What torch.nn.Module keeps in a module's __dict__ is no attribute of a layer.
_TORCH_ATTRIBUTES = frozenset(nn.Module().__dict__)
_TORCH_CONTAINERS: list[tuple[str, type[Any]]] = [
    (key, type(value)) for key, value in vars(nn.Module()).items() if hasattr(value, "__len__")
]
_TORCH_VALUES = {key: value for key, value in vars(nn.Module()).items() if not hasattr(value, "__len__")}
# What a module knows of its place in a tree is no part of the module: a copy has another place.
_LINKS = ("_parent", "_can_refresh_parent", "_root_adapter", "_replaced_by", "_keys", "_holdings")


@cache
def _constructor_defaults(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}


def _is_basic(value: Any) -> bool:
    if isinstance(value, _SCALARS):
        return True
    return isinstance(value, Sequence) and all(isinstance(item, _SCALARS) for item in cast(Sequence[Any], value))


class Module(nn.Module):
    """The base of every layer: a `torch.nn.Module` that can be read as a line of a tree.

    Attributes may be set before `super().__init__()`.
    """

    _tag = ""

    def __init__(self) -> None:
        # What torch's own does, in half of the time: a model has a thousand of them.
        own = self.__dict__
        own.update(_TORCH_VALUES)
        for name, container in _TORCH_CONTAINERS:
            own[name] = container()

    if TYPE_CHECKING:  # overriding it for real would slow down every access to a weight

        def __getattr__(self, name: str) -> Any: ...

    def load_from_safetensors(self, tensors_path: str | Path, strict: bool = True) -> Self:
        """Load the weights of a safetensors file into this module, and return it.

        A weight of the file's dtype on the CPU takes the memory-mapped tensor over instead of copying it, and one on
        the meta device comes to life on the CPU. Other weights are copied to where they are.

        Args:
            tensors_path: The file.
            strict: Whether missing and unexpected keys are errors. Shapes always have to fit.

        Raises:
            FileFormatError: (a ValueError) The file is truncated, corrupted, or of another format.
            WeightsError: (a RuntimeError) Keys or shapes do not fit. The module is as it was before.
        """
        from refiners.fluxion.layers.loading import adopt_weights
        from refiners.fluxion.utils import load_from_safetensors

        adopt_weights(self, load_from_safetensors(tensors_path), strict=strict, source=str(tensors_path))
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Like `torch.nn.Module.to`; `device` and `dtype` may also be None. Returns the module itself."""
        kept = {key: value for key, value in kwargs.items() if value is not None}
        return super().to(*args, **kept) if args or kept else self

    def basic_attributes(self, init_attrs_only: bool = False) -> dict[str, Any]:
        """The public attributes that are numbers, strings or sequences of them, in the order they were set.

        With `init_attrs_only`: those that are parameters of the constructor and differ from their default.
        """
        attributes = {
            key: value
            for key, value in self.__dict__.items()
            if not key.startswith("_") and key not in _TORCH_ATTRIBUTES and _is_basic(value)
        }
        if not init_attrs_only:
            return attributes
        defaults = _constructor_defaults(type(self))
        return {key: value for key, value in attributes.items() if key in defaults and defaults[key] != value}

    def __str__(self) -> str:
        attributes = ", ".join(f"{key}={value}" for key, value in self.basic_attributes(init_attrs_only=True).items())
        return f"{type(self).__name__}({attributes})"

    def __repr__(self) -> str:
        return self._tree_repr(depth=7)

    def _repr_html_(self) -> str:
        from refiners.fluxion.layers.picture import tree_html

        return tree_html(self)

    def pretty_print(self, depth: int = -1) -> None:
        """Print the tree, cut below `depth` levels unless that is negative; in colour on a terminal."""
        from refiners.fluxion.layers.picture import print_tree

        print_tree(self, depth=depth)

    def get_path(self, parent: "Chain | None" = None, top: "Module | None" = None) -> str:
        """The place of this module in its tree, `Root.Key.Key`: the root's class, then keys.

        Args:
            parent: The Chain that holds this module. Needed for a leaf, which does not know it.
            top: The module where paths begin; the root unless given.

        Raises:
            TreeError: (a ValueError) The module is not a child of that parent.
        """
        if parent is None or self is top:
            return type(self).__name__
        key = parent.key_of(self)
        if key is None:
            if not isinstance(self, ContextModule) or parent is not self.parent:
                raise TreeError(f"{self} is not in {parent}: pass the Chain that holds it directly.")
            return type(self).__name__
        keys = [key]
        module: Chain = parent
        # An adapter may be the parent of what it does not hold: paths begin below it.
        while module is not top and module.parent is not None and (key := module.parent.key_of(module)) is not None:
            keys.append(key)
            module = module.parent
        return ".".join([type(module).__name__, *reversed(keys)])

    def _tree_repr(self, depth: int) -> str:
        tree = ModuleTree(self)
        return tree.generate_tree_repr(tree.root, depth=depth)


class ContextModule(Module):
    """A module that knows its parent, and so the contexts above it."""

    # Class attributes, since attributes of a subclass may be set before `super().__init__()`.
    _parent: "ref[Chain] | None" = None
    _can_refresh_parent = True

    @property
    def parent(self) -> "Chain | None":
        """The Chain that holds this module, or None. A child does not keep its parent alive."""
        parent = self._parent
        return None if parent is None else parent()

    @property
    def ensure_parent(self) -> "Chain":
        """The Chain that holds this module.

        Raises:
            ParentError: (an AssertionError) There is none.
        """
        parent = self.parent
        if parent is None:
            raise ParentError(f"{type(self).__name__} has no parent: put it into a Chain first.")
        return parent

    def get_parents(self) -> "list[Chain]":
        """The Chains above this module, the nearest first."""
        parents: list[Chain] = []
        link = self._parent
        while link is not None and (parent := link()) is not None:
            parents.append(parent)
            link = parent._parent
        return parents

    @property
    def provider(self) -> ContextProvider:
        """The contexts that this module sees: its parent's."""
        return self.ensure_parent.provider

    def use_context(self, context_name: str) -> Context:
        """The live context of that name.

        Raises:
            ContextError: (an AssertionError) No Chain above declares it.
        """
        context = find_context(self._nearest_chain(), context_name)
        if context is None:
            raise ContextError(self._explain_missing_context(context_name))
        return context

    def _nearest_chain(self) -> "Chain | None":
        """Where a search for contexts begins."""
        return self.parent

    def _explain_missing_context(self, name: str) -> str:
        return (
            f'Context "{name}" does not exist, asked for at {self.get_path()}. Declare it in init_context() of a Chain '
            f"above, or call set_context({name!r}, …) on one."
        )

    def get_path(self, parent: "Chain | None" = None, top: Module | None = None) -> str:
        return super().get_path(parent=self.parent if parent is None else parent, top=top)

    @contextmanager
    def no_parent_refresh(self) -> Generator[None]:
        """While it is open, this module may become the child of another Chain without changing its parent."""
        if not self._can_refresh_parent:
            yield
            return
        self.__dict__["_can_refresh_parent"] = False
        try:
            yield
        finally:
            del self.__dict__["_can_refresh_parent"]

    def structural_copy(self: TContextModule) -> TContextModule:
        """A copy of this node that shares its weights, and has no parent yet."""
        clone = object.__new__(type(self))
        for key, value in self.__dict__.items():
            # The containers of torch (hooks, parameters, buffers) are copied; what is in them is shared.
            clone.__dict__[key] = value.copy() if key in _TORCH_ATTRIBUTES and isinstance(value, dict) else value
        for link in _LINKS:
            clone.__dict__.pop(link, None)
        return clone

    def _set_parent(self, parent: "Chain | None") -> None:
        if not self._can_refresh_parent:
            return
        if parent is None:
            self.__dict__.pop("_parent", None)
        else:
            self.__dict__["_parent"] = ref(parent)

    def __getstate__(self) -> dict[str, Any]:
        # The parent is not part of a module: whoever copies or unpickles the parent adopts this module again.
        return {key: value for key, value in self.__dict__.items() if key not in _LINKS}


class WeightedModule(Module):
    """A leaf with a weight. Its first relative in a Chain gives the Chain its device and dtype.

    To torch, `self.weight` is a search that ends in a call of Python. The leaves that a model has by the hundred take
    their weights from `_parameters` instead. Where they are not there, since they are parametrized, pruned or sharded,
    torch's own `forward` runs.
    """

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def __str__(self) -> str:
        attributes = self.basic_attributes(init_attrs_only=True)
        weight = getattr(self, "weight", None)  # a subclass may be printed before it has been built
        if isinstance(weight, torch.Tensor):
            attributes |= {"device": weight.device, "dtype": str(weight.dtype).removeprefix("torch.")}
        return f"{type(self).__name__}({', '.join(f'{key}={value}' for key, value in attributes.items())})"


class FunctionModule(Module):
    """A module that holds functions of its user. It can be copied; it can be pickled unless one is a lambda."""

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name, value in state.items():
            if callable(value) and not isinstance(value, nn.Module):
                self._check_picklable(name, value)
        return state

    def _check_picklable(self, name: str, function: Any) -> None:
        try:
            pickle.dumps(getattr(function, "__func__", function))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise SerializationError(
                f"{self} cannot be pickled, since its {name} is a lambda or a local function. Define it with `def` at "
                "the top of a module, or save the weights alone: torch.save(model.state_dict(), path)."
            ) from error

    def __copy__(self) -> Any:
        clone = object.__new__(type(self))
        clone.__dict__.update(super().__getstate__())
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        state = super().__getstate__()
        clone.__dict__.update({key: deepcopy(value, memo) for key, value in state.items()})
        return clone
