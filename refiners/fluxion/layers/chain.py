"""Chain: a model as a tree of layers.

A Chain calls its children in order, each on what the one before returned; a tuple is spread into several arguments.
The printed tree is the program: there is no other place where a model's computation is written.

The relatives of Chain (Residual, Sum, Parallel…) live in `combinators`, and differ only in what they do with their
children's outputs.
"""

import importlib
from copy import copy
from types import MethodType
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import nn
from torch.compiler import is_compiling, is_dynamo_compiling

from refiners.errors import ChainError as ChainError
from refiners.errors import InputError
from refiners.fluxion.context import Context, ContextProvider, Contexts, find_provider, open_scope
from refiners.fluxion.layers.branch import Branch
from refiners.fluxion.layers.failure import chain_error
from refiners.fluxion.layers.module import ContextModule, FunctionModule, Module, WeightedModule
from refiners.fluxion.layers.observation import PASS_THROUGH, calls_are_observed
from refiners.fluxion.layers.tree import ModuleTree

TChain = TypeVar("TChain", bound="Chain")


class Returned:
    """What `fl.Return` gives its Chain: the Chain ends with this value."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Chain(Branch):
    """Calls its children in order.

    Receives:
        Any number of positional arguments, given to the first child.

    Returns:
        What the last child returns; None without children.

    Raises:
        ChainError: A child failed. The original exception is its cause.

    Example:
        >>> import torch
        >>> import refiners.fluxion.layers as fl
        >>> model = fl.Chain(fl.Linear(4, 8), fl.ReLU(), fl.Linear(8, 1))
        >>> model(torch.zeros(2, 4)).shape
        torch.Size([2, 1])
        >>> model.Linear_2.in_features
        8
    """

    _tag = "CHAIN"
    _provider: ContextProvider | None = None
    # What a subclass makes of (inputs, output) at the end. None rather than a method, since most have none.
    _finish: ClassVar[Any] = None
    # Whether there has to be one input; asked only where there is a `_finish`.
    _takes_one_input: ClassVar[bool] = False
    # Whether an exception that leaves a forward, given one input, tells this input already.
    _explains_failures: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_explains_failures" not in cls.__dict__:
            owner = next(base for base in cls.__mro__ if "forward" in base.__dict__)
            cls._explains_failures = cls._explains_failures and "_explains_failures" in owner.__dict__

    def __init__(self, *modules: Any) -> None:
        super().__init__(*modules)
        if type(self).init_context is not Chain.init_context:
            self._declare_contexts()

    def forward(self, *args: Any) -> Any:
        finish = self._finish
        if finish is not None and self._takes_one_input and len(args) != 1:
            raise InputError(f"{self.get_path()} takes exactly one input, got {len(args)}.")
        provider = self._provider
        if is_dynamo_compiling():
            return _run_children(self, args) if provider is None else self._forward_traced(*args)
        outer = provider.enter() if provider is not None else None
        direct = self._children_are_plain and not calls_are_observed()
        lets_go = direct and self._holds_nodes
        # The inputs are held only for as long as somebody needs them: a tensor may be large.
        x: Any = args[0] if len(args) == 1 and not isinstance(args[0], tuple) else args
        if finish is None:
            args = ()
        layer: Any = None
        try:
            for layer in tuple(self.__dict__["_modules"].values()):
                if (
                    direct
                    and not layer._forward_hooks
                    and not layer._forward_pre_hooks
                    and not layer._backward_hooks
                    and not layer._backward_pre_hooks
                    and layer._compiled_call_impl is None
                ):
                    call = layer.forward
                else:
                    call = layer
                if type(x) is not torch.Tensor and isinstance(x, tuple):
                    x = call(*x)
                elif lets_go and isinstance(layer, Chain) and layer._explains_failures and layer._provider is None:
                    # Held from here as well, its input would outlive its first child.
                    x = call((x, x := None)[0])
                else:
                    x = call(x)
                if type(x) is Returned:
                    x = x.value
                    break
            if layer is None:
                x = None
            layer = None
            return x if finish is None else finish(args, x)
        except PASS_THROUGH:
            raise
        except Exception as error:
            if is_compiling():
                raise
            raise chain_error(self, layer, args if layer is None else x, error) from error
        finally:
            if provider is not None:
                provider.leave(outer)

    def _forward_traced(self, *args: Any) -> Any:
        """The same under torch.compile, which cannot break a graph inside of `try`: only contexts need one."""
        provider = self._provider
        if provider is None:
            return self._run_traced(args)
        outer = provider.enter()
        try:
            return self._run_traced(args)
        finally:
            provider.leave(outer)

    def _run_traced(self, args: tuple[Any, ...]) -> Any:
        return _run_children(self, args)

    # --- contexts ------------------------------------------------------------------------------------------------

    def init_context(self) -> Contexts:
        """The contexts that this Chain declares, `{name: {key: initial value}}`. Override it in a subclass."""
        return {}

    def _declare_contexts(self) -> None:
        provider = ContextProvider(self)
        if provider.values:
            self.__dict__["_provider"] = provider

    @property
    def own_provider(self) -> ContextProvider | None:
        """The contexts this Chain itself holds, or None if it holds none."""
        return self._provider

    @property
    def provider(self) -> ContextProvider:
        """The contexts that this Chain sees: its own and its ancestors'."""
        if self._provider is None:
            self.__dict__["_provider"] = ContextProvider(self)
        assert self._provider is not None
        return self._provider

    def set_context(self, context: str, value: Context) -> None:
        """Set values of a context, seen by all layers below. Its other keys stay.

        Where an ancestor has a context of that name, the values are set there. A key declared in `init_context()`
        keeps its value for one forward; any other until it is set again. All threads see it, unless a
        `context_scope()` is open.
        """
        holder = find_provider(self, context)
        (self.provider if holder is None else holder).set_context(context, value)

    def context_scope(self) -> Any:
        """A context manager: values set inside belong to the current thread or asyncio task, and are dropped after.

        Example:
            >>> import torch
            >>> import refiners.fluxion.layers as fl
            >>> model = fl.Chain(fl.UseContext("sum", "y"), fl.Lambda(lambda y: y + 2))
            >>> with model.context_scope():
            ...     model.set_context("sum", {"y": 4})
            ...     model()
            6
        """
        return open_scope(self)

    def reset_contexts(self) -> None:
        """Put the initial values of everything declared here or below back."""
        for chain in (self, *self.layers(Chain, recurse=True)):
            if chain.own_provider is not None:
                chain.own_provider.reset()

    def _nearest_chain(self) -> "Chain":
        return self

    # --- the tree ------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device | None:
        """The device of the first layer below that has a weight, or None."""
        layer = self._first_weighted()
        return None if layer is None else layer.device

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the first layer below that has a weight, or None."""
        layer = self._first_weighted()
        return None if layer is None else layer.dtype

    def _first_weighted(self) -> WeightedModule | None:
        # What `find(WeightedModule)` gives, in a fraction of the time: a model is asked in each forward.
        waiting: list[Any] = [self]
        while waiting:
            module = waiting.pop()
            if isinstance(module, WeightedModule):
                return module
            if isinstance(module, Branch):
                waiting.extend(reversed(module.__dict__["_modules"].values()))
        return None

    def _show_error_in_tree(self, name: str, /, max_lines: int = 20) -> str:
        # Only direct children are named here; `chain_error` finds a place at any depth.
        tree = ModuleTree(self, lambda _, path: name if path == name and "." not in path else None)
        picture = tree.generate_tree_repr(tree.root, depth=7)
        lines = picture.splitlines()
        index = next((i for i, line in enumerate(lines) if ">>> " in line), 0)
        return tree.shorten_tree_repr(picture, line_index=index, max_lines=max_lines)

    # --- copies --------------------------------------------------------------------------------------------------

    def structural_copy(self: TChain) -> TChain:
        """A copy of this Chain and of every Chain below, which share all leaves and their weights with it.

        The copy can be edited freely. Its contexts restart from their initial values.
        """
        return self._structural_copy(list(self))

    def __copy__(self: TChain) -> TChain:
        # Two nodes cannot be the parent of one child, so a copy that is shallow has nodes of its own all the way down.
        return self.structural_copy()

    def _structural_copy(self: TChain, children: list[nn.Module]) -> TChain:
        copies: dict[int, nn.Module] = {}
        clone = cast(TChain, _copy_tree(self, children, copies))
        for module in clone.modules():
            if isinstance(module, FunctionModule):
                _rebind(module, copies)
        return clone

    def _begin_copy(self: TChain) -> TChain:
        """A copy of this node alone, without children."""
        if hasattr(self, "_pre_structural_copy"):
            self._pre_structural_copy()
        clone = cast(TChain, ContextModule.structural_copy(self))
        clone.__dict__.pop("_provider", None)
        clone.__dict__.pop("_compiled_call_impl", None)  # compiled in place, it would run the original
        clone._replace_all({})
        return clone

    def _end_copy(self, source: "Chain", children: list[nn.Module]) -> None:
        self._set_children(children)
        for child in children:
            self._adopt(child)
        self._declare_contexts()
        if hasattr(self, "_post_structural_copy"):
            self._post_structural_copy(source)

    def __getstate__(self) -> dict[str, Any]:
        _ = self._modules  # names them
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # pyright: ignore[reportUnknownMemberType] (torch does not annotate it)
        self._replace_all(self.__dict__["_modules"])
        for child in self:
            self._adopt(child)
        if self._provider is not None:
            self._provider.rebind(self)


# pyright: reportPrivateUsage=false
def _run_children(chain: Chain, args: tuple[Any, ...]) -> Any:
    # No method, and as few attributes as it can do with: torch.compile guards each that it reads, of each Chain.
    x: Any = args
    layer: Any = None
    for layer in chain.__dict__["_modules"].values():
        x = layer(*x) if isinstance(x, tuple) else layer(x)
        if isinstance(x, Returned):
            x = x.value
            break
    if layer is None:
        x = None
    finish = chain._finish
    return x if finish is None else finish(args, x)


def _copy_tree(root: Chain, children: list[nn.Module], copies: dict[int, nn.Module]) -> nn.Module:
    """Copy a Chain with these children and all nodes below; `copies` gets the copy of each by the id of its source."""
    # A stack of our own: a tree may be deeper than Python's.
    levels = [(root, root._begin_copy(), iter(children), list[nn.Module]())]
    copies[id(root)] = levels[0][1]
    while True:
        source, clone, waiting, done = levels[-1]
        child = next(waiting, None)
        if isinstance(child, Chain) and id(child) not in copies:
            copies[id(child)] = copied = child._begin_copy()
            done.append(copied)
            levels.append((child, copied, iter(child), []))
        elif child is not None:
            done.append(_copy_leaf(child, copies))
        else:
            clone._end_copy(source, done)
            levels.pop()
            if not levels:
                return clone


def _copy_leaf(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in copies:
        if isinstance(module, ContextModule):
            copies[id(module)] = module.structural_copy()
        elif isinstance(module, FunctionModule) and any(isinstance(v, MethodType) for v in module.__dict__.values()):
            copies[id(module)] = copy(module)
    return copies.get(id(module), module)


def _rebind(module: Module, copies: dict[int, nn.Module]) -> None:
    """Bind the methods that a copied layer calls to the copy of their owner."""
    for name, value in list(module.__dict__.items()):
        if isinstance(value, MethodType) and id(value.__self__) in copies:
            module.__dict__[name] = MethodType(value.__func__, copies[id(value.__self__)])


# `refiners.fluxion.layers.chain` also gives the names of the relatives of Chain, which are defined in terms of it.
_RELATIVES = {
    "combinators": ("Parallel", "Distribute", "Passthrough", "Sum", "Residual", "Concatenate", "Matmul"),
    "context_access": ("UseContext", "SetContext"),
    "functions": ("Lambda", "Return", "Breakpoint"),
}


def __getattr__(name: str) -> Any:
    for module, names in _RELATIVES.items():
        if name in names:
            return getattr(importlib.import_module(f"refiners.fluxion.layers.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
