"""Inputs that are the same for both sides: same values, same strides, separate memory.

Strides are part of an input: a permuted image takes another convolution kernel than a contiguous one, and a timestep
expanded over the batch another path than one of shape (batch,). So copies keep strides and expands exactly, and after
a run the copy is held against the original, bit for bit: a model may not write into what it was given.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from refiners.errors import ParityError
from refiners.parity.bits import same_bits
from refiners.parity.case import Case, Inputs
from refiners.parity.torch_state import default_dtype


def draw_inputs(case: Case) -> dict[str, Any]:
    """The inputs of a case, drawn once, in float64, from its seed.

    Raises:
        ParityError: the case's `inputs` returns something else than a mapping.
    """
    with default_dtype(torch.float64):
        inputs = case.inputs(torch.Generator().manual_seed(case.seed))
    if not isinstance(inputs, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # a third party's function
        raise ParityError(f"The `inputs` of {case.id} must return a mapping from names to values, got {type(inputs)}.")
    return dict(inputs)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting of dicts, lists and tuples with every tensor replaced; anything else is deep-copied."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(item, function) for item in cast(Sequence[Any], value)]
        return items if isinstance(value, list) else tuple(items)
    return copy.deepcopy(value)


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nesting, under its dotted path: `image`, `states.0`."""
    if isinstance(value, Tensor):
        yield name, value
        return
    children: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        children = list(cast(Mapping[Any, Any], value).items())
    elif isinstance(value, list | tuple):
        children = list(enumerate(cast(Sequence[Any], value)))
    for key, item in children:
        yield from named_tensors(item, f"{name}.{key}" if name else str(key))


def copy_exactly(tensor: Tensor, *, dtype: torch.dtype | None = None, device: str | None = None) -> Tensor:
    """A copy with the same shape and strides, its own memory, and another dtype if it is floating and one is given.

    Dimensions that are expanded (stride 0) stay expanded.
    """
    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    expanded = [size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    source = tensor.detach()
    for dim, is_expanded in enumerate(expanded):
        if is_expanded:
            source = source.narrow(dim, 0, 1)
    made = torch.empty_strided(source.shape, source.stride(), dtype=kind, device=device or tensor.device)
    return made.copy_(source).expand(tensor.shape)


def place_inputs(inputs: Inputs, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The inputs of a lane: floating tensors rounded to its dtype, all of them on its device, strides kept."""
    return {
        key: map_tensors(item, lambda t: copy_exactly(t, dtype=dtype, device=device)) for key, item in inputs.items()
    }


def copy_for_one_side(inputs: Inputs, *, gradients: bool) -> dict[str, Any]:
    """A side's own copy of a lane's inputs; floating tensors ask for a gradient when gradients are compared."""

    def own(tensor: Tensor) -> Tensor:
        made = copy_exactly(tensor)
        return made.requires_grad_() if gradients and made.is_floating_point() else made

    return {key: map_tensors(item, own) for key, item in inputs.items()}


def mutated(given: Inputs, pristine: Inputs) -> list[str]:
    """The names of the inputs that a side changed, in value, shape or strides, or removed or added."""
    after, before = dict(named_tensors(given)), dict(named_tensors(pristine))
    changed = [name for name in before if name in after and not _untouched(after[name], before[name])]
    return sorted({*changed, *(before.keys() ^ after.keys())})


def _untouched(after: Tensor, before: Tensor) -> bool:
    return after.stride() == before.stride() and same_bits(after.detach(), before)
