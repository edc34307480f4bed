"""A second look at a case that seems equal: other weights, other inputs, and the first ones once more.

One run cannot tell a model from a table of its results. So both sides run again, forward only, the port before
upstream:

1. with inputs drawn from another seed and every weight moved by a tenth of itself. A side that keeps its first result,
   returns stored values or computes with numbers of its own now differs. Some output of upstream has to change, too:
   otherwise nothing that was compared depends on anything.
2. with the first weights and inputs, which have to give the first bits: no state is left over between two forwards.
3. with them and without gradients, where the two sides have to agree as well: a model may ask whether there are any.

It takes place once for a case, in the first lane that runs; a case that is red already is not looked at twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from refiners.parity import rounding
from refiners.parity.bits import same_bits
from refiners.parity.case import Case
from refiners.parity.inputs import draw_inputs, named_tensors, place_inputs
from refiners.parity.lanes import Lane
from refiners.parity.pairing import Kind, Pair
from refiners.parity.side import Observed, observe
from refiners.parity.verdict import compare
from refiners.parity.weights import floating_entries, generator_for, share

MOVED_BY = 0.1
"""Weights change by this share of themselves, times a normal number."""

Outputs = Mapping[str, Tensor]

_MOVED = "with other weights and inputs the output"


def look_again(
    case: Case, lane: Lane, models: tuple[nn.Module, nn.Module], first: tuple[Observed, Observed], inputs: Any
) -> list[str]:
    """What the second look shows, a sentence for each fault. Weights and inputs are as before when it returns.

    Receives:
        models: upstream, then the port, which share their storages.
        first: what both computed.
        inputs: what they computed it from, as drawn.
    """
    upstream, port = models
    seen = tuple({name: tensor.clone() for name, tensor in side.outputs.items()} for side in first)
    equal = all(same_bits(tensor, seen[1][name]) for name, tensor in seen[0].items())
    kept = {entry.key: entry.tensor.detach().clone() for entry in floating_entries(upstream)}
    others = draw_inputs(replace(case, seed=case.seed + 1))
    _set_weights(upstream, lambda key, tensor: _moved(key, tensor, case.seed + 1))
    share(upstream, port, case.key_map)
    theirs, ours = _outputs(case, lane, port, others, is_port=True), _outputs(case, lane, upstream, others)
    faults = _differences(ours, theirs, lane) if equal or lane.is_truth else []
    is_same = all(name in ours and same_bits(tensor, ours[name]) for name, tensor in seen[0].items())
    if is_same and (kept or _differ(inputs, others)):
        faults.append("no output changes when weights and inputs do: nothing informative was compared")
    _set_weights(upstream, lambda key, tensor: kept[key])
    share(upstream, port, case.key_map)
    for side, model, before in (("the port", port, seen[1]), ("upstream", upstream, seen[0])):
        again = _outputs(case, lane, model, inputs, is_port=model is port)
        changed = [name for name, tensor in before.items() if name not in again or not same_bits(again[name], tensor)]
        faults += [f"{side} does not repeat its output `{name}` bit for bit" for name in changed]
    if case.gradients and (equal or lane.is_truth):
        alone = replace(case, gradients=False)
        quiet = [_outputs(alone, lane, model, inputs, is_port=model is port) for model in (port, upstream)]
        faults += _differences(quiet[1], quiet[0], lane, told="under `torch.no_grad()` the output")
    return faults


def _differ(inputs: Any, others: Any) -> bool:
    first, second = dict(named_tensors(inputs)), dict(named_tensors(others))
    return first.keys() != second.keys() or not all(same_bits(tensor, second[name]) for name, tensor in first.items())


@torch.no_grad()
def _set_weights(model: nn.Module, value: Callable[[str, Tensor], Tensor]) -> None:
    for entry in floating_entries(model):
        entry.tensor.copy_(value(entry.key, entry.tensor))


def _moved(key: str, tensor: Tensor, seed: int) -> Tensor:
    factor = 1 + MOVED_BY * torch.randn(tensor.shape, generator=generator_for(seed, key), dtype=torch.float64)
    return tensor * factor.to(tensor)


def _outputs(case: Case, lane: Lane, model: nn.Module, inputs: Any, *, is_port: bool = False) -> Outputs:
    run = case.run_port if is_port else case.run_upstream
    placed = place_inputs(inputs, lane.dtype, lane.device)
    seen = observe(
        model,
        run,
        placed,
        taps={},
        gradients=case.gradients,
        seed=case.seed,
        rounded_to=lane.dtype,
        backward=False,
    )
    return {name: tensor.clone() for name, tensor in seen.outputs.items()}


def _differences(ours: Outputs, theirs: Outputs, lane: Lane, *, told: str = _MOVED) -> list[str]:
    faults = [f"{told} `{name}` is on one side only" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in [name for name in ours if name in theirs]:
        found = compare(Pair(name, Kind.OUTPUT, ours[name], theirs[name]), None)
        rounded = lane.is_truth and not found.fault and found.difference
        if not found.bitwise and not (rounded and rounding.agrees_in_float64(rounded)):
            why = (
                "a side has state, stored values or constants of its own" if told is _MOVED else "it asks for the mode"
            )
            faults.append(f"{told} `{name}` differs: {why}")
    return faults
