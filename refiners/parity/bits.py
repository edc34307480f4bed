"""Comparing tensors by their bits: -0.0 is not 0.0, and a NaN equals only the NaN of the same payload.

A floating tensor is read as the integers of the same width. For distances those integers are put in order: the
positive floats upwards from 0, the negative ones downwards from -1, so that neighbours in the dtype are neighbours in
the integers, -0.0 and 0.0 are one apart, and a distance of 0 means equal bits. That distance counts ULPs (units in the
last place).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_equal = torch.equal  # as it is now: a port may patch torch's
_INTEGER_OF_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers of the same width, shape kept (complex numbers get a last axis of two)."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        return tensor.contiguous().view(_INTEGER_OF_WIDTH[tensor.element_size()])
    return tensor


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether shape, dtype and every bit agree. Strides and devices may differ."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return _equal(as_integers(first), as_integers(second).to(first.device))


def differing_bits(first: Tensor, second: Tensor) -> Tensor:
    """Where two tensors of one shape and dtype differ: a boolean of that shape."""
    different = as_integers(first) != as_integers(second)
    return different.any(dim=-1) if first.is_complex() else different


def ulp_distance(first: Tensor, second: Tensor) -> int | None:
    """How many floats of their dtype lie between two scalars, one end included. None when there is no such count.

    Receives:
        first, second: scalars of the same real floating dtype.
    """
    if not first.is_floating_point() or first.dtype != second.dtype or not bool(first.isfinite() & second.isfinite()):
        return None
    return abs(_ordered(first) - _ordered(second))


def _ordered(scalar: Tensor) -> int:
    bits = int(as_integers(scalar).item())
    magnitude = bits & ((1 << (8 * scalar.element_size() - 1)) - 1)
    return bits if bits >= 0 else -magnitude - 1


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The element in which two tensors differ most."""

    tensor: str
    """The name of the compared output, tap or gradient."""
    index: tuple[int, ...]
    upstream: str
    """Its value on the upstream side, exactly as Python prints it."""
    port: str
    difference: float
    """Absolute difference; infinite where only one side is finite."""
    ulp: int | None
    """Distance in units in the last place; None unless both are finite floats."""

    def __str__(self) -> str:
        ulps = f" ({self.ulp} ULP)" if self.ulp is not None else ""
        return f"{self.tensor}[{', '.join(map(str, self.index))}]: upstream {self.upstream}, port {self.port}{ulps}"


def find_worst(name: str, upstream: Tensor, port: Tensor) -> Worst | None:
    """The element that differs most between two tensors of one shape and dtype; None when all bits agree.

    Elements that differ in bits but not in value (a zero's sign, a NaN's payload) count as the smallest difference;
    an element that is finite on one side only counts as the largest.
    """
    different = differing_bits(upstream, port)
    if not bool(different.any()):
        return None
    distance = _absolute_difference(upstream, port)
    ranked = torch.where(different, distance, torch.full_like(distance, -1.0))
    flat = int(ranked.flatten().argmax().item())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), upstream.shape)) if upstream.ndim else ()
    first, second = upstream[index].detach(), port[index].detach()
    return Worst(
        tensor=name,
        index=index,
        upstream=repr(first.item()),
        port=repr(second.item()),
        difference=float(ranked.flatten()[flat].item()),
        ulp=ulp_distance(first, second),
    )


def _absolute_difference(first: Tensor, second: Tensor) -> Tensor:
    wide = torch.complex128 if first.is_complex() else torch.float64
    a, b = first.detach().to(wide), second.detach().to(wide)
    difference = (a - b).abs()
    both_nan = a.isnan() & b.isnan()
    same = (a == b) | both_nan
    difference = torch.where(same, torch.zeros_like(difference), difference)
    return torch.where(difference.isnan(), torch.full_like(difference, torch.inf), difference)
