"""The law: what a case in a lane is called, and nothing is called equal that was not compared.

`BITWISE` needs every compared tensor to have the same shape, dtype and bits. `ROUNDING` needs (a) agreement in the
float64 lane and (b) a port that is not further from float64 than rounding explains; see `refiners.parity.rounding`.
Anything else is `DIFFERENT`, and so is a comparison that could not have failed: no elements, a constant or all-NaN
output, a tensor held against itself, a leaf that never ran, a side that trains or writes into its inputs.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refiners.parity import rounding
from refiners.parity.bits import Worst, find_worst, same_bits
from refiners.parity.lanes import Lane
from refiners.parity.pairing import Kind, Pair
from refiners.parity.result import Verdict
from refiners.parity.rounding import Error, ErrorPair


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What holding one pair of tensors together shows."""

    pair: Pair
    bitwise: bool
    fault: str = ""
    """Why no rounding can explain the difference; "" when it might."""
    worst: Worst | None = None
    difference: Error | None = None
    """Of the port against upstream, where they differ and can be subtracted."""
    errors: ErrorPair | None = None
    """Of both against float64, where there is a truth."""
    counts_in_ratio: bool = True
    """False for the gradients of weights without influence: noise around zero."""


def compare(pair: Pair, truth: Tensor | None, *, noise_magnitude: float | None = None) -> Comparison:
    """Holds two tensors together.

    Receives:
        pair: what to compare.
        truth: the same tensor in float64, if there is one.
        noise_magnitude: for a tensor that is zero but for noise, the magnitude of the others it is judged by.
    """
    ours, theirs = pair.upstream, pair.port
    if ours.shape != theirs.shape:
        return Comparison(
            pair=pair, bitwise=False, fault=f"shape {tuple(theirs.shape)} in the port, {tuple(ours.shape)} upstream"
        )
    if ours.dtype != theirs.dtype:
        return Comparison(pair=pair, bitwise=False, fault=f"{_dtype(theirs)} in the port, {_dtype(ours)} upstream")
    bitwise = same_bits(ours, theirs)
    fault, worst, difference, errors = "", None, None, None
    numeric = ours.is_floating_point() or ours.is_complex()
    if not bitwise:
        worst = find_worst(pair.label, ours, theirs)
        fault = _beyond_rounding(ours, theirs, numeric)
    if numeric:
        right = truth if truth is not None and truth.shape == ours.shape else None
        magnitude = noise_magnitude or 0.0
        if noise_magnitude is None and not (bitwise and (right is None or right is ours)):  # else nothing is divided
            scale = ours if right is None else right
            magnitude = rounding.typical_magnitude(scale, gradient=pair.kind.is_gradient)
        difference = None if bitwise else rounding.relative_error(theirs, ours, magnitude)
        if right is not None:
            upstream_error = rounding.relative_error(ours, right, magnitude)
            port_error = upstream_error if bitwise else rounding.relative_error(theirs, right, magnitude)
            errors = ErrorPair(pair.name, upstream_error, port_error)
    return Comparison(
        pair=pair, bitwise=bitwise, fault=fault, worst=worst, difference=difference, errors=errors,
        counts_in_ratio=noise_magnitude is None,
    )  # fmt: skip


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _beyond_rounding(ours: Tensor, theirs: Tensor, numeric: bool) -> str:
    if not numeric:
        return f"{_dtype(ours)} values differ, which rounding cannot explain"
    finite = ours.isfinite()
    if not torch.equal(finite, theirs.isfinite()):
        return "elements are finite on one side only"
    apart = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
    return "infinities or NaN differ" if bool((apart & ~finite).any()) else ""


def judge(
    comparisons: Sequence[Comparison], faults: Sequence[str], lane: Lane, *, float64_verdict: Verdict | None
) -> tuple[Verdict, list[str]]:
    """The verdict on a case in a lane, and the reasons it is not BITWISE.

    Receives:
        comparisons: all pairs of the case.
        faults: what makes it DIFFERENT whatever the pairs say.
        lane: where it ran.
        float64_verdict: of the same case in float64 on the same device; None where it was not run. Not read in the
            float64 lane itself.
    """
    beyond = [f"{c.pair}: {c.fault}{_at(c)}" for c in comparisons if c.fault]
    reasons = [*faults, *beyond]
    unequal = [c for c in comparisons if not c.bitwise]
    if not reasons and not unequal:
        return Verdict.BITWISE, []
    told = _unequal_in_short(unequal)
    if reasons:
        return Verdict.DIFFERENT, [*reasons, *told] if not beyond else reasons
    refusal = _float64_refusal(unequal) if lane.is_truth else _lane_refusal(comparisons, lane, float64_verdict)
    return (Verdict.DIFFERENT, [refusal, *told]) if refusal else (Verdict.ROUNDING, told)


def _at(comparison: Comparison) -> str:
    return f" ({comparison.worst})" if comparison.worst else ""


def _unequal_in_short(unequal: Sequence[Comparison]) -> list[str]:
    told = [f"{c.pair} differs, worst at {c.worst}" for c in unequal if c.worst]
    return told if len(told) <= 8 else [*told[:8], f"and {len(told) - 8} more tensors differ"]


def _float64_refusal(unequal: Sequence[Comparison]) -> str:
    apart = [(c.difference.worst, c) for c in unequal if c.difference and not rounding.agrees_in_float64(c.difference)]
    if not apart:
        return ""
    outputs = [found for found in apart if not found[1].pair.kind.is_gradient]
    error, comparison = max(outputs or apart, key=lambda found: found[0])
    allowed = f"rounding explains {rounding.FLOAT64_AGREEMENT:g}"
    return f"{comparison.pair} differs in float64 by {error:.2g} relative, {allowed}"


def _lane_refusal(comparisons: Sequence[Comparison], lane: Lane, float64_verdict: Verdict | None) -> str:
    if float64_verdict is None:
        return "not bitwise, and the case has no float64 lane that could tell rounding from a fault"
    if float64_verdict is Verdict.DIFFERENT:
        return "not bitwise, and DIFFERENT in float64 as well"
    return refusal_by_ratio(comparisons, lane.dtype)


def refusal_by_ratio(comparisons: Sequence[Comparison], dtype: torch.dtype) -> str:
    """Why the errors of both sides against the truth are not those of rounding in a dtype; "" when they may be."""
    counted = [c for c in comparisons if c.counts_in_ratio and c.errors]
    if not counted:
        return "not bitwise, and there is no float64 truth to hold it against"
    outputs = [c.errors for c in counted if c.errors and not c.pair.kind.is_gradient]
    gradients = [c.errors for c in counted if c.errors and c.pair.kind.is_gradient]
    return rounding.why_not_rounding(outputs, gradients, dtype)


def uninformative(pairs: Sequence[Pair], weights: Collection[int]) -> list[str]:
    """Faults of a comparison that could not have failed.

    Receives:
        pairs: outputs and taps.
        weights: addresses of the storages that both sides share on purpose.
    """
    faults: list[str] = []
    if not any(pair.upstream.numel() for pair in pairs if pair.kind is Kind.OUTPUT):
        return ["zero elements were compared: the case has no outputs, or all of them are empty"]
    informative = False
    for pair in pairs:
        fault = _uninformative(pair)
        is_number = pair.upstream.is_floating_point() or pair.upstream.is_complex()
        address = pair.upstream.untyped_storage().data_ptr()
        is_shared = bool(address) and address == pair.port.untyped_storage().data_ptr()
        informative |= not fault and pair.kind is Kind.OUTPUT and not is_shared
        if fault and is_number:
            faults.append(f"{pair} {fault}: nothing informative was compared")
        if is_shared and address not in weights:
            faults.append(f"{pair} is one tensor on both sides: it was compared with itself")
    if not informative and not faults:
        faults.append("every output is constant, or a weight that both sides share: nothing informative was compared")
    return faults


def _uninformative(pair: Pair) -> str:
    if not pair.upstream.numel():
        return "has no elements"
    for side, tensor in (("upstream", pair.upstream), ("in the port", pair.port)):
        values = tensor.flatten()
        if tensor.is_floating_point() or tensor.is_complex():
            values = values[~values.isnan()]
            if not values.numel():
                return f"is NaN everywhere {side}"
            if not bool(values.isfinite().any()):
                return f"has no finite element {side}"
        if tensor.numel() > 1 and bool((values == values[:1]).all()):
            return f"is constant {side}"
    return ""
