"""Two forms of one adapter: a convolution of one pixel is a linear map, and files hold its weights as either.

kohya's scripts and diffusers write the LoRA of such a convolution as two convolutions, [rank, in, 1, 1] and
[out, rank, 1, 1]; others write two matrices, and a model may have a Linear where the one that it was trained on has a
convolution. The numbers are the same, in the same order.
"""

from dataclasses import replace
from math import prod

from torch import Tensor

from refiners.fluxion.adapters.lora.spec import DeltaSpec

# The tensors that have the axes of the weight of their layer.
_ROLES = {"lora": ("down", "up"), "dora": ("down", "up"), "lokr": ("w2",)}


def axes_of(spec: DeltaSpec) -> int | None:
    """How many axes the weight has that a spec is for; None if its tensors do not tell."""
    return next((spec.tensors[role].ndim for role in _ROLES.get(spec.method, ()) if role in spec.tensors), None)


def with_axes(spec: DeltaSpec, axes: int) -> DeltaSpec:
    """The same adapter for a weight of so many axes. What is not of one pixel stays as it is.

    Example:
        >>> spec = DeltaSpec("lora", {"down": torch.ones(2, 4), "up": torch.ones(3, 2)})
        >>> with_axes(spec, 4).tensors["up"].shape
        torch.Size([3, 2, 1, 1])
    """
    roles = [role for role in _ROLES.get(spec.method, ()) if role in spec.tensors]
    given = {spec.tensors[role].ndim for role in roles}
    if len(given) != 1 or given == {axes} or min(given) < 2:
        return spec
    if any(prod(spec.tensors[role].shape[2:]) != 1 for role in roles):
        return spec
    tensors = {role: _with_axes(tensor, axes) if role in roles else tensor for role, tensor in spec.tensors.items()}
    if "magnitude" in tensors:
        # One number for each output: those of a convolution lie along its channels.
        tensors["magnitude"] = tensors["magnitude"].reshape(-1 if axes == 2 else (1, -1, *[1] * (axes - 2)))
    return replace(spec, tensors=tensors)


def _with_axes(tensor: Tensor, axes: int) -> Tensor:
    return tensor.reshape(*tensor.shape[:2], *[1] * (axes - 2))
