"""Mutants that are no faults: the spoilt node computes the same function, so no case could ever kill them.

Nothing is believed. A line of `equivalent.toml` claims it for some faults and says why; then the smallest node that
holds the fault is run, as it was and spoilt, on random inputs with random weights in float64, many times, and every
bit of the outputs must be equal (and the gradients, to within rounding: a sum of other zeros rounds otherwise).

    [[line]]
    fault = "swap-order::*PooledClassToken.FirstToken::with LayerNorm"    # `*` is anything
    scope = 1                                                             # how many levels above the node
    reason = "a norm works on each token by itself, so it may come before or after one of them is taken"

Where the scope reaches the root, the whole port is run as its case runs it, on other inputs of the case: a port whose
knobs travel through Context cannot be run otherwise.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from refiners.errors import ParityError
from refiners.parity import rounding
from refiners.parity.bits import same_bits
from refiners.parity.case import Inputs, Outputs
from refiners.parity.inputs import copy_for_one_side, draw_inputs, named_tensors, place_inputs
from refiners.parity.mutants.mutate import Bench, Mutant

TRIALS = 64
TRIALS_OF_A_WHOLE_PORT = 8


@dataclass(frozen=True)
class Line:
    """A claim about some faults."""

    fault: str
    reason: str
    scope: int = 0

    def covers(self, fault: str) -> bool:
        """Whether the claim is about this fault."""
        return re.fullmatch(".*".join(re.escape(part) for part in self.fault.split("*")), fault) is not None


def load_equivalents(path: Path) -> list[Line]:
    """Reads the claims of an `equivalent.toml`.

    Raises:
        ParityError: it cannot be read, or a line lacks a fault or a reason, or has another field.
    """
    try:
        tables = cast(list[dict[str, Any]], tomllib.loads(path.read_text(encoding="utf-8")).get("line", []))
        lines = [Line(**table) for table in tables]
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, TypeError) as error:
        raise ParityError(f"{path} cannot be used: {error}.") from error
    empty = [line.fault for line in lines if not line.fault.strip() or not line.reason.strip()]
    if empty:
        raise ParityError(f"{path} gives no reason for {', '.join(empty)}: say why the faults change nothing.")
    return lines


def why_not_equivalent(bench: Bench, mutant: Mutant, scope: int, *, trials: int = TRIALS, seed: int = 0) -> str:
    """What shows that a mutant computes something else than the port; "" when every trial is equal.

    Receives:
        bench: the case it belongs to.
        scope: how many levels above the node the function is compared; 0 is the node itself.
        trials: number of random inputs, each with random weights.
    """
    path = mutant.path
    for _ in range(scope):
        path = path.rpartition(".")[0]
    if path and path not in bench.seen:
        return f"there is no node {scope} levels above {mutant.path} whose inputs are known"
    node = bench.port.get_submodule(path) if path else _Whole(bench)
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        (
            _draw_weights(node, generator),
            [_draw_like(value, generator) for value in bench.seen[path].args] if path else [_other_inputs(bench, i)],
        )
        for i in range(trials if path else min(trials, TRIALS_OF_A_WHOLE_PORT))
    ]
    try:
        right = [_run(node, weights, args) for weights, args in drawn]
        with bench.planted(mutant) as changed:
            spoilt = [_run(node, weights, args) for weights, args in drawn]
    except Exception as error:
        return f"it cannot be run by itself: {type(error).__name__}: {error}"
    if not changed:
        return "the operator changes nothing"
    return next((why for one, other in zip(right, spoilt, strict=True) if (why := _apart(one, other))), "")


Ran = tuple[list[Tensor], list[Tensor | None]]


class _Whole(nn.Module):
    """A port, called as its case calls it."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.port = bench.port
        self.run = bench.case.run_port

    def forward(self, inputs: Inputs) -> Outputs:
        return self.run(self.port, copy_for_one_side(inputs, gradients=False))


def _other_inputs(bench: Bench, number: int) -> Inputs:
    other = replace(bench.case, seed=bench.case.seed + 1 + number)
    return place_inputs(draw_inputs(other), bench.lane.dtype, bench.lane.device)


def _draw_weights(node: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, parameter in node.named_parameters()
    }


def _draw_like(value: Any, generator: torch.Generator) -> Any:
    """A random tensor of the same kind: whole numbers stay between the smallest and the largest that were seen."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator, dtype=torch.float64).requires_grad_()
    low, high = (int(value.min()), int(value.max())) if value.numel() else (0, 1)
    return torch.randint(low, high + 1, value.shape, generator=generator).to(value.dtype)


def _run(node: nn.Module, weights: Mapping[str, Tensor], args: Sequence[Any]) -> Ran:
    output = torch.func.functional_call(node, dict(weights), tuple(args))
    outputs = [tensor for _, tensor in named_tensors(output)]
    sources = [value for value in (*weights.values(), *args) if isinstance(value, Tensor) and value.requires_grad]
    numbers = [tensor for tensor in outputs if tensor.requires_grad]
    if not numbers or not sources:
        return [tensor.detach() for tensor in outputs], []
    cotangents = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in numbers]
    gradients = torch.autograd.grad(numbers, sources, cotangents, allow_unused=True)
    return [tensor.detach() for tensor in outputs], list(gradients)


def _apart(right: Ran, spoilt: Ran) -> str:
    if len(right[1]) != len(spoilt[1]):
        return "gradients flow on one side only"
    if len(right[0]) != len(spoilt[0]) or not all(map(same_bits, right[0], spoilt[0])):
        return "the outputs differ on random inputs"
    for one, other in zip(right[1], spoilt[1], strict=True):
        if (one is None) != (other is None):
            return "a gradient flows on one side only"
        if one is None or other is None or same_bits(one, other):
            continue
        magnitude = rounding.typical_magnitude(one, gradient=True)
        if one.shape != other.shape or not rounding.agrees_in_float64(rounding.relative_error(other, one, magnitude)):
            return "the gradients differ on random inputs"
    return ""
