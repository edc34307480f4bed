"""The LoRAs of convolutions, over one, two or three axes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from refiners.errors import AdapterTypeError
from refiners.fluxion.adapters.lora.base import Lora
from refiners.fluxion.adapters.lora.building import Strength, without_initial_weights
from refiners.fluxion.adapters.lora.half import in_full_precision
from refiners.fluxion.adapters.lora.spec import DeltaSpec
from refiners.fluxion.layers.conv import Conv2d, PaddingMode

# A number for all axes, or one for each.
Size = int | tuple[int, ...]


class ConvLora(Lora[Any]):
    """The LoRA of a convolution. Kernel size, stride, padding and dilation are pairs: of `down`, and of `up`.

    Either may be one number, or one for each axis. Without a padding, the outputs keep the size of the inputs if the
    stride is 1 and the kernels are odd.

    Args:
        name: See `Lora`.
        in_channels: Those of the layer.
        out_channels: Those of the layer.
        rank: See `Lora`; a multiple of `groups`.
        scale: See `Lora`.
        kernel_size: Of `down` and `up`.
        stride: Of `down` and `up`.
        padding: Of `down` and `up`.
        device: Of the weights.
        dtype: Of the weights.
        dilation: Of `down` and `up`.
        groups: Of `up`; `down` sees all channels.
        padding_mode: What lies beyond the border for the convolution that has the kernel of the layer.
        alpha: See `Lora`.
        rank_stabilized: See `Lora`.
        bias: See `Lora`.

    Receives:
        x: `Float[Tensor, "batch in_channels *in_size"]`

    Returns:
        `Float[Tensor, "batch out_channels *out_size"]`
    """

    axes: ClassVar[int]
    conv_type: ClassVar[type[nn.Module]]
    convolve: ClassVar[Any]
    # Whether stride, padding and dilation are only a guess from the shapes of the weights.
    _geometry_is_guessed = False

    def __init__(
        self,
        name: str,
        /,
        in_channels: int,
        out_channels: int,
        rank: int = 16,
        scale: float = 1.0,
        kernel_size: tuple[Size, Size] = (1, 3),
        stride: tuple[Size, Size] = (1, 1),
        padding: tuple[Size | str, Size | str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dilation: tuple[Size, Size] = (1, 1),
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        alpha: float | None = None,
        rank_stabilized: bool = False,
        bias: bool = False,
    ) -> None:
        if rank % groups:
            raise AdapterTypeError(
                f"{type(self).__name__} {name!r} has rank {rank} for a layer of {groups} groups: choose a multiple of "
                f"{groups}."
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.padding = padding or (
            self._same_padding(kernel_size[0], dilation[0]),
            self._same_padding(kernel_size[1], dilation[1]),
        )
        self.groups = groups
        self.padding_mode: PaddingMode = padding_mode
        strength = Strength(scale=scale, alpha=alpha, rank_stabilized=rank_stabilized)
        super().__init__(name, rank=rank, device=device, dtype=dtype, bias=bias, **strength)

    def lora_layers(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[nn.Module, ...]:
        channels = pairwise((self.in_channels, self.rank, self.out_channels))
        bias = "use_bias" if issubclass(self.conv_type, Conv2d) else "bias"
        down, up = (
            without_initial_weights(
                self.conv_type,
                before,
                after,
                kernel_size=self.kernel_size[i],
                stride=self.stride[i],
                padding=self.padding[i],
                dilation=self.dilation[i],
                groups=self.groups if i == 1 else 1,
                padding_mode=self.padding_mode if i == self._main else "zeros",
                device=device,
                dtype=dtype,
                **{bias: self.bias and i == 1},
            )
            for i, (before, after) in enumerate(channels)
        )
        return down, up

    @property
    def _main(self) -> int:
        """Which of the two has the kernel of the layer: 0 for `down`, unless only `up` has more than one pixel."""
        pixel = self._each(1)
        return 1 if self._each(self.kernel_size[0]) == pixel != self._each(self.kernel_size[1]) else 0

    @classmethod
    def like_layer(cls, name: str, /, layer: Any, **settings: Any) -> "ConvLora":
        geometry: dict[str, Any] = {
            "kernel_size": (_short(layer.kernel_size), 1),
            "stride": (_short(layer.stride), 1),
            "padding": (layer.padding if isinstance(layer.padding, str) else _short(layer.padding), 0),
            "dilation": (_short(layer.dilation), 1),
        }
        return cls(
            name,
            in_channels=layer.in_channels,
            out_channels=layer.out_channels,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            **{**geometry, **settings},
        )

    @classmethod
    def settings_of(cls, spec: DeltaSpec, layer: Any) -> dict[str, Any]:
        settings = super().settings_of(spec, layer)
        down, up = (spec.tensors[role].shape[2:] for role in ("down", "up"))
        # Usually `down` has the kernel of the layer, and with it its geometry; here it is `up`.
        if tuple(down) != tuple(layer.kernel_size) and tuple(up) == tuple(layer.kernel_size):
            padding = layer.padding if isinstance(layer.padding, str) else _short(layer.padding)
            settings |= {"kernel_size": (1, _short(up)), "stride": (1, _short(layer.stride)), "padding": (0, padding)}
            settings |= {"dilation": (1, _short(layer.dilation))}
        return settings

    @classmethod
    def is_pair(cls, down: Tensor, up: Tensor) -> bool:
        return down.ndim == up.ndim == cls.axes + 2 and down.shape[0] % up.shape[1] == 0

    @classmethod
    def like_weights(cls, name: str, /, down: torch.Size, up: torch.Size, **settings: Any) -> "ConvLora":
        lora = cls(
            name,
            in_channels=down[1],
            out_channels=up[0],
            rank=down[0],
            kernel_size=(_short(down[2:]), _short(up[2:])),
            groups=down[0] // up[1],
            **settings,
        )
        lora._geometry_is_guessed = True
        return lora

    def is_compatible(self, layer: Any, /) -> bool:
        if not isinstance(cast(nn.Module, layer), type(self).layer_type or ()):
            return False
        channels = (layer.in_channels, layer.out_channels)
        kernel = [a + b - 1 for a, b in zip(self.down.kernel_size, self.up.kernel_size, strict=True)]
        stride = [a * b for a, b in zip(self.down.stride, self.up.stride, strict=True)]
        return (
            channels == (self.in_channels, self.out_channels)
            and kernel == list(layer.kernel_size)
            and (self._geometry_is_guessed or stride == list(layer.stride))
        )

    def fit(self, layer: Any, /) -> None:
        main = self[self._main]
        if self._geometry_is_guessed and self.is_compatible(layer) and main.kernel_size == layer.kernel_size:
            for name in ("stride", "padding", "dilation", "padding_mode", "_reversed_padding_repeated_twice"):
                setattr(main, name, getattr(layer, name))

    def delta_weight(self) -> Tensor:
        if self.groups > 1:
            raise AdapterTypeError(
                f"{self} sees all channels, and its layer only those of its {self.groups} groups: it cannot be merged."
            )
        return in_full_precision(self._product, self.down.weight, self.up.weight)

    def _product(self, down: Tensor, up: Tensor) -> Tensor:
        # Not of a Conv1d and not of a Conv3d whose first two axes are longer: peft asks the axes 2 and 3 only.
        if down.ndim == 4 and self._each(self.kernel_size[0]) == self._each(self.kernel_size[1]) == (1, 1):
            return (up[:, :, 0, 0] @ down[:, :, 0, 0])[:, :, None, None] * self.scaling
        if self._main == 0:
            return type(self).convolve(down.transpose(0, 1), up).transpose(0, 1) * self.scaling
        return torch.einsum("or...,ri->oi...", up, down.flatten(1)) * self.scaling

    @classmethod
    def _each(cls, size: Size) -> tuple[int, ...]:
        return (size,) * cls.axes if isinstance(size, int) else tuple(size)

    @classmethod
    def _same_padding(cls, kernel_size: Size, dilation: Size) -> Size:
        pairs = zip(cls._each(kernel_size), cls._each(dilation), strict=True)
        return _short([step * (size - 1) // 2 for size, step in pairs])


class Conv2dLora(ConvLora):
    """The LoRA of a Conv2d, see `ConvLora`."""

    layer_type = nn.Conv2d
    axes = 2
    weight_axes = 4
    conv_type = Conv2d
    convolve = staticmethod(functional.conv2d)


class Conv1dLora(ConvLora):
    """The LoRA of a Conv1d, see `ConvLora`."""

    layer_type = nn.Conv1d
    axes = 1
    weight_axes = 3
    conv_type = nn.Conv1d
    convolve = staticmethod(functional.conv1d)


class Conv3dLora(ConvLora):
    """The LoRA of a Conv3d, see `ConvLora`."""

    layer_type = nn.Conv3d
    axes = 3
    weight_axes = 5
    conv_type = nn.Conv3d
    convolve = staticmethod(functional.conv3d)


def _short(sizes: Sequence[int]) -> Size:
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
