"""The error along the forward: how far the port is from upstream behind each leaf, when nothing is taught.

A fault shows as the step at which the error leaves zero; what comes after passes it on, enlarges it or damps it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from refiners.parity.bits import same_bits
from refiners.parity.explain import Explanation
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.modules import named_modules
from refiners.parity.operations import tensors_in
from refiners.parity.runner import CaseRunner
from refiners.parity.told import Depth, LeafError, Told, tell

MOST_POINTS = 2000


def tell_with_depth(runner: CaseRunner, lane: Lane, explanation: Explanation) -> Told:
    """The explanation as data, with the error along the forward. That it cannot be had is a note."""
    try:
        depth = Depth(error_along_depth(runner, lane, explanation.pairing, explanation.marks))
    except Exception as error:  # the port may fail in many ways; what was explained stands
        first = next(iter(str(error).strip().splitlines()), "")
        depth = Depth(note=f"the error along the forward cannot be shown: {type(error).__name__}: {first}")
    return tell(explanation, lane.name, depth)


def error_along_depth(
    runner: CaseRunner, lane: Lane, pairing: Mapping[str, str], marks: Mapping[str, str]
) -> list[LeafError]:
    """The error behind each paired leaf, in the order in which the port calls them, then that of the outputs.

    Receives:
        pairing: path of a leaf of the port → path of the leaf of upstream.
        marks: path of a leaf of the port → what it does to the error.
    """
    with held_equal(lane, threads=runner.threads):
        upstream, port, _ = runner.sides(lane)
        right: dict[str, list[Tensor]] = {}
        errors: list[LeafError] = []
        counts: dict[str, int] = {}

        def keep(path: str, tensor: Tensor) -> None:
            right.setdefault(path, []).append(tensor.detach().clone())

        def compare(path: str, tensor: Tensor) -> None:
            other, call = pairing[path], counts.get(path, 0)
            counts[path] = call + 1
            if call < len(right.get(other, ())) and len(errors) < MOST_POINTS:
                error = relative_error(tensor, right[other][call])
                errors.append(LeafError(port=path, upstream=other, error=error, mark=marks.get(path, "")))

        ours = _run_with(upstream, list(pairing.values()), keep, runner, lane, is_port=False)
        theirs = _run_with(port, list(pairing), compare, runner, lane, is_port=True)
        for name in [name for name in ours if name in theirs]:
            error = relative_error(theirs[name], ours[name])
            errors.append(LeafError(port=f"output `{name}`", upstream=name, error=error, mark="output"))
        return errors


def _run_with(
    model: nn.Module,
    paths: Sequence[str],
    function: Callable[[str, Tensor], None],
    runner: CaseRunner,
    lane: Lane,
    *,
    is_port: bool,
) -> Mapping[str, Tensor]:
    """Runs a side; the function is called with each output of each of these modules."""
    wanted = set(paths)

    def hook(path: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            first = next(iter(tensors_in(output)), None)
            if first is not None:
                function(path, first)

        return leave

    with ExitStack() as stack:
        for path, module in named_modules(model):
            if path in wanted:
                stack.callback(module.register_forward_hook(hook(path)).remove)
        return runner.look(lane, model, is_port=is_port, gradients=False).outputs


def relative_error(actual: Tensor, expected: Tensor) -> float | None:
    """Root mean square of the difference, relative to the expected values.

    Returns:
        0.0 exactly where all bits agree, None where there is no finite number.
    """
    if actual.numel() != expected.numel():
        return None
    actual = actual.detach().reshape(expected.shape)
    if same_bits(actual, expected):
        return 0.0
    difference = (actual.to(torch.float64) - expected.to(torch.float64)).square().mean().sqrt().item()
    size = expected.to(torch.float64).square().mean().sqrt().item()
    error = difference / size if size else math.inf
    # Bits that differ and values that do not, as the two zeros, are the smallest error there is.
    return max(error, 5e-324) if math.isfinite(error) else None
