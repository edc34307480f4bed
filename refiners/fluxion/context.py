"""Context: a store scoped to a Chain and to everything nested in it.

A Chain declares contexts in `init_context()`, or is given some with `set_context()`. Any layer below reads and
writes them by name, so that data reaches deep layers without passing through every one.

Nothing is copied down the tree: each Chain that has contexts owns one `ContextProvider`, and a reader climbs from
parent to parent. The topmost provider that holds a key answers for it, so everybody below reads the same value.

Three places can hold a value; a reader takes the first that has it:

1. the *frame* of a running forward. When the Chain that owns a provider is called, its values move into a frame that
   belongs to this call and thread alone, and is dropped when the call returns or raises;
2. the *scope* of the current thread or asyncio task (`with model.context_scope():`);
3. the provider itself, shared by all threads.
"""
# pyright: reportPrivateUsage=false

import threading
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable
from weakref import ref

import torch
from torch.utils._pytree import tree_leaves  # pyright: ignore[reportUnknownVariableType] (torch has no stubs here)

from refiners.fluxion.context_values import Context, Contexts, SplitContext, Store


@runtime_checkable
class ContextOwner(Protocol):
    """What a provider needs to know of the Chain that owns it.

    Every access to a context climbs the tree, so this file reads both links as attributes, past the properties that
    are there for others.
    """

    _parent: "ref[Any] | None"
    _provider: "ContextProvider | None"

    def init_context(self) -> Contexts: ...


class _Running(threading.local):
    """What the current thread is running."""

    def __init__(self) -> None:
        self.frames: dict[ContextProvider, Contexts] = {}
        # torch.compile cannot trace a ContextVar, but reads this copy of it. It is right as long as no asyncio task
        # of this thread has a scope of its own, which `task_scopes` counts.
        self.scope: ContextScope | None = None
        self.task_scopes = 0


_running = _Running()
_scope: ContextVar["ContextScope | None"] = ContextVar("refiners.context_scope", default=None)


class ContextProvider:
    """Holds the contexts that one Chain declares or was given.

    `contexts`, `get_context` and `set_context` see what the owning Chain sees: its own contexts and its ancestors'.
    """

    def __init__(self, owner: ContextOwner | None = None) -> None:
        self._owner = None if owner is None else ref(owner)
        self._store = Store({})
        self._lock = threading.Lock()
        if owner is not None:
            self._store.declare(owner.init_context())

    @staticmethod
    def create(contexts: Contexts) -> "ContextProvider":
        """A provider of its own, with these contexts."""
        provider = ContextProvider()
        provider.update_contexts(contexts)
        return provider

    @property
    def owner(self) -> ContextOwner | None:
        return None if self._owner is None else self._owner()

    @property
    def contexts(self) -> Contexts:
        """All contexts visible here, by name. The inner dicts are the live ones."""
        names = dict.fromkeys(self.values)
        for provider in self._ancestors():
            names |= dict.fromkeys(provider.values)
        return {name: context for name in names if (context := self.get_context(name)) is not None}

    def get_context(self, key: str) -> Any:
        """The live context of that name, or None."""
        return _merge(self._lineage(), key)

    def set_context(self, key: str, value: Any) -> None:
        """Set these keys of the context of that name; its other keys stay."""
        self.update_contexts({key: value})

    def update_contexts(self, new_contexts: Contexts) -> None:
        """Set the given keys of each given context, where the context lives: in the topmost ancestor that has it."""
        for name, context in new_contexts.items():
            holder = self
            for provider in self._lineage():
                if name in provider.values:
                    holder = provider
            holder._writable().setdefault(name, {}).update(context)

    def remove_context(self, key: str) -> None:
        """Forget the context of that name, as far as this provider itself holds one."""
        self._writable().pop(key, None)

    @property
    def values(self) -> Contexts:
        """What this provider itself holds for the current call, scope or thread."""
        frame = _running.frames.get(self)
        if frame is not None:
            return frame
        scope = _current_scope()
        if scope is not None:
            store = scope.store_of(self)
            if store is not None:
                return store.values
        return self._store.values

    def write_from_below(self, name: str, key: str, value: Any) -> None:
        """What a SetContext does: into the running call, else kept until the owner runs."""
        frame = _running.frames.get(self)
        if frame is not None:
            frame[name][key] = value
        else:
            self._writable_store().write_from_below(name, key, value)

    def enter(self) -> Contexts | None:
        """Begin a call of the owner: its values belong to this call from now on."""
        frames = _running.frames
        previous = frames.get(self)
        initial = self._initial()
        if torch.compiler.is_dynamo_compiling():
            frames[self] = self._writable_store().take(initial)
        else:
            with self._lock:
                frames[self] = self._writable_store().take(initial)
        return previous

    def leave(self, previous: Contexts | None) -> None:
        """End the call of the owner that `enter` began."""
        if previous is None:
            del _running.frames[self]
        else:
            _running.frames[self] = previous

    def reset(self) -> None:
        """Put the initial values of all declared keys back."""
        self._writable_store().take(self._initial())

    def rebind(self, owner: ContextOwner) -> None:
        """Give a copied or unpickled provider its new owner."""
        self._owner = ref(owner)

    def snapshot(self, store: Store | None = None) -> Store:
        """A copy of the shared values, or of those of an outer scope, for a new scope."""
        return (store or self._store).snapshot(self._initial())

    def _initial(self) -> Contexts:
        owner = self.owner
        return {} if owner is None else owner.init_context()

    def _lineage(self) -> "list[ContextProvider]":
        return [self, *self._ancestors()]

    def _ancestors(self) -> "list[ContextProvider]":
        owner = self.owner
        return [] if owner is None or owner._parent is None else providers_of(owner._parent())

    def _writable_store(self) -> Store:
        scope = _current_scope()
        store = None if scope is None else scope.store_of(self, create=True)
        return self._store if store is None else store

    def _writable(self) -> Contexts:
        frame = _running.frames.get(self)
        return self._writable_store().values if frame is None else frame

    def __getstate__(self) -> Contexts:
        return self._store.values

    def __setstate__(self, values: Contexts) -> None:
        self.__init__()
        self._store.values.update(values)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ContextProvider":
        # torch refuses to copy a tensor that is a result of autograd: the copy holds its value.
        for tensor in tree_leaves(self._store.values):
            if isinstance(tensor, torch.Tensor) and not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
        copied = ContextProvider()
        copied._store.values.update(deepcopy(self._store.values, memo))
        return copied

    def __repr__(self) -> str:
        contexts = {
            name: {key: _summary(value) for key, value in context.items()} for name, context in self.contexts.items()
        }
        return f"{type(self).__name__}(contexts={contexts})"


class ContextScope:
    """Values that only the current thread or asyncio task sees, for one tree."""

    def __init__(self, root: object, outer: "ContextScope | None") -> None:
        self.root = root
        self.outer = outer
        self._stores: dict[ContextProvider, Store] = {}
        if outer is not None and outer.root is root:
            self._stores |= {provider: provider.snapshot(store) for provider, store in outer._stores.items()}

    def hold(self, values: dict[ContextProvider, Contexts]) -> None:
        """Give providers other values inside of this scope."""
        self._stores |= {provider: Store(contexts) for provider, contexts in values.items()}

    def store_of(self, provider: ContextProvider, create: bool = False) -> Store | None:
        store = self._stores.get(provider)
        if store is not None:
            return store
        if root_of(provider.owner) is not self.root:
            return None if self.outer is None else self.outer.store_of(provider, create)
        if not create:
            return None
        store = self._stores[provider] = provider.snapshot()
        return store


def running_frames() -> dict[ContextProvider, Contexts]:
    """The values of the calls that the current thread is in."""
    return _running.frames


@contextmanager
def open_scope(
    chain: ContextOwner,
    held: dict[ContextProvider, Contexts] | None = None,
    frames: dict[ContextProvider, Contexts] | None = None,
) -> Generator[None]:
    """Give the current thread or asyncio task its own context values for the tree that holds `chain`.

    Args:
        chain: Any Chain of the tree.
        held: The values that some providers have in the scope at first.
        frames: The calls that the thread seems to be in meanwhile, and their values; those it is in unless given.
    """
    scope = ContextScope(root_of(chain), _scope.get())
    scope.hold(held or {})
    running = _running.frames
    in_task = _in_asyncio_task()
    token = _scope.set(scope)
    mirrored = _running.scope
    if in_task:
        _running.task_scopes += 1
    else:
        _running.scope = scope
    try:
        if frames is not None:
            _running.frames = frames
        yield
    finally:
        _running.frames = running
        _scope.reset(token)
        if in_task:
            _running.task_scopes -= 1
        else:
            _running.scope = mirrored


def providers_of(chain: ContextOwner | None) -> list[ContextProvider]:
    """The providers of a Chain and of its ancestors, the nearest first."""
    providers: list[ContextProvider] = []
    while chain is not None:
        if chain._provider is not None:
            providers.append(chain._provider)
        chain = None if chain._parent is None else chain._parent()
    return providers


def find_context(chain: ContextOwner | None, name: str) -> Context | None:
    """The live context of that name as seen from a Chain, or None."""
    return _merge(providers_of(chain), name)


def _merge(providers: list[ContextProvider], name: str) -> Context | None:
    top: Context | None = None
    others: list[Context] = []
    frames = _running.frames
    for provider in providers:
        values = frames.get(provider)
        if values is None:
            values = provider.values
        if name in values:
            if top is not None:
                others.append(top)
            top = values[name]
    if top is not None and others and any(key not in top for context in others for key in context):
        return SplitContext([*others, top])
    return top


def find_place(chain: ContextOwner | None, name: str, key: str | None) -> tuple[ContextProvider, Context] | None:
    """The topmost provider that holds this key of the context, else the topmost that holds the context at all.

    Also the live context in it; None where nobody has one of that name.
    """
    place: tuple[ContextProvider, Context] | None = None
    has_key = False
    frames = _running.frames
    while chain is not None:
        provider = chain._provider
        if provider is not None:
            values = frames.get(provider)
            if values is None:
                values = provider.values
            if name in values:
                context = values[name]
                if key in context:
                    has_key = True
                    place = (provider, context)
                elif not has_key:
                    place = (provider, context)
        chain = None if chain._parent is None else chain._parent()
    return place


def find_provider(chain: ContextOwner | None, name: str) -> ContextProvider | None:
    """The topmost provider that holds the context of that name."""
    place = find_place(chain, name, None)
    return None if place is None else place[0]


def root_of(chain: ContextOwner | None) -> ContextOwner | None:
    """The topmost ancestor."""
    while chain is not None:
        parent = None if chain._parent is None else chain._parent()
        if parent is None:
            return chain
        chain = parent
    return None


def _current_scope() -> ContextScope | None:
    if torch.compiler.is_dynamo_compiling() and not _running.task_scopes:
        return _running.scope
    return _scope.get()


def _in_asyncio_task() -> bool:
    import asyncio

    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False


def _summary(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return f"Tensor(shape={tuple(value.shape)}, dtype={value.dtype}, device={value.device})"
    if isinstance(value, list | tuple):
        return [_summary(item) for item in value]  # pyright: ignore[reportUnknownVariableType] (any value may be stored)
    return value
