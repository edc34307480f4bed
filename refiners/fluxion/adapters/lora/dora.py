"""DoRA: a LoRA gives each row of a weight a new direction, and a magnitude of its own gives it its length.

Follows arXiv 2402.09353 and `peft.tuners.lora.dora` of peft 0.21.2. With the weight W, its change ΔW = s · up · down
and the magnitude m, the layer computes

    y = m / ‖W + ΔW‖ · (W + ΔW) x + b

The norm is one number for each output, and counts as a constant for gradients (section 4.3 of the paper). The bias is
not rescaled. peft computes this from what the layer has given so far, `total`, and so does this file, since the bits
depend on it:

    y = total + (m / ‖…‖ - 1) · (total - b) + m / ‖…‖ · up(down(x)) · s

Where several adapters are active on one layer, `total` holds what those before it have added, and the norm is that of
the layer's own weight.

Differs from upstream: the product up · down comes from the weights themselves, where peft sends an identity matrix
through the layers; the values are the same. A `scale` of 0 gives the layer alone, where peft still rescales it.
"""

from typing import Any, Generic, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from refiners.errors import AdapterTypeError
from refiners.fluxion.adapters.lora.base import Lora
from refiners.fluxion.adapters.lora.building import Weight
from refiners.fluxion.adapters.lora.conv import Conv1dLora, Conv2dLora, Conv3dLora, ConvLora
from refiners.fluxion.adapters.lora.kinds import EmbeddingLora, LinearLora
from refiners.fluxion.layers.module import WeightedModule

T = TypeVar("T", bound=nn.Module)


class Magnitude(WeightedModule):
    """The length that each output has.

    Receives:
        norm: `Float[Tensor, "*ones outputs *ones"]`, the length of each row of the changed weight

    Returns:
        `Float[Tensor, "*ones outputs *ones"]`, what the outputs have to be multiplied by
    """

    def __init__(self, *shape: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))

    def forward(self, norm: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.weight / norm


class Dora(Lora[T], Generic[T]):
    """The DoRA of a layer of type T. Abstract: a kind of layer is a subclass.

    A new one changes nothing: its magnitude is the length that the rows of the weight have.

    Receives:
        x: the input of the layer
        total: what the layer and the adapters before this one have given
        weight: the weight of the layer
        bias: the bias of the layer, or None

    Returns:
        The new total.
    """

    method = "dora"
    rewrites_output = True

    def lora_layers(self, device: Any = None, dtype: torch.dtype | None = None) -> tuple[nn.Module, ...]:
        if self.bias:
            raise AdapterTypeError(f"{type(self).__name__} takes no bias: a DoRA has no place for it.")
        down, up = super().lora_layers(device=device, dtype=dtype)
        return down, up, Magnitude(*self._magnitude_shape, device=device, dtype=dtype)

    def weights(self) -> dict[str, Weight]:
        return {**super().weights(), "magnitude": Weight(self.magnitude, "weight")}

    def start_from(self, layer: Any, /) -> None:
        if not self.magnitude.weight.is_meta:
            with torch.no_grad():
                self.magnitude.weight.copy_(self._norm(layer.weight))

    @property
    def magnitude(self) -> Magnitude:
        """What holds the length of each output."""
        return self[2]

    def forward(self, *args: Any) -> Tensor:
        x, total, weight, bias = args
        factor = self._factor_for(x, weight)
        base = total if bias is None else total - self._along_outputs(bias)
        return total + ((factor - 1) * base + self._factor(factor * self.up(self.down(x))))

    def _factor_for(self, x: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            # The number stands behind: in front, torch would round it to half precision first.
            norm = self._norm(weight + self._factor(self._unscaled(weight)))
        return self.magnitude(norm)

    def merged_weight(self, weight: Tensor, base: Tensor | None = None) -> Tensor:
        if not self.scaling:
            return weight.clone()
        change = self.delta_weight()
        norm = self._norm((weight if base is None else base) + change)
        return (self._along_rows(self.magnitude.weight / norm) * (weight + change)).to(weight.dtype)

    # --- a kind of layer defines -----------------------------------------------------------------------------------

    @property
    def _magnitude_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _norm(self, weight: Tensor) -> Tensor:
        """The length of the row of each output, in the shape of the magnitude."""
        raise NotImplementedError

    def _unscaled(self, weight: Tensor) -> Tensor:
        """The product of up and down, in the shape of the layer's weight."""
        raise NotImplementedError

    def _along_outputs(self, values: Tensor) -> Tensor:
        """One number for each output, in a shape that goes with outputs of the layer."""
        return values

    def _along_rows(self, values: Tensor) -> Tensor:
        """One number for each output, in a shape that goes with the weight of the layer."""
        raise NotImplementedError


class LinearDora(Dora[Any], LinearLora):
    """The DoRA of a Linear, see `Dora`."""

    layer_type = nn.Linear

    @property
    def _magnitude_shape(self) -> tuple[int, ...]:
        return (self.out_features,)

    def _factor_for(self, x: Tensor, weight: Tensor) -> Tensor:
        return super()._factor_for(x, weight.to(x.dtype)).view(1, -1)

    def _norm(self, weight: Tensor) -> Tensor:
        return cast(Any, torch.linalg).norm(weight, dim=1).to(weight.dtype)

    def _unscaled(self, weight: Tensor) -> Tensor:
        # Laid out as if an identity matrix had gone through both layers.
        return functional.linear(self.down.weight.T.contiguous(), self.up.weight).T.to(weight.dtype)

    def _along_rows(self, values: Tensor) -> Tensor:
        return values.view(-1, 1)


class EmbeddingDora(Dora[Any], EmbeddingLora):
    """The DoRA of an Embedding, see `Dora`. The magnitude belongs to the columns, which are its outputs."""

    layer_type = nn.Embedding

    @property
    def _magnitude_shape(self) -> tuple[int, ...]:
        return (self.embedding_dim,)

    def forward(self, *args: Any) -> Tensor:
        x, total, weight, _ = args
        factor = self._factor_for(x, weight)
        return factor * total + self._factor(factor * self.up(self.down(x)))

    def _norm(self, weight: Tensor) -> Tensor:
        return cast(Any, torch.linalg).norm(weight.T, dim=1).to(weight.dtype)

    def _unscaled(self, weight: Tensor) -> Tensor:
        return self.down.weight.T @ self.up.weight.T

    def _along_rows(self, values: Tensor) -> Tensor:
        return values.view(1, -1)


class ConvDora(Dora[Any], ConvLora):
    """The DoRA of a convolution, see `Dora`.

    In groups, `up` times `down` is no change of the weight: as in peft, its numbers are put into the shape of the
    weight for the norm.
    """

    @property
    def _magnitude_shape(self) -> tuple[int, ...]:
        return (1, self.out_channels, *(1,) * self.axes)

    def _norm(self, weight: Tensor) -> Tensor:
        return cast(Any, weight).norm(p=2, dim=tuple(range(1, weight.ndim)), keepdim=True).transpose(1, 0)

    def _unscaled(self, weight: Tensor) -> Tensor:
        rank = self.down.weight.shape[0]
        return (self.up.weight.view(-1, rank) @ self.down.weight.view(rank, -1)).reshape(weight.shape)

    def _along_outputs(self, values: Tensor) -> Tensor:
        return values.view(1, -1, *(1,) * self.axes)

    def _along_rows(self, values: Tensor) -> Tensor:
        return values.view(-1, *(1,) * (self.axes + 1))


class Conv1dDora(ConvDora, Conv1dLora):
    """The DoRA of a Conv1d, see `ConvDora`."""

    layer_type = nn.Conv1d


class Conv2dDora(ConvDora, Conv2dLora):
    """The DoRA of a Conv2d, see `ConvDora`."""

    layer_type = nn.Conv2d


class Conv3dDora(ConvDora, Conv3dLora):
    """The DoRA of a Conv3d, see `ConvDora`."""

    layer_type = nn.Conv3d
