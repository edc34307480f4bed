"""LoHa: the change of a weight is the product, number by number, of two products of low rank.

Follows FedPara (arXiv 2108.06098), LyCORIS (arXiv 2309.14859) and `peft.tuners.loha.layer` of peft 0.21.2:

    ΔW = s · (w1_a w1_b) ∘ (w2_a w2_b)

Two products of rank r give a rank of up to r². The weight of a convolution counts as a matrix [out, in · kernel], or
with `tucker` as a Tucker decomposition with a core [r, r, *kernel] for each of the two products.

Differs from upstream: borders other than zeros are padded as the layer pads them, which peft leaves out. The backward
of the Tucker form, written by hand in peft and in LyCORIS, takes the gradients of `w1_a` and `w2_a` from the core
of the other product; here they are those of the formula. The other gradients are upstream's, sum by sum.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from refiners.fluxion.adapters.lora.building import Strength
from refiners.fluxion.adapters.lora.spec import DeltaSpec
from refiners.fluxion.adapters.lora.weighted import WeightChange, WeightDelta

REBUILD = "ijkl,jr,ip->prkl"


class HadamardProduct(WeightChange):
    """Two products of low rank, multiplied number by number, see `WeightChange`."""

    def __init__(self, layer: Any, rank: int, tucker: bool = False, **factory: Any) -> None:
        out, columns = layer.weight.shape[0], layer.weight[0].numel()
        if tucker:
            in_channels, *kernel = layer.weight.shape[1:]
            core = (rank, rank, *kernel, *(1,) * (2 - len(kernel)))
            pairs = {"a": (rank, out), "b": (rank, in_channels)}
        else:
            core, pairs = (), {"a": (out, rank), "b": (rank, columns)}
        shapes = {f"w{i}_{side}": shape for i in (1, 2) for side, shape in pairs.items()}
        shapes |= {"t1": core, "t2": core} if tucker else {}
        super().__init__(layer, shapes, **factory)
        self.rank = rank
        self.tucker = tucker

    def change(self) -> Tensor:
        # peft rounds the scale to torch's default dtype.
        scale = self.factor.number.to(torch.get_default_dtype())
        if self.tucker:
            weights = self.t1, self.w1_a, self.w1_b, self.t2, self.w2_a, self.w2_b
            weight = cast(Tensor, TuckerProduct.apply(*weights, scale))  # pyright: ignore[reportUnknownMemberType] (untyped)
        else:
            weight = (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b) * scale
        return weight.reshape(self.geometry.weight_shape)


class TuckerProduct(torch.autograd.Function):
    """Two Tucker decompositions, multiplied number by number."""

    @staticmethod
    def forward(
        t1: Tensor, w1_a: Tensor, w1_b: Tensor, t2: Tensor, w2_a: Tensor, w2_b: Tensor, scale: Tensor
    ) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] (torch's is (*args, **kwargs))
        return torch.einsum(REBUILD, t1, w1_b, w1_a) * torch.einsum(REBUILD, t2, w2_b, w2_a) * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (torch's is (*args, **kwargs))
        t1, w1_a, w1_b, t2, w2_a, w2_b, scale = ctx.saved_tensors
        gradient = gradient * scale
        first = _gradients(gradient, t1, w1_a, w1_b, t2, w2_a, w2_b)
        second = _gradients(gradient, t2, w2_a, w2_b, t1, w1_a, w1_b)
        return *first, *second, None


def _gradients(
    gradient: Tensor, core: Tensor, a: Tensor, b: Tensor, other_core: Tensor, other_a: Tensor, other_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of one decomposition, given the other."""
    other = torch.einsum("ijkl,jr->irkl", other_core, other_b)
    of_product = torch.einsum("ijkl,ir->rjkl", other, other_a) * gradient
    inner = torch.einsum("ijkl,jr->irkl", core, b)
    of_a = torch.einsum("rjkl,ijkl->ri", inner, of_product)
    of_inner = torch.einsum("ijkl,ir->rjkl", of_product, a.T)
    of_b = torch.einsum("irkl,ijkl->rj", core, of_inner)
    return torch.einsum("ijkl,jr->irkl", of_inner, b.T), of_a, of_b


class Loha(WeightDelta[Any]):
    """The LoHa of a layer. Abstract: a kind of layer is a subclass.

    A new one changes nothing, since `w2_b` is zero.

    Args:
        name: See `Delta`.
        layer: The layer, which gives shape and geometry.
        rank: See `Delta`.
        scale: See `Delta`.
        alpha: See `Delta`.
        rank_stabilized: See `Delta`.
        tucker: Whether a convolution with a kernel is decomposed channel by channel; peft's `use_effective_conv2d`.
        **factory: The device and the dtype.
    """

    method = "loha"

    def __init__(
        self,
        name: str,
        /,
        layer: Any,
        rank: int = 16,
        scale: float = 1.0,
        *,
        alpha: float | None = None,
        rank_stabilized: bool = False,
        tucker: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.name = name
        self.rank = rank
        # A convolution of one pixel is a matrix already.
        self.tucker = tucker and layer.weight[0, 0].numel() > 1
        strength = Strength(scale=scale, alpha=alpha, rank_stabilized=rank_stabilized)
        change = HadamardProduct(layer, rank, self.tucker, device=device, dtype=dtype)
        super().__init__(name, change, rank=rank, **strength)

    def reset_parameters(self) -> None:
        for role, weight in self.weights().items():
            if not weight.tensor.is_meta:
                nn.init.kaiming_uniform_(weight.tensor, a=math.sqrt(5))
                if role == "w2_b":
                    nn.init.zeros_(weight.tensor)

    def _rank_axes_of(self, role: str) -> tuple[int, ...]:
        if role in ("t1", "t2"):
            return (0, 1)
        return (1,) if role.endswith("_a") and not self.tucker else (0,)

    @classmethod
    def like_layer(cls, name: str, /, layer: Any, **settings: Any) -> "Loha":
        return cls(name, layer, **settings)

    @classmethod
    def settings_of(cls, spec: DeltaSpec, layer: nn.Module) -> dict[str, Any]:
        return {"tucker": "t1" in spec.tensors}


class LinearLoha(Loha):
    """The LoHa of a Linear, see `Loha`."""

    layer_type = nn.Linear


class Conv1dLoha(Loha):
    """The LoHa of a Conv1d, see `Loha`."""

    layer_type = nn.Conv1d


class Conv2dLoha(Loha):
    """The LoHa of a Conv2d, see `Loha`."""

    layer_type = nn.Conv2d
