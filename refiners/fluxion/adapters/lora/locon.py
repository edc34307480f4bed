"""LoCon with a core: the LoRA of a convolution as a Tucker decomposition.

Follows LyCORIS (arXiv 2309.14859), `lycoris.modules.locon` of lycoris-lora 4.1.3 with `use_tucker`:

    ΔW = s · core ×₁ up ×₂ down,   up: [out, r],   core: [r, r, *kernel],   down: [r, in]

That is three convolutions: `down` of one pixel, `mid`, whose weight is the core and which moves over the input as the
layer does, and `up` of one pixel. Files call the core `lora_mid`.

Differs from upstream: LyCORIS adds the change to the weight of the layer, takes that away again, and applies the rest
(its `bypass_mode` is what is done here). `mid` also takes over the dilation and the padding mode of its layer, which
LyCORIS leaves out in that mode. Convolutions in groups are refused.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from refiners.errors import AdapterTypeError
from refiners.fluxion.adapters.lora.building import Strength, Weight, without_initial_weights
from refiners.fluxion.adapters.lora.delta import Delta
from refiners.fluxion.adapters.lora.weighted import Geometry
from refiners.fluxion.layers.basics import Multiply
from refiners.fluxion.layers.conv import Conv2d

_TYPES: Mapping[int, type[nn.Module]] = {3: nn.Conv1d, 4: Conv2d, 5: nn.Conv3d}


class Locon(Delta[Any]):
    """The LoCon of a convolution. Abstract: a kind of layer is a subclass.

    Its children are `down`, `mid`, `up` and the multiplication by `scaling`. A new one changes nothing, since `up` is
    zero.

    Args:
        name: See `Delta`.
        layer: The layer, which gives shape and geometry.
        rank: See `Delta`.
        scale: See `Delta`.
        alpha: See `Delta`.
        rank_stabilized: See `Delta`.
        device: Of the weights.
        dtype: Of the weights.

    Receives:
        x: `Float[Tensor, "batch in_channels *in_size"]`

    Returns:
        `Float[Tensor, "batch out_channels *out_size"]`

    Raises:
        AdapterTypeError: (a TypeError) The layer has groups.
    """

    method = "locon"

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if layer.groups != 1:
            raise AdapterTypeError(f"{type(self).__name__} {name!r} is not made for {layer}, which has groups.")
        self.name = name
        self.rank = rank
        self.weight_axes = layer.weight.ndim
        self.__dict__["geometry"] = Geometry(layer)
        kind = _TYPES[layer.weight.ndim]
        bias = {"use_bias" if kind is Conv2d else "bias": False}
        moves = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "padding_mode")}

        def build(before: int, after: int, **settings: Any) -> nn.Module:
            return without_initial_weights(kind, before, after, **settings, **bias, device=device, dtype=dtype)

        down = build(layer.in_channels, rank, kernel_size=1)
        mid = build(rank, rank, kernel_size=layer.kernel_size, **moves)
        up = build(rank, layer.out_channels, kernel_size=1)
        strength = Strength(scale=scale, alpha=alpha, rank_stabilized=rank_stabilized)
        super().__init__(name, down, mid, up, Multiply(), rank=rank, **strength)

    def reset_parameters(self) -> None:
        if not self.down.weight.is_meta:
            for layer in (self.down, self.mid):
                layer.reset_parameters()
            nn.init.zeros_(self.up.weight)

    def weights(self) -> dict[str, Weight]:
        return {
            "down": Weight(self.down, "weight", (0,)),
            "mid": Weight(self.mid, "weight", (0, 1)),
            "up": Weight(self.up, "weight", (1,)),
        }

    @property
    def down(self) -> Any:
        """The convolution that leads to `rank` channels."""
        return self[0]

    @property
    def mid(self) -> Any:
        """The convolution between them, with the kernel and the moves of the layer."""
        return self[1]

    @property
    def up(self) -> Any:
        """The convolution that leads from `rank` channels to the output."""
        return self[2]

    @property
    def _factor(self) -> Multiply:
        return next(reversed(self.__dict__["_modules"].values()))

    @property
    def _dtype_of_weights(self) -> torch.dtype:
        return self.down.weight.dtype

    @classmethod
    def like_layer(cls, name: str, /, layer: Any, **settings: Any) -> "Locon":
        return cls(name, layer, **settings)

    def is_compatible(self, layer: nn.Module, /) -> bool:
        return isinstance(layer, type(self).layer_type or ()) and self.__dict__["geometry"].fits(layer)

    def delta_weight(self) -> Tensor:
        down, mid, up = self.down.weight, self.mid.weight, self.up.weight
        dtype = down.dtype
        if down.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            down, mid, up = down.float(), mid.float(), up.float()
        # As LyCORIS: the factor goes into `up`.
        product = torch.einsum("ij...,ip,jr->pr...", mid, (up.flatten(1) * self.scaling).T, down.flatten(1))
        return product.to(dtype)


class Conv1dLocon(Locon):
    """The LoCon of a Conv1d, see `Locon`."""

    layer_type = nn.Conv1d


class Conv2dLocon(Locon):
    """The LoCon of a Conv2d, see `Locon`."""

    layer_type = nn.Conv2d


class Conv3dLocon(Locon):
    """The LoCon of a Conv3d, see `Locon`."""

    layer_type = nn.Conv3d
