"""Operations of torch that trust their caller: with numbers or shapes that do not fit they write beyond their tensors.

Guesses are run with numbers and tensors that nobody has checked. These are refused here, before torch sees them.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def refuse(name: str, arguments: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Refuses what an operation would not survive.

    Receives:
        name: of the operation, as `aten.native_group_norm`.
        arguments: in the order of its schema, tensors among them.
        tensors: those of them that are tensors.

    Raises:
        ValueError: they do not fit.
    """
    if "scaled_dot_product" in name:
        _check_attention(*tensors)
    elif name == "aten.native_group_norm":
        _check_group_norm(*arguments[:7])
    elif name == "aten._weight_norm_interface":
        _check_weight_norm(*arguments[:3])


def check_axes(made: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Refuses a view with another number of axes than torch asked for.

    Where the function that asked is torch's own, as `repeat_interleave`, it writes into a list of sizes by place.

    Raises:
        ValueError: they have others, or there are not as many.
    """
    if [tensor.ndim for tensor in made] != [tensor.ndim for tensor in right]:
        raise ValueError("a view with another number of axes")


def _check_attention(query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> None:
    """Torch's own kernels read beyond a tensor of another shape, and divide by a size of 0."""
    sizes = query.ndim == key.ndim == value.ndim == 4 and key.shape[:2] == value.shape[:2]
    if (
        not sizes
        or not query.numel()
        or not key.numel()
        or query.shape[0] != key.shape[0]
        or query.shape[1] % key.shape[1]
        or query.shape[3] != key.shape[3]
        or key.shape[2:] != value.shape[2:]
    ):
        raise ValueError("shapes that do not fit attention")
    for mask in others:
        mask.expand(*query.shape[:3], key.shape[2])


def _check_group_norm(
    values: Tensor, weight: Tensor | None, bias: Tensor | None, batch: int, channels: int, size: int, groups: int
) -> None:
    fits = values.ndim > 1 and tuple(values.shape[:2]) == (batch, channels) and values.shape[2:].numel() == size
    if (
        not fits
        or groups < 1
        or channels % groups
        or any(t is not None and t.numel() != channels for t in (weight, bias))
    ):
        raise ValueError("numbers that do not fit a group norm")


def _check_weight_norm(direction: Tensor, length: Tensor, axis: int = 0) -> None:
    if axis not in (0, direction.ndim - 1) or length.numel() != direction.shape[axis]:
        raise ValueError("numbers that do not fit a norm of weights")
