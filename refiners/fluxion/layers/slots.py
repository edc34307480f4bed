"""Slots: where the children of a node are kept, in order at once and named lazily.

An edit in the middle of `n` children would have to rename up to `n` of them (`Linear_7` becomes `Linear_6`), so `n`
edits would take n² steps: names are made anew when somebody asks for one. `_modules`, which PyTorch reads everywhere,
is therefore a property here. Every change of the slots tells the journal how to undo it.
"""

from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, ClassVar, cast
from weakref import getweakrefs, ref

from torch import nn

from refiners.errors import ParentError, TreeError, TreeTypeError
from refiners.fluxion.layers.journal import at_end, note_undo
from refiners.fluxion.layers.module import ContextModule
from refiners.fluxion.layers.observation import MODULE_CALL
from refiners.fluxion.layers.tree import child_names

# Keys of children that have no name yet.
_unnamed = count()
# Up to so many children are named at once.
_FEW = 32


class _Holding(ref[nn.Module]):
    """A branch's hold on a leaf. It dies with the branch, so the leaf's weak references tell who holds it."""

    __slots__ = ("branch",)

    branch: "ref[Slots]"


def holders_of(module: nn.Module) -> "list[Slots]":
    """The branches that have this leaf as a child, in any tree. A node with children knows its parent instead."""
    branches = [holding.branch() for holding in getweakrefs(module) if type(holding) is _Holding]
    return [branch for branch in branches if branch is not None and branch.has_slot_of(module)]


def _is_iterable_of_modules(modules: tuple[Any, ...]) -> bool:
    return (
        len(modules) == 1
        and isinstance(modules[0], Iterable)
        and (not isinstance(modules[0], nn.Module) or isinstance(modules[0], nn.ModuleList))
    )


class Slots(ContextModule):
    """A node that holds others. `Branch` says how they are read and edited."""

    _names_are_stale: ClassVar[bool] = False
    # Whether every child may be called through its `forward`, since none has a `__call__` of its own.
    _children_are_plain: ClassVar[bool] = True
    # Whether any child may hold others.
    _holds_nodes: ClassVar[bool] = False

    def __init__(self, *modules: Any) -> None:
        super().__init__()
        children: tuple[Any, ...] = tuple(modules[0]) if _is_iterable_of_modules(modules) else modules
        for i, module in enumerate(children):
            if isinstance(module, ContextModule):
                if module._can_refresh_parent and module.parent is not None:
                    raise ParentError(
                        f"{type(module).__name__} already has parent {type(module.parent).__name__}, so it cannot be a "
                        f"child of a new {type(self).__name__}. Remove it first, or append it: append moves it."
                    )
            elif not isinstance(module, nn.Module):
                raise TreeTypeError(
                    f"{type(self).__name__} takes modules, got {type(module).__name__} at position {i}. "
                    "Wrap a function in fl.Lambda."
                )
        own = self.__dict__
        own["_modules"], own["_holdings"] = dict(zip(child_names(children), children, strict=True)), {}
        # Nothing to undo if a transaction fails: nobody but the transaction has this node, and children do not keep it.
        for module in children:
            self._hold(module)
            if isinstance(module, ContextModule):
                module._set_parent(cast(Any, self))
            elif module.__dict__.get("_modules"):
                for node in _nodes_inside(module):
                    if node.parent is None:
                        node._set_parent(cast(Any, self))

    @property
    def _modules(self) -> dict[str, nn.Module]:  # pyright: ignore[reportIncompatibleVariableOverride] (lazy)
        if self._names_are_stale:
            self._name_children()
        return self.__dict__["_modules"]

    @_modules.setter
    def _modules(self, modules: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride] (lazy)
        self.__dict__["_modules"] = modules

    def _name_children(self) -> None:
        modules = list(self.__dict__["_modules"].values())
        self.__dict__["_modules"] = dict(zip(child_names(modules), modules, strict=True))
        self.__dict__.pop("_keys", None)
        self.__dict__.pop("_names_are_stale", None)

    def _rename_later(self) -> None:
        if self._names_are_stale:
            return
        self.__dict__["_names_are_stale"] = True
        # Few children are named after the edit: torch.compile knows a compiled model again by its names.
        if len(self.__dict__["_modules"]) <= _FEW:
            at_end(self._name_if_stale)

    def _name_if_stale(self) -> None:
        if self._names_are_stale:
            self._name_children()

    def _replace_all(self, modules: dict[str, nn.Module]) -> None:
        self.__dict__["_modules"] = modules
        self.__dict__.pop("_keys", None)
        self.__dict__["_holdings"] = {}
        for module in modules.values():
            self._hold(module)

    def _hold(self, module: nn.Module) -> None:
        own = self.__dict__
        if type(module).__call__ is not MODULE_CALL:
            own["_children_are_plain"] = False
        if isinstance(module, ContextModule):
            if isinstance(module, Slots):
                own["_holds_nodes"] = True
        elif id(module) not in own["_holdings"]:
            holding = own["_holdings"][id(module)] = _Holding(module)
            holding.branch = ref(self)

    def has_slot_of(self, module: nn.Module) -> bool:
        """Whether the module is a child."""
        return self._slot_of(module) is not None

    def _slot_of(self, module: nn.Module) -> str | None:
        """The current key of a child, found by identity in constant time, or None."""
        modules: dict[str, nn.Module] = self.__dict__["_modules"]
        keys: dict[int, str] | None = self.__dict__.get("_keys")
        if keys is None:
            # Reversed, so that a child that occurs twice is found at its first place.
            keys = self.__dict__["_keys"] = {id(child): key for key, child in reversed(modules.items())}
        key = keys.get(id(module))
        return key if key is not None and modules.get(key) is module else None

    # --- changes: each can undo itself ----------------------------------------------------------------------------

    def _adopt(self, module: nn.Module) -> None:
        if isinstance(module, ContextModule):
            _give_parent(module, self)
        else:
            for inner in _nodes_inside(module):
                if inner.parent is None:
                    _give_parent(inner, self)

    def _disown(self, module: nn.Module) -> None:
        if self._slot_of(module) is None:
            for node in [module] if isinstance(module, ContextModule) else _nodes_inside(module):
                if node.parent is self:
                    _give_parent(node, None)

    def _swap(self, key: str, module: nn.Module) -> nn.Module:
        """Put a module in the place of the child at `key`."""
        modules: dict[str, nn.Module] = self.__dict__["_modules"]
        old = modules[key]
        # Before it is done, here and in all changes: so nothing can fail in between.
        note_undo(lambda: self._restore(lambda children: [old if child is module else child for child in children]))
        modules[key] = module
        keys: dict[int, str] | None = self.__dict__.get("_keys")
        is_gone = False
        if keys is not None:
            if len(keys) < len(modules) or id(module) in keys:  # a child occurs twice
                del self.__dict__["_keys"]
            else:
                del keys[id(old)]
                keys[id(module)] = key
                is_gone = True
        self._hold(module)
        if is_gone or self._slot_of(old) is None:
            self.__dict__["_holdings"].pop(id(old), None)
        if type(old).__name__ != type(module).__name__:
            self._rename_later()
        return old

    def replace_everywhere(self, old_module: nn.Module, new_module: nn.Module) -> None:
        """Put a module in all places of a child. Changes no parent, unlike `replace`."""
        key = self._slot_of(old_module)
        while key is not None:
            self._swap(key, new_module)
            key = self._slot_of(old_module)

    def _set_children(self, children: list[nn.Module]) -> None:
        before = list(self.__dict__["_modules"].values())
        note_undo(lambda: self._restore(lambda _: before))
        self._replace_all({f"+{next(_unnamed)}": child for child in children})
        self._rename_later()

    def _restore(self, change: Callable[[list[nn.Module]], list[nn.Module]]) -> None:
        children = change(list(self.__dict__["_modules"].values()))
        self._replace_all(dict(zip(child_names(children), children, strict=True)))
        self.__dict__.pop("_names_are_stale", None)

    def _check_new_child(self, module: Any) -> None:
        if not isinstance(module, nn.Module):
            raise TreeTypeError(f"{type(self).__name__} takes modules, got {type(module).__name__}.")
        lineage = [self, *self.get_parents()]
        # A module of another kind does not tell its parents who they are, so it is searched.
        inside = [module] if isinstance(module, Slots) else list(module.modules())
        if any(node is parent for node in inside for parent in lineage):
            raise TreeError(
                f"{type(module).__name__} holds {type(self).__name__}: putting it inside would make a cycle."
            )

    def _leave_old_parent(self, module: nn.Module) -> None:
        if isinstance(module, ContextModule) and module._can_refresh_parent:
            parent = module.parent
            if parent is not None and parent is not self and parent._slot_of(module) is not None:
                parent.remove(module)

    def _insert_between(self, position: int, module: nn.Module) -> None:
        items = list(self.__dict__["_modules"].items())
        before = [child for _, child in items]
        items.insert(position, (f"+{next(_unnamed)}", module))
        note_undo(lambda: self._restore(lambda _: before))
        self.__dict__["_modules"] = dict(items)
        self.__dict__.pop("_keys", None)
        self._hold(module)
        self._rename_later()

    def _append(self, module: nn.Module) -> None:
        modules: dict[str, nn.Module] = self.__dict__["_modules"]
        key = f"+{next(_unnamed)}"
        count = len(modules)
        note_undo(lambda: self._restore(lambda children: children[:count]))
        modules[key] = module
        keys: dict[int, str] | None = self.__dict__.get("_keys")
        if keys is not None:
            keys.setdefault(id(module), key)
        self._hold(module)
        self._rename_later()

    def _take_out(self, key: str, index: int) -> nn.Module:
        modules: dict[str, nn.Module] = self.__dict__["_modules"]
        module, count = modules[key], len(modules)

        def put_back(children: list[nn.Module]) -> list[nn.Module]:
            return children if len(children) == count else [*children[:index], module, *children[index:]]

        note_undo(lambda: self._restore(put_back))
        del modules[key]
        keys: dict[int, str] | None = self.__dict__.get("_keys")
        if keys is not None:
            if len(keys) > len(modules):
                del keys[id(module)]
            else:  # a child occurs twice
                del self.__dict__["_keys"]
        if self._slot_of(module) is None:
            self.__dict__["_holdings"].pop(id(module), None)
        self._rename_later()
        self._disown(module)
        return module


def _nodes_inside(module: nn.Module) -> list[ContextModule]:
    """The nodes that a module of another kind holds: they see the contexts of the Chain it is in."""
    nodes: list[ContextModule] = []
    # Most have no children, and `children()` takes its time to say so.
    waiting = list(module.children()) if module.__dict__.get("_modules") else []
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, ContextModule):
            nodes.append(inner)
        else:
            waiting.extend(inner.children())
    return nodes


def _give_parent(module: ContextModule, parent: Slots | None) -> None:
    before = module._parent  # pyright: ignore[reportPrivateUsage] (the slots are what parents are made of)
    note_undo(lambda: _restore_parent(module, before))
    module._set_parent(cast(Any, parent))  # pyright: ignore[reportPrivateUsage] (as above)


def _restore_parent(module: ContextModule, parent: Any) -> None:
    if parent is None:
        module.__dict__.pop("_parent", None)
    else:
        module.__dict__["_parent"] = parent
