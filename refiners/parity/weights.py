"""Weights that show faults: informative values for every parameter, stored once for both sides.

Upstream's own initialisation hides bugs: biases are 0, norms are 1, gates are closed, matrices are so small that
attention is nearly uniform. So each parameter and each persistent floating buffer is drawn anew, at a scale that suits
its role, such that activations neither vanish nor explode:

| role | values |
|---|---|
| matrix, convolution | normal, 1/√fan_in |
| embedding, table, token, position | normal, 1 |
| weight of a norm, gate, layer scale, other vector or scalar | 1 + normal, 0.25 |
| bias, running mean | normal, 0.3 |
| running variance | exp(normal, 0.3) |

A value depends on the key and the seed alone, never on the order of the parameters, and is drawn in float64 before it
is rounded to the dtype of the parameter. What is not in the state dict (position ids, rotary frequencies) stays as
each constructor computed it: nothing is carried over, so the port has to compute it equally.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd  # pyright: ignore[reportPrivateUsage]  # the only bases

from refiners.errors import ParityError
from refiners.parity.case import Conversion
from refiners.parity.modules import named_modules, own_state

ALIGNMENT = 16
"""Bytes. Matrix products with few rows take another path on CPUs when weights are aligned to less."""

_TABLE = re.compile(r"embed|token|position|_pos|pos_|query|queries|latent|table|codebook|relative", re.IGNORECASE)


def generator_for(seed: int, key: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the key alone, on every platform."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw(key: str, tensor: Tensor, owner: nn.Module, seed: int) -> Tensor:
    """Informative values for one entry of a state dict.

    Receives:
        key: its name there.
        tensor: the entry, for its shape.
        owner: the module that holds it, for its role.
        seed: the case's.

    Returns:
        float64, on the CPU, of the same shape.
    """
    values = torch.randn(tensor.shape, generator=generator_for(seed, key), dtype=torch.float64)
    name = key.rsplit(".", 1)[-1]
    is_vector = sum(size > 1 for size in tensor.shape) <= 1
    if name == "running_var":
        return torch.exp(0.3 * values)
    if name == "running_mean" or ("bias" in name and is_vector):
        return 0.3 * values
    if isinstance(owner, nn.Linear | nn.Bilinear | _ConvNd) and name == "weight":
        return values / math.sqrt(_fan_in(tensor, owner))
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag) or _TABLE.search(name) or "mbedding" in type(owner).__name__:
        return values
    if is_vector or "Norm" in type(owner).__name__:
        return 1 + 0.25 * values
    return values / math.sqrt(_fan_in(tensor, owner))


def _fan_in(tensor: Tensor, owner: nn.Module) -> int:
    if isinstance(owner, _ConvTransposeNd):
        return max(1, tensor.shape[0] * math.prod(tensor.shape[2:]) // owner.groups)
    if isinstance(owner, _ConvNd):
        return max(1, math.prod(tensor.shape[1:]))
    return max(1, tensor.shape[-1])


@dataclass(frozen=True)
class Entry:
    """One floating tensor of a state dict, under the smallest of the names it is tied to."""

    key: str
    tensor: Tensor
    owner: nn.Module
    keys: tuple[str, ...]
    """All names of this very tensor, itself included."""


def floating_entries(model: nn.Module) -> Iterator[Entry]:
    """The parameters and persistent floating buffers of a model, each once, however many names it has."""
    names: dict[int, list[str]] = {}
    found: dict[int, tuple[Tensor, nn.Module]] = {}
    for prefix, module in named_modules(model, every_name=True):
        for name, tensor in own_state(module):
            if tensor.is_floating_point() or tensor.is_complex():
                names.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
                found.setdefault(id(tensor), (tensor, module))
    for identity, keys in names.items():
        tensor, owner = found[identity]
        yield Entry(min(keys), tensor, owner, tuple(sorted(keys)))


@torch.no_grad()
def fill_informative(model: nn.Module, seed: int) -> None:
    """Draws every parameter and persistent floating buffer anew, in place, rounded to its own dtype."""
    for entry in floating_entries(model):
        entry.tensor.copy_(draw(entry.key, entry.tensor, entry.owner, seed))


@torch.no_grad()
def fill_from(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies given values into a model, in place, rounded to its dtypes.

    Raises:
        ParityError: keys are missing or unexpected, or shapes differ. Lists all of them; nothing is copied then.
    """
    entries = model.state_dict()
    tied = {key: entry.keys for entry in floating_entries(model) for key in entry.keys}
    missing = [key for key in entries if key not in values and not any(other in values for other in tied.get(key, ()))]
    unexpected = [key for key in values if key not in entries]
    shapes = [
        f"{key} {tuple(values[key].shape)} for {tuple(entry.shape)}"
        for key, entry in entries.items()
        if key in values and values[key].shape != entry.shape
    ]
    if missing or unexpected or shapes:
        lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        told = "; ".join(f"{what}: {', '.join(which)}" for what, which in lists.items() if which)
        raise ParityError(f"The given weights do not fit {type(model).__name__}: {told}.")
    for key, entry in entries.items():
        if key in values:
            entry.copy_(values[key])


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Gives its own storage to every weight that does not start on a multiple of `ALIGNMENT` bytes."""
    for entry in floating_entries(model):
        if entry.tensor.data_ptr() % ALIGNMENT:
            entry.tensor.data = entry.tensor.data.clone()


@dataclass(frozen=True)
class Sharing:
    """What became of the weights when they were handed to the port."""

    shared: int
    """Port tensors that are upstream's own storage."""
    copied: tuple[str, ...]
    """Port keys that had to be computed from upstream's (merged, transposed into a copy, re-aligned)."""
    upstream_key: Mapping[str, str]
    """Port key → upstream key, where both are the same whole tensor."""
    faults: tuple[str, ...]
    """What is wrong with the way the port holds its weights, a sentence each."""


def share(upstream: nn.Module, port: nn.Module, key_map: Conversion) -> Sharing:
    """Makes the port read upstream's storages. Its parameters keep their `requires_grad` and their ties.

    Raises:
        ConversionError: the key map does not fit the two models.
    """
    source = upstream.state_dict()
    ties = [entry.keys for entry in floating_entries(port) if len(entry.keys) > 1]
    converted = {key: _aligned(tensor) for key, tensor in key_map.convert(source, port).items()}
    port.load_state_dict(converted, strict=True, assign=True)
    faults = _tie_again(port, converted, ties)
    owners = {(tensor.data_ptr(), tensor.shape, tensor.stride()): key for key, tensor in source.items()}
    loaded = port.state_dict()
    renamed = {
        key: owners[where]
        for key, tensor in converted.items()
        if (where := (tensor.data_ptr(), tensor.shape, tensor.stride())) in owners and tensor.numel()
    }
    faults += [
        f"`{key}` is not the storage of upstream's `{other}` after load_state_dict(assign=True)"
        for key, other in renamed.items()
        if loaded[key].data_ptr() != source[other].data_ptr()
    ]
    faults += _untied(upstream, port, renamed)
    storages = {tensor.untyped_storage().data_ptr() for tensor in source.values()}
    copied = tuple(key for key, tensor in loaded.items() if tensor.untyped_storage().data_ptr() not in storages)
    return Sharing(len(loaded) - len(copied), copied, renamed, tuple(faults))


def origins(
    keys: Sequence[str], models: tuple[nn.Module, nn.Module], key_map: Conversion
) -> dict[str, tuple[str, ...]]:
    """The upstream keys that each of some port keys stands for, wholly or in part, as the key map has it.

    Receives:
        keys: of the port.
        models: upstream, then the port.
    """
    if not keys:
        return {}
    source = models[0].state_dict()
    marks = {key: torch.zeros_like(tensor) for key, tensor in models[1].state_dict().items()}
    before = key_map.invert(marks, source)

    def marked(key: str) -> tuple[str, ...]:
        after = key_map.invert({**marks, key: torch.ones_like(marks[key])}, source)
        return tuple(name for name, tensor in after.items() if not torch.equal(tensor, before[name]))

    return {key: marked(key) for key in keys}


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _tie_again(port: nn.Module, converted: Mapping[str, Tensor], ties: list[tuple[str, ...]]) -> list[str]:
    """Assigning makes a parameter of each name; names that were one parameter before become one again."""
    faults: list[str] = []
    for first, *others in ties:
        owner, name = _owner(port, first)
        for other in others:
            if converted[first].data_ptr() != converted[other].data_ptr():
                faults.append(f"the port ties `{first}` and `{other}`, upstream does not")
                continue
            other_owner, other_name = _owner(port, other)
            setattr(other_owner, other_name, getattr(owner, name))
    return faults


def _owner(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), name


def _untied(upstream: nn.Module, port: nn.Module, renamed: Mapping[str, str]) -> list[str]:
    """Names that are one parameter upstream and several in the port: equal today, and not after one training step."""
    tied_to = {key: entry.key for entry in floating_entries(upstream) for key in entry.keys}
    faults: list[str] = []
    first_of: dict[str, Entry] = {}
    for entry in floating_entries(port):
        origins = [tied_to[renamed[key]] for key in entry.keys if key in renamed and renamed[key] in tied_to]
        for origin in set(origins):
            first = first_of.setdefault(origin, entry)
            if first is not entry:
                faults.append(f"upstream ties `{first.key}` and `{entry.key}`, the port does not")
    return faults
