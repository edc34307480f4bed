"""Several sets of LoRAs as one, each with a weight.

    specs = combine(style.specs(), other.specs(), weights=[0.7, 0.3], how="concatenate")
    inject_loras(model, specs, name="both")

| how | the rank | what it is |
|---|---|---|
| `concatenate` | the sum of the ranks | exactly the weighted sum of the changes |
| `svd` | as asked | the nearest to that sum among the changes of that rank |
| `linear` | the same for all | the sums of the factors, weighted by square roots: cheap, not the sum of the changes |

The operations are those of peft 0.21.2 (`LoraModel.add_weighted_adapter`: `cat`, `svd` and `linear`), which keeps
weights in float32 whatever the tensors are. Strengths (alpha) go into the tensors; the result has none.

Differs from upstream: a set that lacks a layer adds nothing there, as in peft, but the biases of LoRAs are combined
instead of being lost, and `svd` computes the reduced decomposition, whose discarded rest peft computes too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from refiners.errors import AdapterError
from refiners.fluxion.adapters.lora.spec import DeltaSpec

Specs = Mapping[str, DeltaSpec]
How = Literal["linear", "concatenate", "svd"]
# One LoRA of a layer: what it is, and its weight.
Weighted = tuple[DeltaSpec, float]
_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {
    3: functional.conv1d,
    4: functional.conv2d,
    5: functional.conv3d,
}
# How many lines an error shows.
SHOWN = 12


def combine(
    *sets: Specs, weights: Sequence[float] | None = None, how: How = "concatenate", rank: int | None = None
) -> dict[str, DeltaSpec]:
    """Make one set of several.

    Args:
        *sets: For each set its LoRAs by path, as `LoraSet.specs` or a file gives them.
        weights: One for each set, negative ones to subtract; 1.0 each unless given.
        how: See the top of this file.
        rank: Of the result, for `svd`; the largest of the layer's ranks unless given.

    Returns:
        The LoRAs by path, in the order in which the sets name them. Their tensors are new ones.

    Raises:
        AdapterError: (a ValueError) There is no set or not one weight for each, a method that is no LoRA, shapes or
            ranks that do not go together. All layers are listed.

    Example:
        >>> import torch
        >>> from refiners.fluxion.adapters import DeltaSpec, combine
        >>> spec = DeltaSpec("lora", {"down": torch.ones(1, 2), "up": torch.ones(3, 1)})
        >>> combine({"Linear": spec}, {"Linear": spec}, weights=[0.5, -2.0])["Linear"].tensors["down"]
        tensor([[ 0.5000,  0.5000],
                [-2.0000, -2.0000]])
    """
    weights = [1.0] * len(sets) if weights is None else list(weights)
    if not sets or len(weights) != len(sets):
        raise AdapterError(f"combine needs sets and one weight for each: got {len(sets)} sets, {len(weights)} weights.")
    makers: dict[str, Callable[[list[Weighted]], DeltaSpec]] = {
        "linear": _linear,
        "concatenate": _concatenated,
        "svd": lambda parts: _decomposed(parts, rank),
    }
    if how not in makers:
        raise AdapterError(f"how={how!r} is unknown: choose from {', '.join(makers)}.")
    if rank is not None and (how != "svd" or rank < 1):
        raise AdapterError(f"rank={rank} is for how='svd', and 1 or more.")
    layers: dict[str, list[Weighted]] = {}
    for specs, weight in zip(sets, weights, strict=True):
        for path, spec in specs.items():
            layers.setdefault(path, []).append((spec, weight))
    problems = [f"  {path}: {problem}" for path, parts in layers.items() for problem in _problems(parts, how)]
    if problems:
        rest = [f"  … and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        text = "\n".join(problems[:SHOWN] + rest)
        raise AdapterError(f"The sets cannot be combined by how={how!r}.\n{text}")
    with torch.no_grad():
        return {path: makers[how](parts) for path, parts in layers.items()}


def _problems(parts: list[Weighted], how: str) -> list[str]:
    specs = [spec for spec, _ in parts]
    problems = [problem for spec in specs for problem in spec.validate()]
    problems += [f"a {spec.method} is no sum of products of low rank" for spec in specs if spec.method != "lora"]
    if problems:
        return problems
    pairs = [(spec.tensors["down"].shape, spec.tensors["up"].shape) for spec in specs]
    shapes = {(tuple(down[1:]), (up[0], *up[2:])) for down, up in pairs}
    if len(shapes) > 1:
        return [f"shapes differ: {', '.join(str([list(down), list(up)]) for down, up in sorted(shapes))}"]
    if any(_groups(spec) > 1 for spec in specs):
        return ["it is for a convolution with groups, whose ranks do not add up"]
    if how == "linear" and len({spec.rank for spec in specs}) > 1:
        return [f"linear needs one rank, got {' and '.join(str(spec.rank) for spec in specs)}: concatenate them"]
    if how == "svd" and any(size != 1 for size in specs[0].tensors["up"].shape[2:]):
        return ["up has a kernel of its own, so there is no single matrix to decompose"]
    return []


def _groups(spec: DeltaSpec) -> int:
    return spec.tensors["down"].shape[0] // spec.tensors["up"].shape[1]


def strength(spec: DeltaSpec) -> float:
    """What a spec is multiplied by at scale 1."""
    if spec.alpha is None:
        return 1.0
    rank = spec.rank or 1
    return spec.alpha / (math.sqrt(rank) if spec.rank_stabilized else rank)


def _combined(down: Tensor, up: Tensor, parts: list[Weighted]) -> DeltaSpec:
    tensors = {"down": down.contiguous(), "up": up.contiguous()}
    has_bias = [(spec, weight) for spec, weight in parts if "up_bias" in spec.tensors]
    biases = [spec.tensors["up_bias"] * (weight * strength(spec)) for spec, weight in has_bias]
    if biases:
        tensors["up_bias"] = torch.stack(biases).sum(dim=0).to(up.dtype)
    return DeltaSpec("lora", tensors)


def _concatenated(parts: list[Weighted]) -> DeltaSpec:
    downs = [spec.tensors["down"] * weight * strength(spec) for spec, weight in parts]
    return _combined(torch.cat(downs), torch.cat([spec.tensors["up"] for spec, _ in parts], dim=1), parts)


def _linear(parts: list[Weighted]) -> DeltaSpec:
    strengths = [weight * strength(spec) for spec, weight in parts]
    # The sign is on one side only: on both, it would be lost.
    signed = [math.copysign(math.sqrt(abs(number)), number) if number else 0.0 for number in strengths]
    down = _weighted_sum([spec.tensors["down"] for spec, _ in parts], signed)
    up = _weighted_sum([spec.tensors["up"] for spec, _ in parts], [abs(number) for number in signed])
    dtype = parts[0][0].tensors["down"].dtype
    return _combined(down.to(dtype), up.to(dtype), parts)


def _decomposed(parts: list[Weighted], rank: int | None) -> DeltaSpec:
    first = parts[0][0].tensors
    rank = max(spec.rank or 1 for spec, _ in parts) if rank is None else rank
    changes = [_change(spec) for spec, _ in parts]
    change = _weighted_sum(changes, [weight for _, weight in parts])
    dtype = change.dtype
    # No decomposition is defined in half precision.
    wide = change.float() if dtype in (torch.float16, torch.bfloat16) else change
    left, values, right = _decompose(wide)
    rank = min(rank, len(values))
    up: Tensor = torch.matmul(left[:, :rank], torch.diag(values[:rank]))
    down = right[:rank].to(dtype).reshape(rank, *first["down"].shape[1:])
    return _combined(down, up.to(dtype).reshape(-1, rank, *first["up"].shape[2:]), parts)


def _change(spec: DeltaSpec) -> Tensor:
    """What a LoRA adds to the weight of its layer, as a matrix [out, in · kernel]."""
    down, up = spec.tensors["down"], spec.tensors["up"]
    dtype = up.dtype
    if down.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        down, up = down.float(), up.float()
    if down[0, 0].numel() == 1:
        return ((up.flatten(1) @ down.flatten(1)) * strength(spec)).to(dtype)
    convolve = _CONVOLUTIONS[down.ndim]
    return (convolve(down.transpose(0, 1), up).transpose(0, 1) * strength(spec)).to(dtype).flatten(1)


def _decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    decompose: Any = cast(Any, torch.linalg).svd
    return decompose(matrix, full_matrices=False)


def _weighted_sum(tensors: list[Tensor], weights: list[float]) -> Tensor:
    factors = torch.tensor(weights, dtype=torch.float32).to(tensors[0].device)
    stacked = torch.stack(tensors)
    return (stacked * factors.view(-1, *[1] * tensors[0].ndim)).sum(dim=0)
