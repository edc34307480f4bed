"""When is a difference only rounding? The two constants of the verdict `ROUNDING`, and what justifies them.

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

Measured by `python -m refiners.parity.rounding` (CPU, one thread, torch 2.13.0, 40 seeds), on a two-layer transformer
with a convolution, against rewrites that change nothing but the order of operations, and against mistakes:

    float64, largest error of any element (bound 1e-10)
        rewrite addmm              at most  1.1e-14
        rewrite split_sum          at most  1.1e-14
        rewrite reversed_sum       at most  1.1e-14
        rewrite attention_by_hand  at most  8.0e-15
        rewrite norm_by_hand       at most  9.8e-15
        rewrite one_by_one         at most  9.2e-15
        mistake norm_eps_1e-6      at least 1.9e-05
        mistake gelu_tanh          at least 2.4e-03
        mistake bias_twice         at least 2.2e+00
    largest ratio to upstream's error (bound 2): outputs, gradients, one output alone
        float32  addmm              1.00, 1.00, 1.00
        float32  split_sum          1.00, 0.99, 1.00
        float32  reversed_sum       1.15, 1.09, 1.15
        float32  attention_by_hand  1.06, 1.07, 1.06
        float32  norm_by_hand       1.09, 1.06, 1.09
        float32  one_by_one         1.12, 1.02, 1.13
        bfloat16 addmm              1.21, 1.15, 1.21
        bfloat16 split_sum          1.30, 1.20, 1.30
        bfloat16 reversed_sum       1.00, 1.00, 1.00
        bfloat16 attention_by_hand  1.11, 1.06, 1.11
        bfloat16 norm_by_hand       1.00, 1.04, 1.00
        bfloat16 one_by_one         1.00, 1.06, 1.00
        float16  addmm              1.28, 1.12, 1.27
        float16  split_sum          1.27, 1.20, 1.27
        float16  reversed_sum       1.01, 1.01, 1.02
        float16  attention_by_hand  1.13, 1.08, 1.14
        float16  norm_by_hand       1.02, 1.02, 1.02
        float16  one_by_one         1.00, 1.05, 1.00
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT64_AGREEMENT = 1e-10
"""Largest relative error between both sides in float64."""

ERROR_RATIO = 2.0
"""Largest ratio of the port's error to upstream's in any other dtype."""

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
    magnitudes = magnitudes[magnitudes.isfinite() & (magnitudes > 0)]
    if not magnitudes.numel():
        return 0.0
    return float(magnitudes.square().mean().sqrt() if gradient else magnitudes.median())


def relative_error(tensor: Tensor, truth: Tensor, magnitude: float) -> Error:
    """The error of a tensor against the truth.

    Receives:
        tensor: in any dtype.
        truth: of the same shape.
        magnitude: from `typical_magnitude`, or of a larger group the tensor belongs to.

    Returns:
        the error, infinite where the truth is exactly zero everywhere and the tensor is not.
    """
    wide = torch.complex128 if truth.is_complex() else torch.float64
    given, right = tensor.detach().to(wide), truth.detach().to(wide)
    finite = given.isfinite() & right.isfinite()
    distance, size = (given - right).abs()[finite], right.abs()[finite].clamp(min=magnitude)
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


def why_not_rounding(outputs: list[ErrorPair], gradients: list[ErrorPair], dtype: torch.dtype) -> str:
    """Why the port is further from float64 than upstream's own rounding explains; "" when it is not."""
    for what, pairs in (("outputs", outputs), ("gradients", gradients)):
        ratio = joint_ratio(pairs, dtype)
        if ratio > ERROR_RATIO:
            return f"the port's {what} are {ratio:.3g} times as far from float64 as upstream's, {ERROR_RATIO:g} allowed"
    ratio, name = worst_output_ratio(outputs, dtype)
    if ratio > ERROR_RATIO:
        return f"the port's `{name}` is {ratio:.3g} times as far from float64 as upstream's, {ERROR_RATIO:g} allowed"
    return ""


if __name__ == "__main__":
    from refiners.parity.rounding_measured import main

    main()
