"""The weights of a model with adapters in it: the base's alone under their own names, and the adapters' alone.

Injecting an adapter renames what it takes in: `Linear.weight` becomes `LoraAdapter.Linear.weight`. The *base* of a
model is the tree without its injected adapters, each replaced by its target. Its state is the one the model had before,
key by key, so a checkpoint of the base is saved and loaded while adapters are in.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, cast

from torch import Tensor, nn

from refiners.errors import ConversionError
from refiners.fluxion.adapters.merging import merge_of
from refiners.fluxion.layers.adapter import Adapter
from refiners.fluxion.layers.branch import Branch
from refiners.fluxion.layers.module import ContextModule
from refiners.fluxion.layers.slots import Slots, holders_of
from refiners.fluxion.layers.tree import child_names
from refiners.fluxion.selectors import children_of

# How many keys of each kind an error shows.
SHOWN = 12


def base_of(module: nn.Module) -> nn.Module:
    """What stood in the place of this module before adapters were injected there; mostly the module itself."""
    while isinstance(module, Adapter) and module.is_injected:
        module = cast(Any, module).target
    return module


def named_base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base with the paths they have in it, before their children; the base itself has the path ''.

    A module that stands in several places is given for each.
    """
    waiting = [("", base_of(model))]
    while waiting:
        path, module = waiting.pop()
        yield path, module
        prefix = f"{path}." if path else ""
        waiting += [(f"{prefix}{name}", child) for name, child in reversed(base_children(module))]


def paths_of(model: nn.Module, layers: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Where some modules are: what `named_base_modules` gives of them, their first places only, and in less time."""
    wanted = {id(layer) for layer in layers}
    above: set[int] = set()
    for layer in layers:
        for node in [layer] if isinstance(layer, ContextModule) else holders_of(layer):
            link: Any = node
            while link is not None and id(link) not in above:
                above.add(id(link))
                link = link.parent
    paths: dict[str, nn.Module] = {}
    waiting = [("", base_of(model))]
    while waiting:
        path, module = waiting.pop()
        if id(module) in wanted:
            wanted.remove(id(module))
            paths[path] = module
        prefix = f"{path}." if path else ""
        for name, child in reversed(base_children(module)):
            # A module of another kind knows nobody, so what it holds is searched.
            if id(child) in wanted or (id(child) in above if isinstance(child, Slots) else vars(child)["_modules"]):
                waiting.append((f"{prefix}{name}", child))
    return paths


class PathFinder:
    """Follows paths from its top, and reads the children of each module on the way once."""

    def __init__(self, top: nn.Module, read: Callable[[nn.Module], list[tuple[str, nn.Module]]]) -> None:
        self.top = top
        self.read = read
        self.known: dict[int, dict[str, nn.Module]] = {}

    def find(self, path: str) -> nn.Module | None:
        """The module of a path, or None. That of "" is the top."""
        module: nn.Module | None = self.top
        for key in path.split(".") if path else ():
            if module is None:
                break
            if id(module) not in self.known:
                self.known[id(module)] = dict(self.read(module))
            module = self.known[id(module)].get(key)
        return module


def base_state_dict(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Any]:
    """The `state_dict` that the model had before any adapter was injected: same keys, same order, same tensors.

    Args:
        model: A module with injected adapters anywhere in it, or an adapter at the root itself.
        keep_vars: Give the parameters themselves instead of detached tensors, as in `torch.nn.Module.state_dict`.

    Example:
        >>> import refiners.fluxion.layers as fl
        >>> from refiners.fluxion.adapters import LinearLora, LoraAdapter, base_state_dict
        >>> model = fl.Chain(fl.Linear(2, 2, bias=False))
        >>> adapter = LoraAdapter(model.Linear, LinearLora("style", 2, 2)).inject(model)
        >>> list(base_state_dict(model))
        ['Linear.weight']
    """
    return _base_view(base_of(model)).state_dict(keep_vars=keep_vars)


def load_base_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False
) -> tuple[list[str], list[str]]:
    """Load a checkpoint of the base into a model that has adapters in it. The adapters' weights stay.

    Args:
        model: A module with injected adapters anywhere in it, or an adapter at the root itself.
        state: The keys are those of `base_state_dict`.
        strict: Refuse missing and unexpected keys.
        assign: Take the tensors themselves instead of copying their values.

    Returns:
        The missing and the unexpected keys; both empty if `strict`.

    Raises:
        ConversionError: (a ValueError) Keys or shapes do not fit. All are listed, and nothing was loaded.
    """
    keys = _load(_base_view(base_of(model)), state, strict, assign, "base_state_dict")
    for _, module in named_base_modules(model):
        merge = merge_of(module)
        if merge is not None:
            merge.fold()
    return keys


def adapter_state_dict(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Any]:
    """The part of `model.state_dict()` that injected adapters brought, under the keys it has there.

    For an adapter at the root, which stands above the model, pass the adapter.
    """
    return _adapters_view(model).state_dict(keep_vars=keep_vars)


def load_adapter_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False
) -> tuple[list[str], list[str]]:
    """Load what `adapter_state_dict` gave into a model with the same adapters. The base's weights stay.

    Returns:
        The missing and the unexpected keys; both empty if `strict`.

    Raises:
        ConversionError: (a ValueError) Keys or shapes do not fit. All are listed, and nothing was loaded.
    """
    return _load(_adapters_view(model), state, strict, assign, "adapter_state_dict")


def base_children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children that a module of the base has in it, with the keys they have there."""
    children = children_of(module)
    if not any(isinstance(child, Adapter) for _, child in children):
        return children
    bases = [base_of(child) for _, child in children]
    # A Chain names its children after their classes; the names in a plain module are what they are.
    names = child_names(bases) if isinstance(module, Branch) else [key for key, _ in children]
    return list(zip(names, bases, strict=True))


def _base_view(module: nn.Module) -> nn.Module:
    """A tree that shares all weights with the base, and has its shape. It serves to read and load a state, no more."""
    merge = merge_of(module)
    if merge is not None:
        # Its own weights, which it does not show as long as adapters are merged into it.
        return _with_parameters(module, merge.kept())
    changed = False
    views: dict[str, nn.Module] = {}
    for (key, child), (name, base) in zip(children_of(module), base_children(module), strict=True):
        views[name] = _base_view(base)
        changed = changed or key != name or views[name] is not child
    # What holds no adapter needs no view: it can save and load itself, in ways of its own too.
    return _with_children(module, views) if changed else module


def _with_children(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    view = object.__new__(type(module))
    vars(view).update(vars(module))
    vars(view).pop("_names_are_stale", None)
    vars(view)["_modules"] = children
    return view


def _with_parameters(module: nn.Module, parameters: dict[str, nn.Parameter | None]) -> nn.Module:
    view = object.__new__(type(module))
    vars(view).update(vars(module))
    vars(view)["_parameters"] = parameters
    return view


def _adapters_view(model: nn.Module) -> nn.Module:
    """A tree with the shape of the model in which the modules of the base have no weights."""
    base = {id(module) for _, module in named_base_modules(model)}
    return _without(model, base)


def _without(module: nn.Module, base: set[int]) -> nn.Module:
    children: dict[str, nn.Module] = {}
    for key, child in children_of(module):
        children[key] = _without(child, base)
    return _with_children(nn.Module() if id(module) in base else module, children)


def _load(
    view: nn.Module, state: Mapping[str, Tensor], strict: bool, assign: bool, source: str
) -> tuple[list[str], list[str]]:
    wanted = view.state_dict(keep_vars=True)
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    misshaped = [
        f"{key}: {list(state[key].shape)}, has to be {list(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in state and isinstance(tensor, Tensor) and state[key].shape != tensor.shape
    ]
    problems = [("mis-shaped", misshaped)]
    if strict:
        named = [f"{key}{nearest(key, wanted)}" for key in unexpected]
        problems = [("missing", missing), ("unexpected", named), *problems]
    lines = [line for title, keys in problems for line in _list(title, keys)]
    if lines:
        text = "\n".join(lines)
        raise ConversionError(f"The weights do not fit, and nothing was loaded. Compare with {source}(model).\n{text}")
    view.load_state_dict(state, strict=strict, assign=assign)
    return missing, unexpected


def nearest(key: str, names: Iterable[str]) -> str:
    """What a key could have meant, as the end of a line of an error: " (nearest: …)", or nothing."""
    # Only the keys that share most parts are compared letter by letter, which takes long for a whole model.
    parts = set(key.split("."))
    likely = sorted(names, key=lambda name: -len(parts.intersection(name.split("."))))
    close = get_close_matches(key, likely[:SHOWN], n=1)
    return f" (nearest: {close[0]})" if close else ""


def _list(title: str, keys: list[str]) -> Iterator[str]:
    if keys:
        yield f"  {title} ({len(keys)}):"
        yield from (f"    {key}" for key in keys[:SHOWN])
        if len(keys) > SHOWN:
            yield f"    … and {len(keys) - SHOWN} more"
