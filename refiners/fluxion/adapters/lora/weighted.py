"""Changes of a whole weight, which are computed anew in each call and applied as the layer applies its weight."""

from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from refiners.fluxion.adapters.lora.building import Weight
from refiners.fluxion.adapters.lora.delta import Delta
from refiners.fluxion.layers.basics import Multiply
from refiners.fluxion.layers.module import WeightedModule

T = TypeVar("T", bound=nn.Module)


class Geometry:
    """How a layer applies its weight: as a linear map, or as a convolution with its stride, padding and so on."""

    def __init__(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        self.weight_shape = tuple(layer.weight.shape)
        self.settings: dict[str, Any] = {}
        self.pads: list[int] = []
        self.padding_mode = "zeros"
        if not isinstance(layer, nn.Linear):
            self.settings = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
            if layer.padding_mode != "zeros":
                self.padding_mode = layer.padding_mode
                self.pads = list(layer._reversed_padding_repeated_twice)  # pyright: ignore[reportPrivateUsage] (torch has no public name)
                self.settings["padding"] = 0

    def fits(self, layer: nn.Module) -> bool:
        """Whether it is that of a layer."""
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return False
        other = Geometry(layer)
        return vars(self) == vars(other)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer would give without a bias, if this were its weight."""
        if not self.settings:
            return functional.linear(x, weight)
        if self.pads:
            x = functional.pad(x, self.pads, mode=self.padding_mode)
        convolve = functional.conv2d if len(self.weight_shape) == 4 else functional.conv1d
        return convolve(x, weight, **self.settings)


class WeightChange(WeightedModule):
    """A change of the weight of a layer, made of smaller tensors, and applied as the layer applies its weight.

    Receives:
        x: `Float[Tensor, "*in_shape"]`, the input of the layer

    Returns:
        `Float[Tensor, "*out_shape"]`, what the change adds to the output of the layer
    """

    def __init__(self, layer: Any, shapes: dict[str, tuple[int, ...]], **factory: Any) -> None:
        super().__init__()
        self.geometry = Geometry(layer)
        self.roles = tuple(shapes)
        # Not a child: a node would be a step of the computation, and this one scales in the middle of one.
        self.__dict__["factor"] = Multiply()
        for role, shape in shapes.items():
            self.register_parameter(role, nn.Parameter(torch.empty(shape, **factory)))

    def change(self) -> Tensor:
        """The change of the weight, `factor` included, in the shape of the layer's weight."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.geometry.apply(x, self.change())

    def has(self, role: str) -> bool:
        """Whether it has a tensor of that role."""
        return role in self.roles

    @property
    def device(self) -> torch.device:
        return getattr(self, self.roles[0]).device

    @property
    def dtype(self) -> torch.dtype:
        return getattr(self, self.roles[0]).dtype


class WeightDelta(Delta[T], Generic[T]):
    """A method that changes a whole weight. Its only child is the change, and holds what it is made of."""

    # The axes of each role that are as long as the rank.
    rank_axes: ClassVar[dict[str, tuple[int, ...]]]

    @property
    def weight_axes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] (of its layer, not of its class)
        """How many axes the weight of its layer has."""
        return len(self.change.geometry.weight_shape)

    @property
    def change(self) -> Any:
        """The only child."""
        return self[0]

    @property
    def _factor(self) -> Multiply:
        return self[0].factor

    @property
    def _dtype_of_weights(self) -> torch.dtype:
        return self[0].dtype

    def weights(self) -> dict[str, Weight]:
        return {role: Weight(self.change, role, self._rank_axes_of(role)) for role in self.change.roles}

    def _rank_axes_of(self, role: str) -> tuple[int, ...]:
        raise NotImplementedError

    def is_compatible(self, layer: nn.Module, /) -> bool:
        return isinstance(layer, type(self).layer_type or ()) and self.change.geometry.fits(layer)

    def delta_weight(self) -> Tensor:
        return self.change.change()
