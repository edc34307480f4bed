"""Other weights in the place of those that are there: no layer is built, and no parameter is replaced by another.

All weights are checked before the first is written. What is written can be undone by a transaction, down to the bit, so
that an interrupt in the middle of a set leaves the old one. For that the old values are kept until all is written.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from refiners.errors import AdapterError
from refiners.fluxion.adapters.lora.building import Weight
from refiners.fluxion.adapters.lora.delta import Delta
from refiners.fluxion.adapters.lora.spec import DeltaSpec, are_finite
from refiners.fluxion.adapters.weights import nearest
from refiners.fluxion.layers.journal import all_or_nothing, note_values

# How many lines an error shows.
SHOWN = 20


class _Planned(NamedTuple):
    """An adapter, the spec that goes into it as it was given and in the adapter's own form, and where it goes."""

    delta: Delta[Any]
    spec: DeltaSpec
    own: DeltaSpec
    weights: dict[str, Weight]


@all_or_nothing
def swap_specs(deltas: Mapping[str, Delta[Any]], specs: Mapping[str, DeltaSpec], title: str) -> None:
    """Put the weights of specs into adapters, by path.

    Raises:
        AdapterError: (a ValueError) Specs are missing, are for other layers, do not fit, or hold values that are not
            finite. All are listed, and nothing was written.
    """
    problems = [f"  {path}: missing" for path in deltas if path not in specs]
    problems += [f"  {path}: unexpected{nearest(path, deltas)}" for path in specs if path not in deltas]
    # All values at once, which is quick; where that is not enough to tell, those of each spec by itself.
    is_finite = are_finite(tensor for spec in specs.values() for tensor in spec.tensors.values())
    plan: list[_Planned] = []
    for path, delta in deltas.items():
        if path in specs:
            planned = _Planned(delta, specs[path], delta.in_own_form(specs[path]), delta.weights())
            wrong = misfits(delta, planned.own, planned.weights, with_values=not is_finite)
            if wrong:
                problems.append(f"  {path}: {'; '.join(wrong)}")
            plan.append(planned)
    if problems:
        text = "\n".join(shortened(problems))
        raise AdapterError(f"The specs do not fit {title}, and nothing was written.\n{text}")
    _write(plan)


@all_or_nothing
def write_spec(delta: Delta[Any], spec: DeltaSpec) -> None:
    """Put the weights of a spec that fits, see `misfits`, into an adapter."""
    _write([_Planned(delta, spec, delta.in_own_form(spec), delta.weights())])


def misfits(delta: Delta[Any], spec: DeltaSpec, weights: Mapping[str, Weight], with_values: bool = True) -> list[str]:
    """Why the weights of a spec cannot be put into an adapter. Empty if they can.

    Args:
        delta: The adapter.
        spec: In the adapter's own form.
        weights: Those of the adapter.
        with_values: See `DeltaSpec.validate`.
    """
    problems = spec.validate(with_values)
    if spec.method != delta.method:
        return [f"it is a {spec.method}, and this is a {delta.method}"]
    if not problems and weights.keys() != spec.tensors.keys():
        return [f"its tensors are {', '.join(spec.tensors)}, and here are {', '.join(weights)}"]
    for role, weight in weights.items() if not problems else ():
        tensor = weight.tensor
        new, shape = spec.tensors[role].shape, tensor.shape
        if new != shape and not _is_smaller(new, shape, weight.rank_axes):
            problems.append(f"{role} is {list(new)}, and here is {list(shape)}")
        if tensor.is_meta:
            problems.append(f"{role} is on the meta device, where no values can be loaded")
    return problems


def _is_smaller(new: torch.Size, shape: torch.Size, rank_axes: tuple[int, ...]) -> bool:
    return len(new) == len(shape) and all(
        given == size or (axis in rank_axes and given < size)
        for axis, (given, size) in enumerate(zip(new, shape, strict=True))
    )


def _write(plan: list[_Planned]) -> None:
    values = [weight.tensor.detach() for planned in plan for weight in planned.weights.values()]
    note_values(values)
    parameters = iter(values)
    for delta, spec, own, weights in plan:
        scale = delta.scale
        delta.note_strength()
        for role, weight in weights.items():
            new, parameter = own.tensors[role].detach(), next(parameters)
            if parameter.shape != new.shape:
                parameter.zero_()
                for axis in weight.rank_axes:
                    parameter = parameter.narrow(axis, 0, new.shape[axis])
            parameter.copy_(new)
        delta.set_strength(spec, scale)


def shortened(problems: list[str]) -> list[str]:
    """As many lines as an error shows."""
    rest = len(problems) - SHOWN
    return problems[:SHOWN] + ([f"  … and {rest} more"] if rest > 0 else [])
