"""Attaching LoRAs that come from elsewhere: which layer each one is for.

A key that is the path of a layer says so by itself. Other keys say nothing, and then each LoRA goes to the first
compatible layer in walk order that has none of that name. The whole plan is made before the model is touched.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import nn

from refiners.errors import AdapterError
from refiners.fluxion.adapters.lora.adapter import LoraAdapter
from refiners.fluxion.adapters.lora.base import Lora
from refiners.fluxion.adapters.lora.delta import Delta
from refiners.fluxion.adapters.weights import PathFinder, base_children, base_of
from refiners.fluxion.layers.adapter import Adapter
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.journal import all_or_nothing
from refiners.fluxion.layers.module import ContextModule
from refiners.fluxion.selectors import children_of

# How many keys an error shows.
SHOWN = 12


class Place(NamedTuple):
    """A layer that a LoRA could be for, and the names of the LoRAs it has already."""

    layer: nn.Module
    parent: Chain
    names: set[str]


def find_places(
    target: Chain, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> list[Place]:
    """The layers below `target` in walk order, each once, without those of LoRAs.

    Args:
        target: Where to search.
        include: Names of classes; if given, one of them must be above the layer.
        exclude: Names of classes; none of them may be above the layer.
    """
    places: dict[int, Place] = {}
    # What is above a layer is asked once for each Chain.
    known: dict[int, tuple[bool, set[str]]] = {}
    for layer, parent in target.walk(lambda module, _: not isinstance(module, ContextModule)):
        if id(layer) in places or isinstance(parent, Delta):
            continue
        if id(parent) not in known:
            above = {type(chain).__name__ for chain in (parent, *parent.get_parents())}
            included = include is None or not above.isdisjoint(include)
            known[id(parent)] = included and (exclude is None or above.isdisjoint(exclude)), names_around(parent)
        is_meant, names = known[id(parent)]
        if is_meant:
            places[id(layer)] = Place(layer, parent, names)
    return list(places.values())


def names_around(parent: Chain) -> set[str]:
    """The names of the LoRAs on a layer that this Chain holds directly."""
    names: set[str] = set()
    above: Chain | None = parent
    while isinstance(above, Adapter):
        if isinstance(above, LoraAdapter):
            names.update(above.names)
        above = cast(Chain, above).parent
    return names


def attach_to_first(
    delta: Delta[Any], target: Chain, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> tuple[LoraAdapter, Chain | None] | None:
    """See `Delta.auto_attach`."""
    for place in find_places(target, include, exclude):
        if delta.name not in place.names and delta.is_compatible(place.layer):
            if isinstance(place.parent, LoraAdapter):
                place.parent.add_lora(delta)
                return place.parent, None
            return LoraAdapter(place.layer, delta), place.parent
    return None


@all_or_nothing
def auto_attach_loras(
    loras: Mapping[str, Lora[Any]],
    target: Chain,
    /,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    sanity_check: bool = True,
    debug_map: list[tuple[str, str]] | None = None,
) -> list[str]:
    """Attach LoRAs, such as `Lora.from_dict` gives, to the layers of a model; all of them, or none if it fails.

    If any key is the path of a layer, all keys are taken for paths. Otherwise each LoRA goes to the first compatible
    layer, in walk order, that has none of its name.

    Args:
        loras: The LoRAs by key. Paths are those the layers have, or had before any adapter was injected.
        target: Where to search.
        include: Names of classes; if given, one of them must be above a layer.
        exclude: Names of classes; none of them may be above a layer.
        sanity_check: Refuse a LoRA that fits nowhere. Where keys say nothing, refuse as well to leave a layer without,
            if one of the LoRAs would fit it: order alone cannot tell then which layer was meant.
        debug_map: A list that is given the key and the path of each LoRA that is attached.

    Returns:
        The keys that fit nowhere; none with the sanity check.

    Raises:
        AdapterError: (a ValueError) The sanity check failed. The model was not touched.
    """
    places = find_places(target, include, exclude)
    named = _layers_named(loras, target)
    if named:
        plan, leftover = _plan_by_name(loras, places, named), list[Place]()
    else:
        plan, leftover = _plan_by_order(loras, places)
    failed = [key for key in loras if key not in plan]
    if sanity_check and (failed or leftover):
        raise AdapterError(_explain(target, len(plan), failed, leftover))
    adapters = {key: _attach_at(place, loras[key], target) for key, place in plan.items()}
    if debug_map is not None:
        where = _paths(target)
        debug_map += [(key, where[id(adapter)]) for key, adapter in adapters.items()]
    return failed


def _attach_at(place: Place, lora: Lora[Any], target: Chain) -> LoraAdapter:
    # Another LoRA of the plan may have been attached there before.
    parent: Any = place.parent if place.layer in place.parent else place.parent.find_parent(place.layer)
    if isinstance(parent, LoraAdapter):
        parent.is_shared = True
    return attach(lora, place.layer, parent, target)


def attach(lora: Delta[Any], layer: nn.Module, parent: Chain, top: Chain | None = None) -> LoraAdapter:
    """Give a layer one more LoRA: in the adapter of LoRAs that holds it, if that is shared, or in a new one.

    Args:
        lora: It must fit.
        layer: The layer.
        parent: What holds the layer.
        top: Adapt the layer everywhere below this Chain, instead of below its parent only.
    """
    if isinstance(parent, LoraAdapter) and parent.is_shared:
        adapter = parent.original
        adapter.add_lora(lora)
        return adapter
    adapter = LoraAdapter(layer, lora)
    adapter.__dict__["is_shared"] = True  # past torch's `__setattr__`
    return adapter.inject(top or parent)


def _layers_named(keys: Iterable[str], target: Chain) -> dict[str, nn.Module]:
    """The keys that are paths, of the base or of the tree as it is, with or without the class of the root in front."""
    trees = [PathFinder(base_of(target), base_children), PathFinder(target, children_of)]
    prefix = f"{type(target).__name__}."
    named: dict[str, nn.Module] = {}
    for key in keys:
        found = (tree.find(path) for path in (key, key.removeprefix(prefix)) for tree in trees)
        module = next((module for module in found if module is not None), None)
        if module is not None:
            named[key] = module
    return named


def _paths(target: Chain) -> dict[int, str]:
    """Where the modules of the tree are, by identity."""
    named = cast("Iterator[tuple[str, nn.Module]]", target.named_modules(remove_duplicate=False))
    paths: dict[int, str] = {}
    for path, module in named:
        paths.setdefault(id(module), path)
    return paths


def _plan_by_name(
    loras: Mapping[str, Lora[Any]], places: list[Place], named: Mapping[str, nn.Module]
) -> dict[str, Place]:
    by_layer = {id(place.layer): place for place in places}
    plan: dict[str, Place] = {}
    taken: set[tuple[int, str]] = set()
    for key, lora in loras.items():
        place = by_layer.get(id(named.get(key)))
        if place is None or not lora.is_compatible(place.layer):
            continue
        if lora.name not in place.names and (id(place), lora.name) not in taken:
            plan[key] = place
            taken.add((id(place), lora.name))
    return plan


def _plan_by_order(loras: Mapping[str, Lora[Any]], places: list[Place]) -> tuple[dict[str, Place], list[Place]]:
    """What goes where, and the places that one of the LoRAs would have fitted too."""
    plan: dict[str, Place] = {}
    taken: set[tuple[int, str]] = set()
    # LoRAs of one shape and name go on searching where the one before stopped.
    waiting: dict[Any, Iterator[Place]] = {}

    def free(lora: Lora[Any]) -> Iterator[Place]:
        for place in places:
            if lora.name not in place.names and (id(place), lora.name) not in taken and lora.is_compatible(place.layer):
                yield place

    for key, lora in loras.items():
        shape = (type(lora), lora.name, lora.down.weight.shape, lora.up.weight.shape)
        place = next(waiting.setdefault(shape, free(lora)), None)
        if place is not None:
            plan[key] = place
            taken.add((id(place), lora.name))
    leftover = {id(place): place for search in waiting.values() for place in search}
    return plan, [place for place in places if id(place) in leftover]


def _explain(target: Chain, attached: int, failed: list[str], leftover: list[Place]) -> str:
    lines = [f"sanity check failed: {attached} of {attached + len(failed)} LoRAs fit a layer of {target}."]
    if failed:
        lines.append(f"  fit nowhere: {_some(failed)}")
    if leftover:
        paths = _paths(target)
        lines.append(f"  get none, and would fit too: {_some([paths[id(place.layer)] for place in leftover])}")
        lines.append("Keys that are paths say which layer is meant; `include` and `exclude` narrow the choice down.")
    return "\n".join([*lines, "The model was not touched."])


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
