"""Injecting a whole set of LoRAs in one call: all of them, or none.

    loras = inject_loras(select(model).of(fl.Linear).inside(Attention).expect(48), name="style", rank=4, alpha=8)
    loras = inject_loras(model, specs, name="style")

The first makes new ones, to be trained; the second takes weights that exist, by the paths of the layers they are for.
Every adapter is built before the model is touched, and whatever does not fit is told in one error.

Sets stack: several may stand on one layer, which then has one adapter with a LoRA of each, added in the order of their
injection. They are ejected in any order.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, Unpack, cast, overload, runtime_checkable

from torch import nn

from refiners.errors import AdapterError, AdapterTypeError, LoraNameError
from refiners.fluxion.adapters.lora.adapter import LoraAdapter
from refiners.fluxion.adapters.lora.attach import attach, names_around
from refiners.fluxion.adapters.lora.delta import Delta
from refiners.fluxion.adapters.lora.sets import LoraSet
from refiners.fluxion.adapters.lora.spec import DeltaSpec, are_finite
from refiners.fluxion.adapters.weights import PathFinder, base_children, base_of, named_base_modules, nearest
from refiners.fluxion.layers.branch import holders_of
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.factory import Factory
from refiners.fluxion.layers.garbage import makes_no_garbage
from refiners.fluxion.layers.journal import all_or_nothing
from refiners.fluxion.layers.module import ContextModule
from refiners.fluxion.selectors import Selection, path_expression, select

# How many lines an error shows.
SHOWN = 20
_NOWHERE = "there is no such layer"

Specs = Mapping[str, DeltaSpec]
# For the layers of a selection, or whose path has such a pattern: a value of their own.
Pattern = Mapping[Selection[Any] | str, Any]


@runtime_checkable
class HasSpecs(Protocol):
    """What knows the specs for a model, such as a file of LoRAs."""

    def specs_for(self, model: nn.Module, /, *, strict: bool = True) -> Specs: ...


class _Planned(NamedTuple):
    """A layer, where it is, and the adapter that is to be put there."""

    layer: nn.Module
    parent: Chain
    top: Chain | None
    delta: Delta[Any]


@overload
def inject_loras(
    where: nn.Module,
    specs: Specs | HasSpecs,
    /,
    name: str,
    scale: float = 1.0,
    *,
    strict: bool = True,
    allow_no_change: bool = False,
    fused: bool = False,
    **factory: Unpack[Factory],
) -> LoraSet: ...


@overload
def inject_loras(
    where: nn.Module | Selection[Any],
    /,
    name: str,
    rank: int = 16,
    scale: float = 1.0,
    *,
    alpha: float | None = None,
    method: str = "lora",
    rank_pattern: Pattern | None = None,
    alpha_pattern: Pattern | None = None,
    rank_stabilized: bool = False,
    fused: bool = False,
    **settings: Any,
) -> LoraSet: ...


@makes_no_garbage
def inject_loras(where: Any, /, *given: Any, **settings: Any) -> LoraSet:
    """Give layers adapters, on their device, in their dtype and training mode; or change nothing, if anything fails.

    Args:
        where: The layers: a selection of them, or a model, which stands for all its Linear. The layers of adapters that
            are in already are left alone. With specs, a model.
        specs: What to inject, by the path that each layer has in the base of the model; see `named_base_modules`. Or
            something that has `specs_for(model)`, such as a file. Without it, new adapters are made, which change
            nothing until they are trained.
        name: What the adapters are called.
        rank: See `Delta`.
        scale: See `Delta`.
        alpha: See `Delta`.
        method: "lora", "dora", "locon", "loha" or "lokr".
        rank_pattern: Ranks for some layers. A key is a selection, or a pattern of paths as in `Selection.at`; the first
            that holds a layer counts.
        alpha_pattern: Alphas for some layers, in the same way.
        rank_stabilized: See `Delta`.
        strict: Refuse specs that fit nowhere. Otherwise they are left out, and `left_out` of the set says why.
        allow_no_change: Allow a set of specs that changes nothing, since all are zero or left out.
        fused: Run those that stand on one layer as one pair of products; see `fuse`.
        **settings: The device and the dtype, if they are not to be the layers'; and what else a method has, such as
            `bias` of a LoRA, see `Delta.for_target`.

    Returns:
        What holds them all.

    Raises:
        SelectionError: (a LookupError) There is no layer.
        AdapterError: (a ValueError) Some layers or specs do not fit, specs hold values that are not finite, or change
            nothing. All are listed. The model is as before.
        LoraNameError: (a KeyError) Layers have an adapter of that name already.

    Example:
        >>> model = fl.Chain(fl.Linear(2, 2), fl.Linear(2, 2))
        >>> loras = inject_loras(model, name="style", rank=1)
        >>> loras.scale = 0.5
        >>> list(loras.state_dict())[:2]
        ['Linear_1.down.weight', 'Linear_1.up.weight']
        >>> loras.eject()
    """
    if given and not isinstance(given[0], str):
        return _inject_specs(where, *given, **settings)
    return _inject_new(where, *given, **settings)


def _inject_new(
    where: nn.Module | Selection[Any],
    name: str,
    rank: int = 16,
    scale: float = 1.0,
    *,
    alpha: float | None = None,
    method: str = "lora",
    rank_pattern: Pattern | None = None,
    alpha_pattern: Pattern | None = None,
    fused: bool = False,
    **settings: Any,
) -> LoraSet:
    selection = where if isinstance(where, Selection) else select(where).of(nn.Linear)
    selection = selection.outside(Delta)
    root, family = selection.root, Delta.of_method(method)
    problems = _Problems(f"{name!r} cannot be injected into {_short(root)}", root)
    ranks, alphas = problems.pattern(rank_pattern), problems.pattern(alpha_pattern)
    plan: list[_Planned] = []
    for layer, parents in _by_layer(selection, problems):
        with problems.of(layer):
            own = {"rank": ranks.get(id(layer), rank), "alpha": alphas.get(id(layer), alpha)}
            problems.refuse_name(name, parents[0])
            top = _top(selection, layer, parents)
            delta = family.for_target(name, layer, scale=scale, **own, **settings)
            plan.append(_Planned(layer, parents[0], top, delta))
    problems.check()
    return _put(root, name, plan, fused)


def _inject_specs(
    model: nn.Module,
    specs: Specs | HasSpecs,
    name: str,
    scale: float = 1.0,
    *,
    strict: bool = True,
    allow_no_change: bool = False,
    fused: bool = False,
    **factory: Unpack[Factory],
) -> LoraSet:
    specs = specs.specs_for(model, strict=strict) if isinstance(specs, HasSpecs) else specs
    problems = _Problems(f"{name!r} cannot be injected into {_short(model)}", model)
    base = PathFinder(base_of(model), base_children)
    plan: dict[int, _Planned] = {}
    left_out: dict[str, str] = {}
    # All values at once, which is quick; where that is not enough to tell, those of each spec by itself.
    is_finite = are_finite(tensor for spec in specs.values() for tensor in spec.tensors.values())
    for path, spec in specs.items():
        layer = base.find(path)
        if layer is None:
            left_out[path] = _NOWHERE
        elif wrong := spec.validate(with_values=not is_finite):
            problems.add(path, "; ".join(wrong))
        elif id(layer) in plan:
            problems.add(path, "this layer stands in several places, and another spec is for it too")
        else:
            with problems.of(layer, path):
                parent, top = _place(model, layer)
                problems.refuse_name(name, parent)
                try:
                    delta = Delta.from_sound_spec(name, spec, layer, scale, **factory)
                except AdapterTypeError as error:
                    left_out[path] = str(error)
                    continue
                plan[id(layer)] = _Planned(layer, parent, top, delta)
    _name_nearest(model, left_out)
    if strict:
        for path, reason in left_out.items():
            problems.add(path, reason)
    problems.check()
    _check_changes(name, model, specs, left_out, allow_no_change)
    loras = _put(model, name, list(plan.values()), fused)
    loras.left_out = {**getattr(specs, "left_out", {}), **left_out}
    return loras


def _name_nearest(model: nn.Module, left_out: dict[str, str]) -> None:
    """Say of what is for no layer which layer could have been meant."""
    nowhere = [path for path, reason in left_out.items() if reason == _NOWHERE]
    known = [path for path, _ in named_base_modules(model)] if nowhere else []
    left_out.update({path: _NOWHERE + nearest(path, known) for path in nowhere})


def _check_changes(
    name: str, model: nn.Module, specs: Specs, left_out: Mapping[str, str], allow_no_change: bool
) -> None:
    if allow_no_change or any(not spec.changes_nothing() for path, spec in specs.items() if path not in left_out):
        return
    lines = [f"  {path}: {reason}" for path, reason in left_out.items()][:SHOWN]
    why = "it is all zero" if len(left_out) < len(specs) else f"none of its {len(specs)} specs is for a layer there"
    raise AdapterError(
        "\n".join([f"{name!r} would change nothing in {_short(model)}: {why}. allow_no_change=True allows it.", *lines])
    )


@all_or_nothing
def _put(root: nn.Module, name: str, plan: list[_Planned], fused: bool) -> LoraSet:
    held: list[tuple[LoraAdapter, Delta[Any]]] = []
    for layer, parent, top, delta in plan:
        # Another adapter of the plan may have been put between the two.
        holder: Any = parent if layer in parent else parent.find_parent(layer)
        adapter = attach(delta, layer, holder, top)
        if fused:
            adapter.fuse()
        held.append((adapter, delta))
    return LoraSet(root, name, held)


class _Problems:
    """Everything that speaks against an injection, by the path of the layer."""

    def __init__(self, title: str, root: nn.Module) -> None:
        self.title = title
        self.root = root
        self.found: list[tuple[str, str]] = []
        self.kinds: set[type[AdapterError]] = set()
        self._layer: tuple[nn.Module | None, str | None] = (None, None)
        self._paths: dict[int, str] | None = None

    def add(self, path: str, problem: str, kind: type[AdapterError] = AdapterError) -> None:
        self.found.append((path, problem))
        self.kinds.add(kind)

    def of(self, layer: nn.Module, path: str | None = None) -> "_Problems":
        """Opened with `with`: errors inside are problems of that layer."""
        self._layer = layer, path
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> bool:
        if not isinstance(error, AdapterError):
            return False
        layer, path = self._layer
        assert layer is not None
        self.add(self.path(layer) if path is None else path, str(error), type(error))
        return True

    def path(self, layer: nn.Module) -> str:
        if self._paths is None:
            self._paths = {}
            for path, module in named_base_modules(self.root):
                self._paths.setdefault(id(module), path)
        return self._paths.get(id(layer), str(layer))

    def refuse_name(self, name: str, parent: Any) -> None:
        if name in names_around(parent):
            raise LoraNameError(f"there is a LoRA called {name!r} already: eject it, or choose another name")

    def pattern(self, pattern: Pattern | None) -> dict[int, Any]:
        """The values of a pattern by the identity of the layer."""
        values: dict[int, Any] = {}
        for key, value in (pattern or {}).items():
            if not isinstance(key, str):
                meant = [id(module) for module in key]
            else:
                expression = path_expression(key)
                modules = named_base_modules(self.root)
                meant = [id(module) for path, module in modules if expression.fullmatch(path)]
            if not meant:
                self.add(str(key), "this pattern holds no layer")
            for layer in meant:
                values.setdefault(layer, value)
        return values

    def check(self) -> None:
        """Raise them all as one error, of the most special class they share."""
        if not self.found:
            return
        lines = [f"  {path}: {problem}" for path, problem in self.found[:SHOWN]]
        if len(self.found) > SHOWN:
            lines.append(f"  … and {len(self.found) - SHOWN} more")
        kind: Callable[[str], AdapterError] = self.kinds.pop() if len(self.kinds) == 1 else AdapterError
        raise kind("\n".join([f"{self.title}, which is as before.", *lines]))


def _short(root: nn.Module) -> str:
    return type(base_of(root)).__name__


def _place(root: nn.Module, layer: nn.Module) -> tuple[Chain, Chain | None]:
    """What holds a layer below the root, and where to adapt it if that is not its only place."""
    if isinstance(layer, ContextModule):
        raise AdapterTypeError(f"{type(layer).__name__} is no layer with weights of its own, but a Chain of others")
    below = [holder for holder in holders_of(layer) if any(above is root for above in (holder, *holder.get_parents()))]
    if not below:
        raise AdapterError(f"{layer} stands in no Chain, so no adapter can take its place")
    if len(below) == 1:
        return cast(Chain, below[0]), None
    if not isinstance(root, Chain):
        raise AdapterError(f"{layer} stands in several Chains: give a Chain that holds them all")
    return cast(Chain, below[0]), root


def _by_layer(selection: Selection[nn.Module], problems: _Problems) -> list[tuple[nn.Module, list[Any]]]:
    layers: dict[int, tuple[nn.Module, list[Any]]] = {}
    for layer, parent in selection.pairs:
        with problems.of(layer):
            if not isinstance(parent, Chain):
                raise AdapterError(
                    f"{layer} stands in {type(parent).__name__}, which is no Chain, so no adapter can take its place. "
                    "Turn that module into a Chain, or select other layers."
                )
            layers.setdefault(id(layer), (layer, []))[1].append(parent)
    return list(layers.values())


def _top(selection: Selection[nn.Module], layer: nn.Module, parents: list[Any]) -> Chain | None:
    """Where to adapt a layer that stands in several Chains. None: in its only one."""
    if all(parent is parents[0] for parent in parents):
        return None
    root = selection.root
    if not isinstance(root, Chain):
        raise AdapterError(f"{layer} stands in several Chains: select it below a Chain that holds them all.")
    below = [holder for holder in holders_of(layer) if any(above is root for above in (holder, *holder.get_parents()))]
    if {id(holder) for holder in below} != {id(parent) for parent in parents}:
        raise AdapterError(f"{layer} stands in more Chains than are selected: select all of them, or only one.")
    return root
