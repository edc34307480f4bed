"""When is a difference only rounding? The constants of the verdict `ROUNDING`, and what justifies them.

Two programs that compute the same function in another order of operations differ by rounding. In float64 that noise
is far below any fault; in the other dtypes it is compared with the noise that upstream itself has against float64.

`FLOAT64_AGREEMENT` bounds the largest error of any element in float64. An element's error is its distance divided by
its own magnitude or by the typical magnitude of its tensor, whichever is larger (the median of an output, so that one
huge mask value hides nothing; the root mean square of a gradient, many of whose elements may be zero but for noise).

`ERROR_RATIO` bounds the port's error, in the case's own dtype, by a multiple of upstream's. Both are measured against
float64 on the same rounded weights and inputs. The bound holds for the outputs together, for the gradients together
(the geometric mean of the tensors' ratios, weighted by their elements), and for each output of at least `ENOUGH`
elements alone (the ratio of root mean squares; upstream's is at least that of its outputs together). Of fewer elements
the ratio is luck: a single number that upstream happens to round well would condemn any rewrite.

A mean says nothing about one element of many. So `ELEMENT_RATIO` bounds the worst element of each such output by a
multiple of upstream's worst. It is wider, because the largest of many errors is less steady than their mean.

Measured by `python -m refiners.parity.rounding` (CPU, torch 2.13.0): four small models of three sizes, run in 18 ways
that change nothing but the order of operations or the kernel (`refiners.parity.measured.rewrites`), and in three wrong
ways. The largest of all seeds, over all ways:

    float64: error of any element      rewrites 2.7e-14     bound 1e-10     mistakes 4.3e-05
    ratio to upstream's error          outputs   gradients   one output   one element
        float32                        1.69      1.72        1.83         3.82
        bfloat16                       1.61      1.30        1.61         3.90
        float16                        1.51      1.52        1.51         2.70
        bound                          2         2           2            8

docs/verifier.md has the counts of false alarms and misses. A function with a jump (a clamp at its edge, an argmax of a
tie) has no such bound: two right programs may fall on two sides of it, and the verdict is `DIFFERENT`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT64_AGREEMENT = 1e-10
"""Largest relative error between both sides in float64."""

ERROR_RATIO = 2.0
"""Largest ratio of the port's error to upstream's in any other dtype."""

ELEMENT_RATIO = 8.0
"""Largest ratio of the port's worst element of an output to upstream's worst."""

ENOUGH = 64
"""Elements from which the error of one output is a measurement: the standard error of a root mean square is 9 %."""


@dataclass(frozen=True)
class Error:
    """How far a tensor is from another one, relative to the other's magnitude."""

    rms: float
    worst: float
    elements: int
    """Elements that are finite on both sides; the others have no error."""


def typical_magnitude(truth: Tensor, *, gradient: bool) -> float:
    """The magnitude against which small elements are judged: 0.0 for a tensor without a finite element but zeros."""
    magnitudes = truth.detach().abs().to(torch.float64)
    magnitudes = _picked(magnitudes, magnitudes.isfinite() & (magnitudes > 0))
    if not magnitudes.numel():
        return 0.0
    return float(magnitudes.square().mean().sqrt() if gradient else magnitudes.median())


def _picked(values: Tensor, which: Tensor) -> Tensor:
    """Some elements in a row. Mostly it is all of them, and then none has to be looked up."""
    return values.flatten() if bool(which.all()) else values[which]


def relative_error(tensor: Tensor, truth: Tensor, magnitude: float) -> Error:
    """The error of a tensor against the truth.

    Receives:
        tensor: in any dtype.
        truth: of the same shape.
        magnitude: from `typical_magnitude`, or of a larger group the tensor belongs to.

    Returns:
        the error, infinite where the truth is exactly zero everywhere and the tensor is not.
    """
    if tensor is truth:
        return Error(0.0, 0.0, int(truth.isfinite().sum()))
    wide = torch.complex128 if truth.is_complex() else torch.float64
    given, right = tensor.detach().to(wide), truth.detach().to(wide)
    finite = given.isfinite() & right.isfinite()
    distance, size = _picked((given - right).abs(), finite), _picked(right.abs(), finite).clamp(min=magnitude)
    if not distance.numel():
        return Error(0.0, 0.0, 0)
    errors = torch.where(distance == 0, 0.0, distance / size)
    return Error(float(errors.square().mean().sqrt()), float(errors.max()), errors.numel())


def agrees_in_float64(error: Error) -> bool:
    """Whether a difference in float64 is rounding."""
    return error.worst <= FLOAT64_AGREEMENT


@dataclass(frozen=True)
class ErrorPair:
    """The errors of both sides in one tensor."""

    name: str
    upstream: Error
    port: Error


def joint_ratio(pairs: list[ErrorPair], dtype: torch.dtype) -> float:
    """The port's error in units of upstream's, over several tensors: 1.0 when they are equally far from the truth.

    No error counts as smaller than half a unit in the last place, which no program can promise to beat.
    """
    floor = torch.finfo(dtype).eps / 2
    elements = sum(pair.port.elements for pair in pairs)
    if not elements:
        return 1.0
    logs = (p.port.elements * (_log(p.port.rms, floor) - _log(p.upstream.rms, floor)) for p in pairs)
    return math.exp(min(sum(logs) / elements, 700.0))


def _log(error: float, floor: float) -> float:
    return math.log(min(max(error, floor), 1e300))


def joint_error(errors: list[Error]) -> float:
    """The root mean square of all elements of several tensors."""
    elements = sum(error.elements for error in errors)
    return math.sqrt(sum(error.elements * error.rms**2 for error in errors) / elements) if elements else 0.0


def worst_output_ratio(pairs: list[ErrorPair], dtype: torch.dtype) -> tuple[float, str]:
    """The largest ratio of a single output with enough elements, and its name; (0.0, "") if there is none."""
    large = [pair for pair in pairs if pair.port.elements >= ENOUGH]
    floor = max(joint_error([pair.upstream for pair in large]), torch.finfo(dtype).eps / 2)
    ratios = [(pair.port.rms / max(pair.upstream.rms, floor), pair.name) for pair in large]
    return max(ratios, default=(0.0, ""))


def worst_element_ratio(pairs: list[ErrorPair], dtype: torch.dtype) -> tuple[float, str]:
    """The largest ratio of the worst elements of both sides, of a single output with enough elements, and its name."""
    large = [pair for pair in pairs if pair.port.elements >= ENOUGH]
    floor = max(joint_error([pair.upstream for pair in large]), torch.finfo(dtype).eps / 2)
    ratios = [(pair.port.worst / max(pair.upstream.worst, floor), pair.name) for pair in large]
    return max(ratios, default=(0.0, ""))


def why_not_rounding(outputs: list[ErrorPair], gradients: list[ErrorPair], dtype: torch.dtype) -> str:
    """Why the port is further from float64 than upstream's own rounding explains; "" when it is not."""
    for what, pairs in (("outputs", outputs), ("gradients", gradients)):
        ratio = joint_ratio(pairs, dtype)
        if ratio > ERROR_RATIO:
            return f"the port's {what} are {ratio:.3g} times as far from float64 as upstream's, {ERROR_RATIO:g} allowed"
    ratio, name = worst_output_ratio(outputs, dtype)
    if ratio > ERROR_RATIO:
        return f"the port's `{name}` is {ratio:.3g} times as far from float64 as upstream's, {ERROR_RATIO:g} allowed"
    ratio, name = worst_element_ratio(outputs, dtype)
    if ratio > ELEMENT_RATIO:
        told = f"one element of the port's `{name}` is {ratio:.3g} times as far from float64 as any of upstream's"
        return f"{told}, {ELEMENT_RATIO:g} allowed"
    return ""


if __name__ == "__main__":
    from refiners.parity.measured.rounding_measured import main

    main()
