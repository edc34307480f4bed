"""Branches: the nodes that hold others, and how a tree is read and edited."""

import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar, cast, get_origin, overload

from torch import nn

from refiners.errors import NotFoundError, TreeError, TreeIndexError, TreeKeyError, TreeTypeError
from refiners.fluxion.layers.module import ContextModule
from refiners.fluxion.layers.slots import Slots, holders_of

T = TypeVar("T", bound=nn.Module)
TBranch = TypeVar("TBranch", bound="Branch")
Predicate = Callable[[nn.Module, Any], bool]
_PLAIN_TYPES = frozenset({str, int, float, bool, tuple})


class Branch(Slots):
    """A node with children. `Chain` says what is done with them."""

    # --- edits ---------------------------------------------------------------------------------------------------

    def insert(self, index: int, module: nn.Module) -> None:
        """Insert a child before the one at `index`. -1 appends, -2 inserts before the last, and so on.

        A module that lives in another Chain moves: it leaves that one.

        Raises:
            TreeError: (a ValueError) The module holds this Chain.
        """
        index = operator.index(index)
        self._check_new_child(module)
        self._leave_old_parent(module)
        modules: dict[str, nn.Module] = self.__dict__["_modules"]
        position = index if index >= 0 else max(0, len(modules) + index + 1)
        if position >= len(modules):
            self._append(module)
        else:
            self._insert_between(position, module)
        self._adopt(module)

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
        index = operator.index(index)
        modules: dict[str, nn.Module] = self.__dict__["_modules"]
        if not -len(modules) <= index < len(modules):
            raise TreeIndexError(f"Index out of range. {self} has {len(modules)} children, asked for {index}.")
        keys = islice(reversed(modules), -1 - index, None) if index < 0 else islice(modules, index, None)
        return self._take_out(next(keys), index % len(modules))

    def remove(self, module: nn.Module) -> None:
        """Take a child out of the tree; the first of them, if it occurs twice.

        Raises:
            TreeError: (a ValueError) The module is not a child.
        """
        if self._slot_of(module) is None:
            raise TreeError(f"{module} is not in {self}.")
        self.pop(next(i for i, child in enumerate(self.__dict__["_modules"].values()) if child is module))

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
        return isinstance(module, nn.Module) and self.has_slot_of(module)

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
        """The key of a child, or None. That of a node inside a module of another kind is its path there."""
        _ = self._modules  # names them
        key = self._slot_of(module)
        if key is None and isinstance(module, ContextModule) and module.parent is self:
            for name, child in self.named_layers():
                inside = cast(Iterator[tuple[str, nn.Module]], child.named_modules())
                path = next((path for path, inner in inside if inner is module), None)
                if path is not None:
                    return f"{name}.{path}"
        return key

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
        own = self.__dict__
        if (
            type(value) in _PLAIN_TYPES
            and name not in own.get("_parameters", ())
            and name not in own.get("_buffers", ())
        ):
            object.__setattr__(self, name, value)  # what torch would do, in a third of the time
        else:
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
