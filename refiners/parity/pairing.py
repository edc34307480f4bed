"""Which tensor of one side stands against which of the other, and what has no counterpart."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from refiners.parity.case import Conversion
from refiners.parity.side import Observed
from refiners.parity.weights import floating_entries


class Kind(StrEnum):
    """What a compared tensor is."""

    OUTPUT = "output"
    TAP = "tap"
    GRADIENT = "gradient"
    INPUT_GRADIENT = "input gradient"

    @property
    def is_gradient(self) -> bool:
        """Whether it comes from the backward pass."""
        return self in (Kind.GRADIENT, Kind.INPUT_GRADIENT)


@dataclass(frozen=True)
class Pair:
    """A tensor of upstream and the one of the port that must equal it."""

    name: str
    kind: Kind
    upstream: Tensor
    port: Tensor

    @property
    def label(self) -> str:
        """Its name among all compared tensors: outputs keep theirs."""
        return self.name if self.kind is Kind.OUTPUT else f"{self.kind} {self.name}"

    def __str__(self) -> str:
        return f"{self.kind} `{self.name}`"


def pair_outputs(upstream: Observed, port: Observed) -> tuple[list[Pair], list[str]]:
    """Outputs by name and taps by name and call, and the faults of those without a counterpart."""
    pairs = [
        Pair(name, Kind.OUTPUT, t, port.outputs[name]) for name, t in upstream.outputs.items() if name in port.outputs
    ]
    faults = [f"the port does not return the output `{name}`" for name in upstream.outputs if name not in port.outputs]
    faults += [
        f"the port returns `{name}`, which upstream does not" for name in port.outputs if name not in upstream.outputs
    ]
    for name, calls in upstream.taps.items():
        others = port.taps.get(name, [])
        if len(calls) != len(others) or not calls:
            faults.append(f"the tap `{name}` gave {len(calls)} tensors upstream and {len(others)} in the port")
        pairs += [
            Pair(_call(name, i), Kind.TAP, ours, theirs)
            for i, (ours, theirs) in enumerate(zip(calls, others, strict=False))
        ]
    return pairs, faults


def _call(name: str, index: int) -> str:
    return name if index == 0 else f"{name} (call {index + 1})"


def truth_tensors(truth: Observed) -> dict[tuple[Kind, str], Tensor]:
    """Everything one side computed, under the kind and the name of the pair it belongs to."""
    found = {(Kind.OUTPUT, name): tensor for name, tensor in truth.outputs.items()}
    for name, calls in truth.taps.items():
        found |= {(Kind.TAP, _call(name, i)): tensor for i, tensor in enumerate(calls)}
    for kind, gradients in ((Kind.GRADIENT, truth.gradients), (Kind.INPUT_GRADIENT, truth.input_gradients)):
        found |= {(kind, name): gradient for name, gradient in gradients.items() if gradient is not None}
    return found


def pair_gradients(
    upstream: Observed,
    port: Observed,
    models: tuple[nn.Module, nn.Module],
    key_map: Conversion,
    *,
    frozen: Collection[str] = (),
) -> tuple[list[Pair], list[str]]:
    """Gradients of weights under upstream's keys and of inputs by name, and what has no counterpart.

    A gradient that is None counts as zero; where both sides have none, nothing is compared.

    Receives:
        upstream, port: what both sides computed.
        models: the upstream model, then the port.
        key_map: its inverse turns the port's gradients into upstream's keys.
        frozen: upstream's keys that nobody trains; the port may hold them as buffers.
    """
    alone = sorted(upstream.differentiable ^ port.differentiable)
    sides = {name: "upstream" if name in upstream.differentiable else "in the port" for name in alone}
    faults = [
        f"the output `{name}` can be differentiated {side} only"
        for name, side in sides.items()
        if name in upstream.outputs and name in port.outputs
    ]
    theirs = _under_upstream_keys(port, models, key_map)
    ties = {key: entry.keys for entry in floating_entries(models[0]) for key in entry.keys}
    pairs: list[Pair] = []
    for key, gradient in upstream.gradients.items():
        if key in frozen:
            continue
        if key in theirs:
            pairs += _pair(key, Kind.GRADIENT, gradient, theirs[key])
        elif gradient is not None and bool(gradient.any()) and not any(other in theirs for other in ties[key]):
            faults.append(f"upstream's `{key}` influences the outputs, but the key map gives the port nothing for it")
    for name, gradient in upstream.input_gradients.items():
        pairs += _pair(name, Kind.INPUT_GRADIENT, gradient, port.input_gradients.get(name))
    return pairs, faults


def _pair(name: str, kind: Kind, ours: Tensor | None, theirs: Tensor | None) -> list[Pair]:
    some = ours if ours is not None else theirs
    if some is None:
        return []
    ours = torch.zeros_like(some) if ours is None else ours
    theirs = torch.zeros_like(some) if theirs is None else theirs
    if ours.shape == theirs.shape and not bool(ours.any()) and not bool(theirs.any()):
        return []
    return [Pair(name, kind, ours, theirs)]


def _under_upstream_keys(
    port: Observed, models: tuple[nn.Module, nn.Module], key_map: Conversion
) -> Mapping[str, Tensor]:
    filled: dict[str, Tensor] = {}
    for key, value in models[1].state_dict().items():
        gradient = port.gradients.get(key)
        filled[key] = torch.zeros_like(value) if gradient is None else gradient
    return key_map.invert(filled, models[0].state_dict())
