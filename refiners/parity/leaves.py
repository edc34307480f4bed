"""Which leaf of the port stands for which leaf of upstream: the one that holds the same weights.

A leaf here is a module with weights of its own and none below it. Weights are the same when they share a storage; where
a port holds copies, or was given the weights of another layer by mistake, the key map tells what it was meant to hold.
Neither is right for every fault, so both pairings are offered, and the one that needs fewer faults is believed.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from refiners.parity.modules import modules, named_modules, own_state

Pairing = Mapping[str, str]
"""Path of a leaf of the port → path of the leaf of upstream."""


def weight_leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The leaves of a model that hold weights, under their paths."""
    found: dict[str, nn.Module] = {}
    for path, module in named_modules(model):
        if own_state(module) and not any(own_state(below) for below in modules(module) if below is not module):
            found[path] = module
    return found


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def _by_size(module: nn.Module) -> list[tuple[str, Tensor]]:
    return sorted(own_state(module), key=lambda item: -item[1].numel())


def pairings(upstream: nn.Module, port: nn.Module, upstream_keys: Mapping[str, str]) -> list[Pairing]:
    """The pairings worth trying, each once.

    Receives:
        upstream, port: with their weights.
        upstream_keys: port key → upstream key, as the key map has it; may be empty.

    Returns:
        By storage first (the key map settles what is tied or copied), then by the key map first.
    """
    ours, theirs = weight_leaves(upstream), weight_leaves(port)
    holders: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for path, module in ours.items():
        for _, tensor in own_state(module):
            holders.setdefault(_place(tensor), []).append(path)
    by_storage: dict[str, str] = {}
    by_key: dict[str, str] = {}
    for path, module in theirs.items():
        for name, tensor in _by_size(module):
            key = upstream_keys.get(f"{path}.{name}" if path else name)
            meant = key.rpartition(".")[0] if key is not None else None
            if meant in ours:
                by_key.setdefault(path, meant)
            found = holders.get(_place(tensor), [])
            if found and tensor.numel():
                by_storage.setdefault(path, meant if meant in found else found[0])
    first = {**by_key, **by_storage}
    second = {**by_storage, **by_key}
    return [first] if first == second else [first, second]


def keys_of_same(upstream: nn.Module, right: Mapping[str, Tensor]) -> dict[str, str]:
    """Port key → upstream key, where both are the same whole tensor."""
    places = {(tensor.data_ptr(), tensor.shape): key for key, tensor in upstream.state_dict().items()}
    found = {key: places.get((tensor.data_ptr(), tensor.shape)) for key, tensor in right.items()}
    return {key: other for key, other in found.items() if other is not None}
