"""The tensors of a plan carried over, and checked against what is wanted."""

from collections.abc import Callable

import torch
from torch import Tensor

from refiners.conversion.pairing import Plan
from refiners.conversion.problems import Problems
from refiners.conversion.weights import Entries, same_bits
from refiners.errors import ConversionError


@torch.no_grad()
def transfer(plan: Plan, given: Entries, wanted: Entries | None, to_port: bool) -> dict[str, Tensor]:
    """The tensors that the plan makes of the given ones; what does not fit is added to the plan's problems.

    Receives:
        plan: the pairings.
        given: the tensors of one side.
        wanted: the shapes of the other side, None to take what comes.
        to_port: whether upstream's tensors are given, or the port's.
    """
    results: dict[str, Tensor] = {}
    for pair in plan.pairings:
        before, after = (pair.upstream, pair.port) if to_port else (pair.port, pair.upstream)
        try:
            tensors = [given.tensors[key] for key in before]
            made = pair.to_port(tensors) if to_port else pair.to_upstream(tensors)
        except ConversionError as error:
            plan.problems.add("shape", before[0], str(error))
            continue
        for key, tensor in zip(after, made, strict=True):
            if wanted is None or _fits(plan.problems, key, tensor, wanted, before):
                results[key] = tensor
    return _fill_ties(plan.problems, results, wanted) if wanted is not None and to_port else results


def check_upstream(plan: Plan, given: Entries) -> list[str]:
    """Adds to the plan's problems the upstream tensors that stay out although they hold bytes of their own.

    Returns:
        a line for each that holds such bytes and that upstream does not read either.
    """
    odd: list[str] = []
    for key, original in plan.tied.items():
        if not same_bits(given.tensors[key], given.tensors[original]):
            plan.problems.add("value", key, f"is declared to repeat {original!r} and has other bytes")
    for key, ignored in plan.ignored.items():
        tensor = given.tensors[key]
        if ignored.value is None or tensor.is_meta:
            continue
        if same_bits(tensor.cpu(), _compute(ignored.value, tensor, tensor.dtype)):
            continue
        if ignored.upstream_reads:
            plan.problems.add("value", key, f"is recomputed ({ignored.reason}) and has other bytes")
        else:
            odd.append(f"{key} holds other values than those that count ({ignored.reason}): it is left out")
    return odd


def recomputed(plan: Plan, wanted: Entries) -> dict[str, Tensor]:
    """The ignored upstream tensors that can be computed, for the shapes that are wanted."""
    tensors: dict[str, Tensor] = {}
    for key, ignored in plan.ignored.items():
        if ignored.value is not None:
            like = wanted.tensors[key]
            tensors[key] = _compute(ignored.value, like, None if key in wanted.only_shapes else like.dtype)
    return tensors


def _compute(value: Callable[[torch.Size], Tensor], like: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value(like.shape).to(dtype).contiguous()


def _fits(problems: Problems, key: str, tensor: Tensor, wanted: Entries, made_of: tuple[str, ...]) -> bool:
    expected = wanted.tensors[key]
    if tensor.shape != expected.shape:
        source = " and ".join(map(repr, made_of))
        problems.add("shape", key, f"needs {tuple(expected.shape)}, {source} gives {tuple(tensor.shape)}")
        return False
    if key not in wanted.only_shapes and _family(tensor.dtype) != _family(expected.dtype):
        source = " and ".join(map(repr, made_of))
        problems.add("dtype", key, f"needs {expected.dtype}, {source} gives {tensor.dtype}")
        return False
    return True


def _family(dtype: torch.dtype) -> tuple[bool, bool]:
    return dtype.is_floating_point, dtype.is_complex


def _fill_ties(problems: Problems, results: dict[str, Tensor], wanted: Entries) -> dict[str, Tensor]:
    """One tensor for all keys of one parameter of the port; upstream may have given it under several keys."""
    shared: dict[str, Tensor] = {}
    for key, tensor in results.items():
        first = wanted.ties.get(key, key)
        other = shared.setdefault(first, tensor)
        if other is not tensor and not same_bits(other, tensor):
            problems.add("value", key, f"is the same parameter as {first!r}, upstream's tensors for them differ")
    names = {key: wanted.ties.get(key, key) for key in wanted.tensors}
    return {key: shared[first] for key, first in names.items() if first in shared}
