"""Reversible edits of a model that has its weights: what a planted fault is made of.

An edit is a function that does something to the tree and returns the function that undoes it. No edit copies a weight
or renames a key: the spoilt model reads the very storages it read before, so only what it computes can tell.

A node is spoilt by exchanging its class for a subclass of the same name. Copies of the tree that share its leaves
(slices, `structural_copy()`) are spoilt with it, tests with `isinstance` still hold, and the path of the node stays.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast
from weakref import ref

from torch import nn

from refiners.errors import ParityError
from refiners.fluxion.layers.branch import Branch
from refiners.parity.modules import named_modules

Undo = Callable[[], None]
Edit = Callable[[], Undo]
Forward = Callable[..., Any]
"""Called with the original forward, then with what the node was called with."""

_CACHES = frozenset({"_keys", "_holdings", "_modules", "_names_are_stale", "_parameters", "_buffers", "_provider"})
_REFERENCE: Any = ref
_VALUES = (bool, int, float, str, type(None), tuple)


def with_members(module: nn.Module, **members: Any) -> Edit:
    """The node is an instance of a subclass with these members."""

    def edit() -> Undo:
        kind = type(module)
        spoilt = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__, **members})
        object.__setattr__(module, "__class__", spoilt)
        return lambda: object.__setattr__(module, "__class__", kind)

    return edit


def with_forward(module: nn.Module, forward: Forward) -> Edit:
    """The node's forward is another function, which gets the original one as its first argument."""
    kind: Any = type(module)

    def spoilt(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(partial(kind.forward, self), *args, **kwargs)

    return with_members(module, forward=spoilt)


def with_attribute(module: nn.Module, name: str, value: Any) -> Edit:
    """An attribute of the node has another value."""

    def edit() -> Undo:
        before, held = getattr(module, name), dict(module.__dict__)
        setattr(module, name, value)
        changed = [key for key, own in module.__dict__.items() if key not in held or held[key] is not own]

        def undo() -> None:
            setattr(module, name, before)
            for key in changed:  # what was made of it as well, as a tensor is
                if key in held:
                    module.__dict__[key] = held[key]
                else:
                    module.__dict__.pop(key, None)

        return undo

    return edit


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """The parameters that a node itself holds, None among them: not a copy."""
    return module.__dict__["_parameters"]


def with_exchanged_parameters(one: nn.Module, other: nn.Module) -> Edit:
    """Two nodes hold each other's parameters."""

    def exchange() -> None:
        first, second = own_parameters(one), own_parameters(other)
        for name in list(first):
            first[name], second[name] = second[name], first[name]

    def edit() -> Undo:
        exchange()
        return exchange

    return edit


def with_exchanged_children(parent: nn.Module, first: int, second: int) -> Edit:
    """Two children of a Chain or an `nn.Sequential` stand in each other's place."""
    low, high = sorted((first, second))

    def exchange() -> None:
        if isinstance(parent, Branch):
            upper, lower = parent.pop(high), parent.pop(low)
            parent.insert(low, upper)
            parent.insert(high, lower)
        else:
            chain = cast(nn.Sequential, parent)
            chain[low], chain[high] = chain[high], chain[low]

    def edit() -> Undo:
        exchange()
        return exchange

    return edit


@dataclass(frozen=True)
class _Node:
    path: str
    module: nn.Module
    kind: type
    attributes: dict[str, Any]
    tensors: dict[str, tuple[Any, int]]
    """Parameters and buffers, None among them, and how often each was written to."""


class Snapshot:
    """What a model is made of: its nodes and their classes, their order, their attributes, their very weights.

    Receives:
        model: looked at now; it is kept alive, not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._nodes = list(_nodes(model))
        self._restless: frozenset[str] = frozenset()

    def settle(self) -> None:
        """Whatever differs now is a state that every forward leaves behind: it is no difference from now on."""
        self._restless = frozenset(self._all_differences())

    def differences(self) -> Iterator[str]:
        """What has changed since, a path and what is different there each."""
        return (told for told in self._all_differences() if told not in self._restless)

    def _all_differences(self) -> Iterator[str]:
        now = list(_nodes(self.model))
        if [(node.path, id(node.module)) for node in now] != [(node.path, id(node.module)) for node in self._nodes]:
            yield "the nodes are not the same, or stand in another order"
            return
        for before, after in zip(self._nodes, now, strict=True):
            for what in _changes(before, after):
                yield f"{after.path or 'the model'}: {what}"

    def require_unchanged(self, after: str) -> None:
        """Makes sure that the model is what it was.

        Raises:
            ParityError: something is different; the message lists it.
        """
        changed = list(islice(self.differences(), 5))
        if changed:
            raise ParityError(f"Undoing {after} did not restore the model: {'; '.join(changed)}.")


def _nodes(model: nn.Module) -> Iterator[_Node]:
    for path, module in named_modules(model, every_name=True):
        held: list[dict[str, Any]] = [module.__dict__["_parameters"], module.__dict__["_buffers"]]
        tensors = {
            name: (tensor, 0 if tensor is None else int(tensor._version))
            for one in held
            for name, tensor in one.items()
        }
        attributes = {key: value for key, value in module.__dict__.items() if key not in _CACHES}
        yield _Node(path, module, type(module), attributes, tensors)


def _changes(before: _Node, after: _Node) -> Iterator[str]:
    if before.kind is not after.kind:
        yield "another class"
    if before.attributes.keys() != after.attributes.keys():
        yield "other attributes"
    else:
        for name, value in before.attributes.items():
            if not _is_same(value, after.attributes[name]):
                yield f"another `{name}`"
    if before.tensors.keys() != after.tensors.keys():
        yield "other weights"
    else:
        for name, (tensor, version) in before.tensors.items():
            if after.tensors[name][0] is not tensor:
                yield f"`{name}` is another tensor"
            elif after.tensors[name][1] != version:
                yield f"`{name}` was written to"


def _is_same(before: Any, after: Any) -> bool:
    if before is after:
        return True
    if isinstance(before, _REFERENCE) and isinstance(after, _REFERENCE):
        return before() is after()
    return type(before) is type(after) and isinstance(before, _VALUES) and bool(before == after)
