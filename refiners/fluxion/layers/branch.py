"""Branches: the nodes that hold others, and how a tree is read and edited.

The children of a branch are kept in order at once, and named lazily. An edit in the middle of `n` children would have
to rename up to `n` of them (`Linear_7` becomes `Linear_6`), so `n` edits would take n² steps: names are made anew when
somebody asks for one. `_modules`, which PyTorch reads everywhere, is therefore a property here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any, ClassVar, TypeVar, cast, get_origin, overload
from weakref import getweakrefs, ref

from torch import nn

from refiners.errors import NotFoundError, ParentError, TreeError, TreeIndexError, TreeKeyError, TreeTypeError
from refiners.fluxion.layers.journal import note_undo
from refiners.fluxion.layers.module import ContextModule
from refiners.fluxion.layers.observation import MODULE_CALL
from refiners.fluxion.layers.tree import child_names

T = TypeVar("T", bound=nn.Module)
TBranch = TypeVar("TBranch", bound="Branch")
Predicate = Callable[[nn.Module, Any], bool]

# Keys of children that have no name yet.
_unnamed = count()
_FEW = 32


class _Holding(ref[nn.Module]):
    """A branch's hold on a leaf. It dies with the branch, so the leaf's weak references tell who holds it."""

    __slots__ = ("branch",)

    branch: "ref[Branch]"


def holders_of(module: nn.Module) -> "list[Branch]":
    """The branches that have this leaf as a child, in any tree. A node with children knows its parent instead."""
    branches = [holding.branch() for holding in getweakrefs(module) if isinstance(holding, _Holding)]
    return [branch for branch in branches if branch is not None and module in branch]


def _is_iterable_of_modules(modules: tuple[Any, ...]) -> bool:
    return (
        len(modules) == 1
        and isinstance(modules[0], Iterable)
        and (not isinstance(modules[0], nn.Module) or isinstance(modules[0], nn.ModuleList))
    )


class Branch(ContextModule):
    """A node with children. `Chain` says what is done with them."""

    _names_are_stale: ClassVar[bool] = False
    # Whether every child may be called through its `forward`, since none has a `__call__` of its own.
    _children_are_plain: ClassVar[bool] = True

    def __init__(self, *modules: Any) -> None:
        super().__init__()
        children: tuple[Any, ...] = tuple(modules[0]) if _is_iterable_of_modules(modules) else modules
        for i, module in enumerate(children):
            if not isinstance(module, nn.Module):
                raise TreeTypeError(
                    f"{type(self).__name__} takes modules, got {type(module).__name__} at position {i}. "
                    "Wrap a function in fl.Lambda."
                )
            if isinstance(module, ContextModule) and module._can_refresh_parent and module.parent is not None:
                raise ParentError(
                    f"{type(module).__name__} already has parent {type(module.parent).__name__}, so it cannot be a "
                    f"child of a new {type(self).__name__}. Remove it first, or append it: append moves it."
                )
        self._replace_all(dict(zip(child_names(children), children, strict=True)))
        for module in children:
            self._adopt(module)

    # --- names ---------------------------------------------------------------------------------------------------

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
        # Few children are named at once: torch.compile knows a compiled model again by its names.
        if len(self) <= _FEW:
            self._name_children()
        else:
            self.__dict__["_names_are_stale"] = True

    def _replace_all(self, modules: dict[str, nn.Module]) -> None:
        self.__dict__["_modules"] = modules
        self.__dict__.pop("_keys", None)
        self.__dict__["_holdings"] = {}
        for module in modules.values():
            self._hold(module)

    def _hold(self, module: nn.Module) -> None:
        holdings: dict[int, _Holding] = self.__dict__["_holdings"]
        if type(module).__call__ is not MODULE_CALL:
            self.__dict__["_children_are_plain"] = False
        if not isinstance(module, ContextModule) and id(module) not in holdings:
            holding = holdings[id(module)] = _Holding(module)
            holding.branch = ref(self)

    def _slot_of(self, module: nn.Module) -> str | None:
        """The current key of a child, found by identity in constant time, or None."""
        modules: dict[str, nn.Module] = self.__dict__["_modules"]
        keys: dict[int, str] | None = self.__dict__.get("_keys")
        if keys is None:
            # Reversed, so that a child that occurs twice is found at its first place.
            keys = self.__dict__["_keys"] = {id(child): key for key, child in reversed(modules.items())}
        key = keys.get(id(module))
        return key if key is not None and modules.get(key) is module else None

    # --- primitive edits: each can undo itself -------------------------------------------------------------------

    def _adopt(self, module: nn.Module) -> None:
        if isinstance(module, ContextModule):
            before = module._parent
            module._set_parent(cast(Any, self))
            note_undo(lambda: _restore_parent(module, before))

    def _disown(self, module: nn.Module) -> None:
        if isinstance(module, ContextModule) and module.parent is self and self._slot_of(module) is None:
            before = module._parent
            module._set_parent(None)
            note_undo(lambda: _restore_parent(module, before))

    def _swap(self, key: str, module: nn.Module) -> nn.Module:
        """Put a module in the place of the child at `key`."""
        modules: dict[str, nn.Module] = self.__dict__["_modules"]
        old = modules[key]
        modules[key] = module
        keys: dict[int, str] | None = self.__dict__.get("_keys")
        if keys is not None:
            if len(keys) < len(modules) or id(module) in keys:  # a child occurs twice
                del self.__dict__["_keys"]
            else:
                del keys[id(old)]
                keys[id(module)] = key
        self._hold(module)
        if self._slot_of(old) is None:
            self.__dict__["_holdings"].pop(id(old), None)
        if type(old).__name__ != type(module).__name__:
            self._rename_later()
        note_undo(lambda: self._restore(lambda children: [old if child is module else child for child in children]))
        return old

    def replace_everywhere(self, old_module: nn.Module, new_module: nn.Module) -> None:
        """Put a module in all places of a child. Changes no parent, unlike `replace`."""
        key = self._slot_of(old_module)
        while key is not None:
            self._swap(key, new_module)
            key = self._slot_of(old_module)

    def _set_children(self, children: list[nn.Module]) -> None:
        before = list(self.__dict__["_modules"].values())
        self._replace_all({f"+{next(_unnamed)}": child for child in children})
        self._rename_later()
        note_undo(lambda: self._restore(lambda _: before))

    def _restore(self, change: Callable[[list[nn.Module]], list[nn.Module]]) -> None:
        children = change(list(self.__dict__["_modules"].values()))
        self._replace_all(dict(zip(child_names(children), children, strict=True)))
        self.__dict__.pop("_names_are_stale", None)

    def _check_new_child(self, module: Any) -> None:
        if not isinstance(module, nn.Module):
            raise TreeTypeError(f"{type(self).__name__} takes modules, got {type(module).__name__}.")
        lineage = [self, *self.get_parents()]
        # A module of another kind does not tell its parents who they are, so it is searched.
        inside = [module] if isinstance(module, Branch) else list(module.modules())
        if any(node is parent for node in inside for parent in lineage):
            raise TreeError(
                f"{type(module).__name__} holds {type(self).__name__}: putting it inside would make a cycle."
            )

    def _leave_old_parent(self, module: nn.Module) -> None:
        if isinstance(module, ContextModule) and module._can_refresh_parent:
            parent = module.parent
            if parent is not None and parent is not self and parent._slot_of(module) is not None:
                parent.remove(module)

    # --- edits ---------------------------------------------------------------------------------------------------

    def insert(self, index: int, module: nn.Module) -> None:
        """Insert a child before the one at `index`. -1 appends, -2 inserts before the last, and so on.

        A module that lives in another Chain moves: it leaves that one.

        Raises:
            TreeError: (a ValueError) The module holds this Chain.
        """
        self._check_new_child(module)
        self._leave_old_parent(module)
        modules: dict[str, nn.Module] = self.__dict__["_modules"]
        position = index if index >= 0 else max(0, len(modules) + index + 1)
        if position >= len(modules):
            self._append(module)
        else:
            children = list(modules.values())
            children.insert(position, module)
            self._set_children(children)
        self._adopt(module)

    def _append(self, module: nn.Module) -> None:
        modules: dict[str, nn.Module] = self.__dict__["_modules"]
        key = f"+{next(_unnamed)}"
        modules[key] = module
        keys: dict[int, str] | None = self.__dict__.get("_keys")
        if keys is not None:
            keys.setdefault(id(module), key)
        self._hold(module)
        self._rename_later()
        note_undo(lambda: self._restore(lambda children: children[:-1]))

    def append(self, module: nn.Module) -> None:
        """Add a child at the end. A module that lives in another Chain moves."""
        self.insert(-1, module)

    def insert_before_type(self, module_type: type[nn.Module], new_module: nn.Module) -> None:
        """Insert a child before the first child of that type.

        Raises:
            TreeError: (a ValueError) No child is of that type.
        """
        self.insert(self._position_of_type(module_type), new_module)

    def insert_after_type(self, module_type: type[nn.Module], new_module: nn.Module) -> None:
        """Insert a child after the first child of that type.

        Raises:
            TreeError: (a ValueError) No child is of that type.
        """
        self.insert(self._position_of_type(module_type) + 1, new_module)

    def _position_of_type(self, module_type: type[nn.Module]) -> int:
        for i, module in enumerate(self):
            if isinstance(module, module_type):
                return i
        raise TreeError(f"No {module_type.__name__} is a child of {self}. Its children: {', '.join(self._modules)}.")

    def pop(self, index: int = -1) -> nn.Module:
        """Take the child at that position out of the tree, and return it.

        Raises:
            TreeIndexError: (an IndexError) There is no such position.
        """
        children: list[nn.Module] = list(self.__dict__["_modules"].values())
        if not -len(children) <= index < len(children):
            raise TreeIndexError(f"Index out of range. {self} has {len(children)} children, asked for {index}.")
        module = children.pop(index)
        self._set_children(children)
        self._disown(module)
        return module

    def remove(self, module: nn.Module) -> None:
        """Take a child out of the tree.

        Raises:
            TreeError: (a ValueError) The module is not a child.
        """
        for i, child in enumerate(self):
            if child is module:
                self.pop(i)
                return
        raise TreeError(f"{module} is not in {self}.")

    def replace(self, old_module: nn.Module, new_module: nn.Module, old_module_parent: "Branch | None" = None) -> None:
        """Put a new child in the place of an old one; the old one gets the given parent.

        Raises:
            TreeError: (a ValueError) The old module is not a child.
        """
        key = self._slot_of(old_module)
        if key is None:
            raise TreeError(f"{old_module} is not in {self}.")
        if new_module is old_module:
            return
        self._check_new_child(new_module)
        self._leave_old_parent(new_module)
        key = self._slot_of(old_module)
        assert key is not None
        self._swap(key, new_module)
        self._disown(old_module)
        if old_module_parent is not None:
            old_module_parent._adopt(old_module)
        self._adopt(new_module)

    # --- reading -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.__dict__["_modules"])

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self.__dict__["_modules"].values()))

    def __contains__(self, module: object) -> bool:
        return isinstance(module, nn.Module) and self._slot_of(module) is not None

    @overload
    def __getitem__(self, key: int | str) -> Any: ...
    @overload
    def __getitem__(self: TBranch, key: slice) -> TBranch: ...
    def __getitem__(self, key: int | str | slice) -> Any:
        if isinstance(key, slice):
            return self._structural_copy(list(self)[key])
        if isinstance(key, str):
            if key not in self._modules:
                raise TreeKeyError(f"No child {key!r} in {self}. Its children: {', '.join(self._modules)}.")
            return self._modules[key]
        children = list(self)
        if not -len(children) <= key < len(children):
            raise TreeIndexError(f"Index out of range. {self} has {len(children)} children, asked for {key}.")
        return children[key]

    def key_of(self, module: nn.Module) -> str | None:
        """The key of a child, or None if it is not a direct child."""
        _ = self._modules  # names them
        return self._slot_of(module)

    def named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The children and their keys. Unlike `named_children`, a child that occurs twice is there twice."""
        yield from list(self._modules.items())

    def __getattr__(self, name: str) -> Any:
        if self._names_are_stale:
            _ = self._modules
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) or name in self.__dict__.get("_modules", ()):
            raise TreeError(
                f"{type(self).__name__}.{name} cannot be assigned: edit the tree with append, insert, replace, "
                "remove or pop. To keep a module without making it a child, put it in a list."
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__.get("_modules", ()):
            raise TreeError(f"{type(self).__name__}.{name} cannot be deleted: use remove or pop.")
        super().__delattr__(name)  # pyright: ignore[reportUnknownMemberType] (torch does not annotate it)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        raise TreeError(
            f"add_module({name!r}) would name a child of {type(self).__name__} by hand: use append or insert."
        )

    def _as_predicate(self, predicate: Any) -> Predicate | None:
        if get_origin(predicate) is not None:
            raise TreeError(f"{predicate} cannot be searched for: give a class without parameters, or a function.")
        if isinstance(predicate, type):
            return lambda module, _: isinstance(module, predicate)
        return predicate

    @overload
    def walk(self, predicate: type[T], recurse: bool = False) -> Iterator[tuple[T, Any]]: ...
    @overload
    def walk(self, predicate: Predicate | None = None, recurse: bool = False) -> Iterator[tuple[Any, Any]]: ...
    def walk(self, predicate: Any = None, recurse: bool = False) -> Iterator[tuple[Any, Any]]:
        """Yield `(module, parent)` for the modules below that match, each before its own children.

        What matches is not searched further unless `recurse` is set. The tree may be edited meanwhile: a module that
        is no longer a child of its parent when its turn comes is passed over.

        Args:
            predicate: A type, or a function of the module and its parent. None matches everything. A function that
                raises StopIteration makes the walk skip that module and all below it.
            recurse: Search below matches as well.
        """
        return self._walk(self._as_predicate(predicate), recurse)

    def _walk(self, matches: Predicate | None, recurse: bool) -> Iterator[tuple[nn.Module, Any]]:
        levels: list[tuple[Branch, Iterator[nn.Module]]] = [(self, iter(self))]
        while levels:
            branch, waiting = levels[-1]
            module = next(waiting, None)
            if module is None:
                levels.pop()
                continue
            if branch._slot_of(module) is None:
                continue
            try:
                found = matches is None or matches(module, branch)
            except StopIteration:
                continue
            if found:
                yield module, branch
            if isinstance(module, Branch) and (recurse or not found):
                levels.append((module, iter(module)))

    def layers(self, layer_type: type[T], recurse: bool = False) -> Iterator[T]:
        """Yield the modules of that type below, as `walk` does."""
        for module, _ in self.walk(layer_type, recurse):
            yield module

    def find(self, layer_type: type[T]) -> T | None:
        """The first module of that type below, or None."""
        return next(self.layers(layer_type), None)

    def ensure_find(self, layer_type: type[T]) -> T:
        """The first module of that type below.

        Raises:
            NotFoundError: (an AssertionError) There is none.
        """
        found = self.find(layer_type)
        if found is None:
            raise NotFoundError(f"could not find {layer_type.__name__} in {self}.")
        return found

    def layer(self, key: str | int | Sequence[str | int], layer_type: type[T] = nn.Module) -> T:
        """The module at a key, a position, or a path of them; `()` is this module.

        Raises:
            TreeTypeError: (an AssertionError) It is of another type.
        """
        module: Any = self
        for step in [key] if isinstance(key, str | int) else key:
            module = module[step]
        if not isinstance(module, layer_type):
            raise TreeTypeError(f"{key!r} is {type(module).__name__} in {self}, not {layer_type.__name__}.")
        return module

    def find_parent(self, module: nn.Module) -> Any:
        """The Chain in this tree that holds the module directly, or None."""
        if module in self:
            return self
        if isinstance(module, ContextModule) and any(parent is self for parent in module.get_parents()):
            return module.parent
        if not isinstance(module, ContextModule):
            holders = [
                branch for branch in holders_of(module) if any(parent is self for parent in branch.get_parents())
            ]
            if len(holders) < 2:
                return holders[0] if holders else None
        return next((parent for _, parent in self.walk(lambda child, _: child is module)), None)

    def ensure_find_parent(self, module: nn.Module) -> Any:
        """The Chain in this tree that holds the module directly.

        Raises:
            NotFoundError: (an AssertionError) It is not in this tree.
        """
        parent = self.find_parent(module)
        if parent is None:
            raise NotFoundError(f"could not find {module} in {self}.")
        return parent

    def _structural_copy(self: TBranch, children: list[nn.Module]) -> TBranch:
        raise NotImplementedError


def _restore_parent(module: ContextModule, parent: Any) -> None:
    if parent is None:
        module.__dict__.pop("_parent", None)
    else:
        module.__dict__["_parent"] = parent
