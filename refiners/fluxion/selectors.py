"""Selections: say which modules of a tree are meant, and how many there must be.

    select(model).of(fl.Linear).inside(Attention).expect(12)

A selection is a question, kept and not yet asked: each method returns a narrower one, and the tree is read when the
modules, their paths or their number are wanted. So one selection can be asked again after the tree was edited.

Whoever edits a model by class name and finds nothing edits nothing, in silence. Here nothing found is an error, and it
shows which condition removed what, and what stands in the tree under a similar name.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Generic, TypeVar, cast

from torch import nn

from refiners.errors import SelectionError, TreeTypeError
from refiners.fluxion.layers.branch import Branch
from refiners.fluxion.layers.journal import all_or_nothing, note_undo
from refiners.fluxion.layers.module import ContextModule
from refiners.fluxion.layers.tree import describe

M = TypeVar("M", bound=nn.Module, covariant=True)
N = TypeVar("N", bound=nn.Module)

# How many names an error shows of each kind.
SHOWN = 5


class _Place:
    """A module at one place of the tree. A module that the tree holds twice has two."""

    __slots__ = ("above", "key", "module", "regions")

    def __init__(self, above: "_Place | None", key: str, module: nn.Module, regions: int) -> None:
        self.above = above
        self.key = key
        self.module = module
        # One bit for each class of `inside` and `outside` that stands above.
        self.regions = regions

    @property
    def path(self) -> str:
        keys: list[str] = []
        place: _Place = self
        while place.above is not None:
            keys.append(place.key)
            place = place.above
        return ".".join(reversed(keys))

    @property
    def parent(self) -> nn.Module:
        assert self.above is not None
        return self.above.module


@dataclass(frozen=True)
class _Filter:
    """One condition, and how to tell what would have passed it."""

    text: str
    keeps: Callable[[_Place], bool]
    wanted: tuple[str, ...] = ()
    names: Callable[[_Place], Iterable[str]] | None = None


def select(model: nn.Module) -> "Selection[nn.Module]":
    """All modules below this one, to be narrowed down.

    Example:
        >>> import refiners.fluxion.layers as fl
        >>> from refiners.fluxion.selectors import select
        >>> model = fl.Chain(fl.Linear(4, 8), fl.ReLU(), fl.Residual(fl.Linear(8, 8)))
        >>> select(model).of(fl.Linear).expect(2).paths
        ('Linear', 'Residual.Linear')
        >>> select(model).of(fl.Linear).inside(fl.Residual).one().in_features
        8
    """
    return Selection(model)


@dataclass(frozen=True, eq=False)
class Selection(Generic[M]):
    """Which modules of a tree are meant. Immutable: each condition makes a new selection.

    A module that the tree holds in several places is one module: it is counted and given once, with all its paths.

    Raises:
        SelectionError: (a LookupError) Modules are asked for and there are none, or not as many as expected.
    """

    root: nn.Module
    filters: tuple[_Filter, ...] = ()
    regions: tuple[tuple[type[nn.Module], ...], ...] = ()

    # --- conditions ----------------------------------------------------------------------------------------------

    def of(self, *types: type[N]) -> "Selection[N]":
        """Only modules of one of these classes."""
        _check_types("of", types)
        keeps = _Filter(
            f"of({_names_of(types)})",
            lambda place: isinstance(place.module, types),
            tuple(kind.__name__ for kind in types),
            lambda place: [type(place.module).__name__],
        )
        return cast("Selection[N]", self._with(keeps))

    def inside(self, *types: type[nn.Module]) -> "Selection[M]":
        """Only modules that have a module of one of these classes above them. The root counts."""
        return self._region("inside", types, wanted=True)

    def outside(self, *types: type[nn.Module]) -> "Selection[M]":
        """Only modules that have no module of these classes above them. The root counts."""
        return self._region("outside", types, wanted=False)

    def at(self, *patterns: str) -> "Selection[M]":
        """Only modules with such a path: `*` stands for any one key or part of it, `**` for any number of keys.

        Paths are those of the `state_dict`: the keys from the root of the selection, joined by dots.
        """
        expression = path_expression(*patterns)
        keeps = _Filter(
            f"at({', '.join(map(repr, patterns))})",
            lambda place: expression.fullmatch(place.path) is not None,
            patterns,
            lambda place: [place.path],
        )
        return self._with(keeps)

    def where(self, condition: Callable[[M], bool]) -> "Selection[M]":
        """Only modules for which this function returns true."""
        name = getattr(condition, "__name__", type(condition).__name__)
        return self._with(_Filter(f"where({name})", lambda place: bool(condition(cast(Any, place.module)))))

    def _region(self, name: str, types: tuple[type[nn.Module], ...], wanted: bool) -> "Selection[M]":
        _check_types(name, types)
        bit = len(self.regions)
        keeps = _Filter(
            f"{name}({_names_of(types)})",
            lambda place: bool(place.regions >> bit & 1) is wanted,
            tuple(kind.__name__ for kind in types),
            _classes_above,
        )
        return replace(self._with(keeps), regions=(*self.regions, types))

    def _with(self, keeps: _Filter) -> "Selection[M]":
        return replace(self, filters=(*self.filters, keeps))

    # --- answers -------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many modules there are."""
        return len(self._modules())

    @property
    def paths(self) -> tuple[str, ...]:
        """Where they are: every place, in the order of the tree."""
        return tuple(place.path for place in self._matches(self.filters))

    @property
    def pairs(self) -> tuple[tuple[M, Any], ...]:
        """Each module with the module that holds it, one pair for each place."""
        places = self._matches(self.filters)
        self._check(len(places), None)
        return tuple((cast(Any, place.module), place.parent) for place in places)

    @property
    def parents(self) -> tuple[Any, ...]:
        """The modules that hold them directly, each once."""
        return tuple({id(parent): parent for _, parent in self.pairs}.values())

    def __iter__(self) -> Iterator[M]:
        modules = self._modules()
        self._check(len(modules), None)
        return iter(cast("list[M]", modules))

    def expect(self, count: int) -> "Selection[M]":
        """This selection, once it is sure that it holds that many modules."""
        self._check(self.count, count)
        return self

    def one(self) -> M:
        """The only module of this selection."""
        return next(iter(self.expect(1)))

    @all_or_nothing
    def replace(self, make: Callable[[M], nn.Module]) -> list[nn.Module]:
        """Put `make(module)` in the place of each module, in all its places, or change nothing if anything fails.

        `make` is called in the order of the tree, once for each module. What it returns for a module that stands in
        several places is shared by them; a Chain, which can have one parent only, is copied with shared weights.

        Returns:
            The new modules, in the order of the tree.
        """
        places = self._matches(self.filters)
        self._check(len(places), None)
        made: dict[int, nn.Module] = {}
        for place in places:
            if id(place.module) not in made:
                made[id(place.module)] = make(cast(Any, place.module))
        _check_made(made.values())
        put: set[int] = set()
        # From the last to the first: what lies inside of a module is replaced before the module is.
        for place in reversed(places):
            new = made[id(place.module)]
            if isinstance(new, ContextModule) and id(new) in put:
                new = new.structural_copy()
            put.add(id(new))
            if new is not place.module:
                _put(place, new)
        return list(made.values())

    def __repr__(self) -> str:
        return ".".join([f"select({type(self.root).__name__})", *(keeps.text for keeps in self.filters)])

    # --- reading the tree ----------------------------------------------------------------------------------------

    def _modules(self) -> list[nn.Module]:
        return list({id(place.module): place.module for place in self._matches(self.filters)}.values())

    def _matches(self, filters: tuple[_Filter, ...]) -> list[_Place]:
        conditions = [keeps.keeps for keeps in filters]
        return [place for place in self._walk() if all(holds(place) for holds in conditions)]

    def _walk(self) -> Iterator[_Place]:
        stack = [_Place(None, "", self.root, 0)]
        while stack:
            place = stack.pop()
            if place.above is not None:
                yield place
            children = children_of(place.module)
            if not children:
                continue
            regions = place.regions
            for bit, types in enumerate(self.regions):
                if isinstance(place.module, types):
                    regions |= 1 << bit
            stack += [_Place(place, key, child, regions) for key, child in reversed(children)]

    # --- errors --------------------------------------------------------------------------------------------------

    def _check(self, found: int, expected: int | None) -> None:
        if found == expected or (found > 0 and expected is None):
            return
        wish = "at least one" if expected is None else str(expected)
        raise SelectionError("\n".join([f"{self} found {_modules(found)}, expected {wish}.", *self._explain(found)]))

    def _explain(self, found: int) -> Iterator[str]:
        before = self._matches(())
        for i, keeps in enumerate(self.filters):
            after = self._matches(self.filters[: i + 1])
            yield f"  {keeps.text}: {_modules(_count(after))} left of {_count(before)}"
            if not after:
                yield from _nearest(keeps, before)
                return
            before = after
        if found:
            paths = [place.path for place in before]
            yield f"Found: {_some(paths)}."


def children_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The keys and children of a module, those that occur twice included."""
    if isinstance(module, Branch):
        return list(module.named_layers())
    children: dict[str, nn.Module | None] = vars(module)["_modules"]
    return [(key, child) for key, child in children.items() if child is not None]


def _check_types(name: str, types: tuple[Any, ...]) -> None:
    if not types or not all(isinstance(kind, type) for kind in types):
        raise TreeTypeError(f"{name}(…) takes classes, got {', '.join(map(repr, types)) or 'nothing'}.")


def _check_made(modules: Iterable[Any]) -> None:
    seen: set[int] = set()
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TreeTypeError(f"replace(make): make has to return a module, got {type(module).__name__}.")
        if isinstance(module, ContextModule) and id(module) in seen:
            raise SelectionError(
                f"replace(make): make returned the same {type(module).__name__} for two modules, and a Chain can have "
                "one parent only. Build a new one in each call."
            )
        seen.add(id(module))


def _put(place: _Place, new: nn.Module) -> None:
    parent = place.parent
    if isinstance(parent, Branch):
        parent.replace(place.module, new)
        return
    # A plain torch module: its children are attributes.
    children: dict[str, nn.Module | None] = vars(parent)["_modules"]
    key, old = place.key, place.module
    note_undo(lambda: children.update({key: old}))
    children[key] = new


def path_expression(*patterns: str) -> re.Pattern[str]:
    """What matches a whole path that has one of these patterns; see `Selection.at`."""
    return re.compile("|".join(_as_regex(pattern) for pattern in patterns))


def _as_regex(pattern: str) -> str:
    # A key followed by its dot, so that `**` can stand for none.
    keys = ["(?:[^.]+[.])*" if key == "**" else _key_regex(key) + "[.]" for key in pattern.split(".")]
    # The path itself ends without one.
    last = "(?:[^.]+[.])*[^.]+" if keys[-1].endswith(")*") else keys[-1].removesuffix("[.]")
    return "".join([*keys[:-1], last])


def _key_regex(key: str) -> str:
    return "[^.]*".join(re.escape(part) for part in key.split("*"))


def _classes_above(place: _Place) -> Iterator[str]:
    above = place.above
    while above is not None:
        yield type(above.module).__name__
        above = above.above


def _nearest(keeps: _Filter, before: list[_Place]) -> Iterator[str]:
    """What the last condition could have meant."""
    if keeps.names is None:
        yield f"It removed: {_some(f'{place.path} ({describe(place.module)})' for place in before)}."
        return
    known = Counter(name for place in before for name in set(keeps.names(place)))
    for wanted in keeps.wanted:
        close = get_close_matches(wanted, known, n=SHOWN, cutoff=0.5)
        names = close or [name for name, _ in known.most_common()]
        yield f"{wanted!r} is not there. {'Nearest' if close else 'There are'}: {_some(names)}."


def _names_of(types: tuple[type[nn.Module], ...]) -> str:
    return ", ".join(kind.__name__ for kind in types)


def _count(places: list[_Place]) -> int:
    return len({id(place.module) for place in places})


def _modules(count: int) -> str:
    return f"{count or 'no'} module{'' if count == 1 else 's'}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
