"""Whether an adapter fits a layer: the shape of the change that its tensors make, beside that of the weight."""

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor, nn

from refiners.fluxion.adapters.lora.forms import with_axes
from refiners.fluxion.adapters.lora.spec import DeltaSpec

Shape = tuple[int, ...]


def misfit(spec: DeltaSpec, layer: nn.Module) -> str:
    """What keeps a sound adapter from fitting a layer, "" if nothing does.

    Example:
        >>> spec = DeltaSpec("lora", {"down": torch.ones(2, 4), "up": torch.ones(3, 2)})
        >>> misfit(spec, nn.Linear(4, 3)), misfit(spec, nn.Linear(4, 5))
        ('', 'changes a weight of (3, 4), that of the layer is (5, 4)')
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return f"is for {type(layer).__name__}, which has no weight"
    shape = tuple(weight.shape)
    if not isinstance(layer, nn.Embedding):
        spec = with_axes(spec, len(shape))
    made = _SHAPES[spec.method](spec.tensors, shape, layer)
    if made is not None and len(made) > len(shape) and prod(made[len(shape) :]) == 1:
        made = made[: len(shape)]  # peft keeps the core of a 1-D convolution with an axis more
    if made is None or made == shape:
        return "" if made is not None else f"has tensors of {_sizes(spec)}, which cannot change a weight of {shape}"
    return f"changes a weight of {made}, that of the layer is {shape}"


def _sizes(spec: DeltaSpec) -> str:
    return ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in spec.tensors.items())


def _of_lora(tensors: Mapping[str, Tensor], weight: Shape, layer: nn.Module) -> Shape | None:
    down, up = tensors["down"], tensors["up"]
    magnitude = tensors.get("magnitude")
    if isinstance(layer, nn.Embedding):
        return down.shape[1], up.shape[0]
    if down.ndim != len(weight) or up.ndim != down.ndim or prod(up.shape[2:]) != 1:
        return None
    groups = down.shape[0] // up.shape[1]
    if magnitude is not None and magnitude.numel() != up.shape[0]:
        return None
    if groups != getattr(layer, "groups", 1):
        return None
    return up.shape[0], down.shape[1] // groups, *down.shape[2:]


def _of_locon(tensors: Mapping[str, Tensor], weight: Shape, layer: nn.Module) -> Shape | None:
    down, mid, up = (tensors[role].shape for role in ("down", "mid", "up"))
    return None if getattr(layer, "groups", 1) != 1 else (up[0], down[1], *mid[2:])


def _of_loha(tensors: Mapping[str, Tensor], weight: Shape, layer: nn.Module) -> Shape | None:
    made: set[Shape] = set()
    for number in ("1", "2"):
        a, b, core = tensors[f"w{number}_a"], tensors[f"w{number}_b"], tensors.get(f"t{number}")
        if core is not None:
            made.add((a.shape[1], b.shape[1], *core.shape[2:]))
        elif b.shape[1] == prod(weight[1:]):
            made.add((a.shape[0], *weight[1:]))
        else:
            made.add((a.shape[0], b.shape[1]))
    return made.pop() if len(made) == 1 else None


def _of_lokr(tensors: Mapping[str, Tensor], weight: Shape, layer: nn.Module) -> Shape | None:
    first = tensors["w1"].shape if "w1" in tensors else (tensors["w1_a"].shape[0], tensors["w1_b"].shape[1])
    kernel = tuple(weight[2:])
    if "w2" in tensors:
        second = tuple(tensors["w2"].shape)
    elif "t2" in tensors:
        second = (tensors["w2_a"].shape[1], tensors["w2_b"].shape[1], *tensors["t2"].shape[2:])
    else:
        second = (tensors["w2_a"].shape[0], tensors["w2_b"].shape[1])
        if kernel and second[1] % prod(kernel) == 0:
            second = (second[0], second[1] // prod(kernel), *kernel)
    if len(first) != 2 or len(second) < 2:
        return None
    made = (first[0] * second[0], first[1] * second[1], *second[2:])
    # A 1x1 convolution may be stored as a matrix.
    return (*made, *([1] * (len(weight) - 2))) if len(made) == 2 and prod(kernel) == 1 else made


def _of_ia3(tensors: Mapping[str, Tensor], weight: Shape, layer: nn.Module) -> Shape | None:
    return weight if tensors["ia3"].numel() in weight[:2] else None


def _of_norm(tensors: Mapping[str, Tensor], weight: Shape, layer: nn.Module) -> Shape | None:
    return next(iter(tensors.values())).shape


_SHAPES: Mapping[str, Callable[[Mapping[str, Tensor], Shape, nn.Module], Shape | None]] = {
    "lora": _of_lora,
    "dora": _of_lora,
    "locon": _of_locon,
    "loha": _of_loha,
    "lokr": _of_lokr,
    "ia3": _of_ia3,
    "norm": _of_norm,
}


def aligned(tensor: Tensor) -> Tensor:
    """The tensor where products of matrices find it: where it begins in memory can decide the last bit of a result.

    Only tensors that begin elsewhere are copied; those that a file was mapped to mostly do.
    """
    return (
        tensor if tensor.is_meta or tensor.data_ptr() % 64 == 0 else tensor.clone(memory_format=torch.preserve_format)
    )
