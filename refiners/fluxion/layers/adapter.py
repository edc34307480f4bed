"""Adapters: surgery on a model, written as code and undone without a trace.

An adapter is a Chain that takes the place of a module, its *target*, which usually becomes one of its children:

    class MyAdapter(fl.Sum, fl.Adapter[fl.Linear]):
        def __init__(self, target: fl.Linear) -> None:
            with self.setup_adapter(target):
                super().__init__(target, fl.Linear(…))

    adapter = MyAdapter(layer).inject(parent)
    adapter.eject()                             # the model is exactly as before

Adapters nest: one that is injected later on the same target stands inside the ones before it, and they may be ejected
in any order. An injection is a transaction: it is done completely or not at all.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeGuard, TypeVar, cast
from weakref import ref

from torch import nn

from refiners.errors import AdapterError, AdapterTypeError
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.journal import all_or_nothing, note_undo
from refiners.fluxion.layers.module import ContextModule
from refiners.fluxion.layers.slots import holders_of

T = TypeVar("T", bound=nn.Module)

_NOTHING_TO_KEEP = nullcontext()


def lookup_top_adapter(top: Chain, target: nn.Module) -> nn.Module:
    """The outermost adapter around `target` inside of `top`, or the target itself.

    Only adapters of the target count, and adapters of these: not the Chains that merely hold it.
    """

    # From the outside in. An adapter that does not hold its target is found like any other.
    levels: list[Iterator[Any]] = [iter(top)]
    while levels:
        for module in levels[-1]:
            if module is target:
                continue  # adapters of what the target holds are not around it
            if is_adapter(module) and module.leads_to(target):
                return module
            if isinstance(module, Chain):
                levels.append(iter(module))
                break
        else:
            levels.pop()
    return target


def is_adapter(module: object) -> TypeGuard["AnyAdapter"]:
    """Whether a module is an adapter, injected or not."""
    return isinstance(module, Adapter)


class Adapter(Generic[T]):
    """Mixed into a Chain, makes it an adapter of a module of type T.

    Raises:
        AdapterTypeError: (an AssertionError) A subclass is no Chain.
    """

    # Whether it computes with the parameters of its target instead of calling it: nothing can stand between the two.
    uses_parameters_of_target: ClassVar[bool] = False

    _target: Any = None
    _is_injected = False
    # Injected on a target that is nobody's child.
    _is_root = False
    # Whether another adapter was ever injected on this one, which then has it as its target.
    _is_adapted = False
    # Copies of this adapter in the other places of a target that a tree holds several times.
    _twins: "tuple[Adapter[T], ...]" = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(cls, Chain):
            raise AdapterTypeError(
                f"Adapter {cls.__name__} must be a Chain: class {cls.__name__}(fl.Chain, fl.Adapter[…])."
            )
        for name in ("inject", "eject"):
            if name in cls.__dict__:
                setattr(cls, name, all_or_nothing(cls.__dict__[name]))

    @property
    def target(self) -> T:
        """The module that this adapter adapts."""
        if self._target is None:
            raise AdapterError(
                f"{type(self).__name__} has no target yet: call setup_adapter(target) in its constructor."
            )
        return self._target

    @property
    def is_injected(self) -> bool:
        """Whether this adapter stands in the place of its target."""
        return self._is_injected

    def adapts(self, module: nn.Module) -> bool:
        """Whether that module is the target."""
        return self._target is module

    def leads_to(self, module: nn.Module) -> bool:
        """Whether that module is the target, or the target of an adapter that is the target, and so on."""
        target: Any = self._target
        while target is not None and target is not module:
            target = getattr(target, "_target", None)
        return target is module

    def setup_adapter(self, target: T) -> AbstractContextManager[None]:
        """Open this around `super().__init__(…)`: the target may become a child, and still keeps its parent."""
        if not isinstance(cast(object, target), nn.Module):
            raise AdapterTypeError(f"{type(self).__name__} adapts a module, not {type(target).__name__}.")
        # Not an attribute in the sense of torch: the target must not become a child by being known.
        self.__dict__["_target"] = target
        return target.no_parent_refresh() if isinstance(target, ContextModule) else _NOTHING_TO_KEEP

    @all_or_nothing
    def inject(self, parent: Chain | None = None) -> Self:
        """Take the place of the target, and return this adapter.

        Args:
            parent: A Chain that holds the target, at any depth. Needed for a leaf, which does not know its parent.
                A target that stands there several times is adapted everywhere. Without it, a Chain that is nobody's
                child gets this adapter as its parent.

        Raises:
            AdapterError: (a ValueError) The target is not there, the parent is missing, or this adapter is injected
                already. The tree is as before.
        """
        chain = self._as_chain()
        if self._is_injected:
            raise AdapterError(f"{chain} is injected already. Eject it first, or build a second adapter.")
        target = self.target
        places = self._places(parent)
        self._match_training_mode()
        for place in places:
            if is_adapter(place) and place.uses_parameters_of_target and place.adapts(target):
                raise AdapterError(
                    f"{place} computes with the parameters of {target}, so nothing can be injected between the "
                    f"two: eject it first, inject {chain}, and inject it again."
                )
        _set(self, "_is_injected", True)
        if is_adapter(target):
            _set(target, "_is_adapted", True)
        if not places:
            self._become_parent(cast(Any, target))
            return self
        copies = [chain.structural_copy() for _ in places[1:]]
        for place, adapter in zip(places, [chain, *copies], strict=True):
            _put(place, target, adapter)
        for copied in copies:
            _set(copied, "_is_injected", True)
        if copies:
            _set(self, "_twins", tuple(copies))
        return self

    @all_or_nothing
    def eject(self) -> None:
        """Put the target back where it was, or the outermost adapter that was injected around it later.

        Raises:
            AdapterError: (a ValueError) This adapter is not injected.
        """
        chain = self._as_chain()
        if not self._is_injected:
            raise AdapterError(f"{chain} is not in any tree, so it cannot be ejected. Inject it first.")
        if self._twins:
            for twin in self._twins:
                if twin.is_injected:
                    twin.eject()
            _set(self, "_twins", None)
        self._eject_from_place(chain)
        _set(self, "_is_injected", False)

    def _as_chain(self) -> Chain:
        assert isinstance(self, Chain)
        return self

    def _eject_from_place(self, chain: Chain) -> None:
        target = cast(nn.Module, self._target)
        parent = chain.parent
        if parent is None and not self._is_root:
            raise AdapterError(
                f"{chain} is not in any tree: it was taken out of its parent by hand. Put it back first."
            )
        top = self._outermost(target)
        if top is not target:
            # The inner adapter moves out, and this one holds its target again, as it did before it was injected.
            chain.ensure_find_parent(top).replace_everywhere(top, target)
        if parent is not None:
            parent.replace_everywhere(chain, top)
        _set(chain, "_parent", None)
        if isinstance(top, ContextModule):
            _set_parent(top, parent)
            _set(top, "_replaced_by", None)
        if self._is_root:
            _set(chain, "_is_root", None)
            is_held = parent is not None and parent.has_slot_of(top)
            self._pass_root_on(_base_of(target), None if is_held else top)
        if self._is_adapted:  # as a rule it is not, and need not climb from deep in the tree
            for above in [] if parent is None else [parent, *parent.get_parents()]:
                if is_adapter(above) and above.adapts(chain):
                    _set(above, "_target", top)
                    if is_adapter(top):
                        _set(top, "_is_adapted", True)

    def _outermost(self, target: nn.Module) -> nn.Module:
        """What was injected around the target later, or the target itself."""
        return lookup_top_adapter(self._as_chain(), target)

    def _pass_root_on(self, base: nn.Module, top: nn.Module | None) -> None:
        """What the model keeps alive: the outermost adapter around it, if nothing else holds that."""
        if is_adapter(top):
            _set(top, "_is_root", True)
            _set(base, "_root_adapter", top)
        elif base.__dict__.get("_root_adapter") is self:
            _set(base, "_root_adapter", None)

    def _places(self, parent: Chain | None) -> list[Chain]:
        """The Chains that hold the target directly. None of them: the target is nobody's child."""
        target = cast(nn.Module, self.target)
        chain = self._as_chain()
        if chain.parent is not None:
            raise AdapterError(f"{chain} is a child of {chain.parent}. An adapter to inject must not be in a tree yet.")
        if parent is not None:
            places = _holders(parent, target)
            if not places:
                raise AdapterError(f"{target} is not in {parent}.{_explain_absence(parent, target)}")
            return places
        if not isinstance(target, ContextModule):
            raise AdapterError(
                f"{target} is a leaf, which does not know its parent: say where it is, as in "
                f"{type(self).__name__}(layer).inject(parent)."
            )
        if target.parent is not None and target.parent is not chain and target in target.parent:
            return [target.parent]
        replaced_by = target.__dict__.get("_replaced_by")
        other = target.__dict__.get("_root_adapter") or (replaced_by and replaced_by())
        if other is not None:
            raise AdapterError(f"{target} is not in any tree: {other} stands in its place. Adapt or eject that one.")
        return []

    def _become_parent(self, target: ContextModule) -> None:
        chain = self._as_chain()
        # A target inside of a module that is no Chain is a root that sees the contexts of a Chain further up.
        _set_parent(chain, None if target.parent is chain else target.parent)
        _set_parent(target, _chain_holding(chain, target))
        if is_adapter(target):
            _set(target, "_is_root", None)
        _set(chain, "_is_root", True)
        # Nobody else may hold this adapter, and a child does not keep its parent alive.
        _set(_base_of(target), "_root_adapter", chain)

    def _match_training_mode(self) -> None:
        target = cast(nn.Module, self.target)
        mode = target.training
        modules: list[nn.Module | None] = [self._as_chain()]
        for module in modules:  # which grows meanwhile
            if module is None or module is target:
                continue
            own = module.__dict__
            if own["training"] is not mode:
                _set(module, "training", mode)
            # Not `children()`, which takes longer than all the rest of an injection.
            if own["_modules"]:
                modules += own["_modules"].values()

    def _pre_structural_copy(self) -> None:
        if isinstance(self.target, Chain):
            raise AdapterError(f"{type(self).__name__} adapts a Chain, which a copy would share: eject them first.")

    def _post_structural_copy(self, source: "Adapter[T]") -> None:
        self.__dict__["_target"] = source.target
        self.__dict__["_twins"] = ()


if TYPE_CHECKING:

    class AnyAdapter(Chain, Adapter[Any]):
        """What every adapter is, to a type checker."""


_MISSING = object()


def _set(module: Any, name: str, value: Any) -> None:
    """Set a plain attribute, or delete it with None, so that a transaction can undo it."""
    own = module.__dict__
    before = own.get(name, _MISSING)
    if before is _MISSING and value is None:
        return
    note_undo(partial(_put_back, own, name, before))
    if value is None:
        del own[name]
    else:
        own[name] = value


def _put_back(own: dict[str, Any], name: str, before: Any) -> None:
    if before is _MISSING:
        own.pop(name, None)
    else:
        own[name] = before


def _set_parent(module: nn.Module, parent: Chain | None) -> None:
    if isinstance(module, ContextModule):
        _set(module, "_parent", None if parent is None else ref(parent))


def _put(place: Chain, target: nn.Module, adapter: Chain) -> None:
    place.replace_everywhere(target, adapter)
    _set_parent(adapter, place)
    if isinstance(target, ContextModule):
        holder = adapter.find_parent(target)
        _set_parent(target, holder)
        if holder is None:
            _set(target, "_replaced_by", ref(adapter))


def _base_of(target: nn.Module) -> nn.Module:
    """The module below all adapters of adapters."""
    while is_adapter(target) and target.is_injected:
        target = target.target
    return target


def _chain_holding(adapter: Chain, target: nn.Module) -> Chain:
    holder = adapter.find_parent(target)
    return adapter if holder is None else holder


def _holders(top: Chain, target: nn.Module) -> list[Any]:
    """The Chains in the tree of `top` that have the target as a child."""
    if isinstance(target, ContextModule):
        branches: list[Any] = [] if target.parent is None or target not in target.parent else [target.parent]
    else:
        branches = holders_of(target)
    return [branch for branch in branches if branch is top or any(parent is top for parent in branch.get_parents())]


def _explain_absence(top: Chain, target: nn.Module) -> str:
    for module in top.modules():
        if is_adapter(module) and module.adapts(target) and module.is_injected:
            return f" {module} has taken its place and does not hold it: adapt or eject that one."
    return " Give the Chain that holds it, at any depth."
