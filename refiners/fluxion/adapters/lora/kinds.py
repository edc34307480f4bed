"""The kinds of LoRA: one for each kind of layer."""

from typing import Any

import torch
from torch import Tensor, nn

from refiners.errors import AdapterTypeError
from refiners.fluxion.adapters.lora.base import Lora, without_initial_weights
from refiners.fluxion.layers.conv import Conv2d, PaddingMode
from refiners.fluxion.layers.factory import Factory
from refiners.fluxion.layers.linear import Linear

# A number for both axes of an image, or one for each.
Pair = int | tuple[int, int]


class LinearLora(Lora[Linear]):
    """The LoRA of a Linear.

    Receives:
        x: `Float[Tensor, "*shape in_features"]`

    Returns:
        `Float[Tensor, "*shape out_features"]`

    Example:
        >>> lora = LinearLora("style", in_features=320, out_features=128, rank=4, alpha=8)
        >>> lora.scaling
        2.0
    """

    layer_type = nn.Linear

    def __init__(
        self,
        name: str,
        /,
        in_features: int,
        out_features: int,
        rank: int = 16,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float | None = None,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        super().__init__(name, rank=rank, scale=scale, device=device, dtype=dtype, alpha=alpha)

    def lora_layers(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Linear, Linear]:
        factory = Factory(device=device, dtype=dtype)
        return (
            without_initial_weights(Linear, self.in_features, self.rank, bias=False, **factory),
            without_initial_weights(Linear, self.rank, self.out_features, bias=False, **factory),
        )

    @classmethod
    def like_layer(cls, name: str, /, layer: nn.Linear, **settings: Any) -> "LinearLora":
        return cls(name, in_features=layer.in_features, out_features=layer.out_features, **settings)

    @classmethod
    def is_pair(cls, down: Tensor, up: Tensor) -> bool:
        return down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1]

    @classmethod
    def like_weights(cls, name: str, /, down: torch.Size, up: torch.Size, **settings: Any) -> "LinearLora":
        return cls(name, in_features=down[1], out_features=up[0], rank=down[0], **settings)

    def is_compatible(self, layer: nn.Module, /) -> bool:
        return (
            isinstance(layer, nn.Linear)
            and layer.in_features == self.in_features
            and layer.out_features == self.out_features
        )


class Conv2dLora(Lora[Conv2d]):
    """The LoRA of a Conv2d. Kernel size, stride, padding and dilation are pairs: of `down`, and of `up`.

    Either may be one number, or (height, width). Without a padding, the outputs keep the size of the inputs if the
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

    Receives:
        x: `Float[Tensor, "batch in_channels in_height in_width"]`

    Returns:
        `Float[Tensor, "batch out_channels out_height out_width"]`
    """

    layer_type = nn.Conv2d
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
        kernel_size: tuple[Pair, Pair] = (1, 3),
        stride: tuple[Pair, Pair] = (1, 1),
        padding: tuple[Pair | str, Pair | str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dilation: tuple[Pair, Pair] = (1, 1),
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        alpha: float | None = None,
    ) -> None:
        if rank % groups:
            raise AdapterTypeError(
                f"Conv2dLora {name!r} has rank {rank} for a layer of {groups} groups: choose a multiple of {groups}."
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.padding = padding or (
            _same_padding(kernel_size[0], dilation[0]),
            _same_padding(kernel_size[1], dilation[1]),
        )
        self.groups = groups
        self.padding_mode: PaddingMode = padding_mode
        super().__init__(name, rank=rank, scale=scale, device=device, dtype=dtype, alpha=alpha)

    def lora_layers(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Conv2d, Conv2d]:
        factory = Factory(device=device, dtype=dtype)
        modes: list[PaddingMode] = ["zeros", "zeros"]
        modes[self._main] = self.padding_mode
        down, up = (
            without_initial_weights(
                Conv2d,
                channels[0],
                channels[1],
                kernel_size=self.kernel_size[i],
                stride=self.stride[i],
                padding=self.padding[i],
                dilation=self.dilation[i],
                groups=self.groups if i == 1 else 1,
                padding_mode=modes[i],
                use_bias=False,
                **factory,
            )
            for i, channels in enumerate([(self.in_channels, self.rank), (self.rank, self.out_channels)])
        )
        return down, up

    @property
    def _main(self) -> int:
        """Which of the two has the kernel of the layer: 0 for `down`, unless only `up` has more than one pixel."""
        return 1 if _both(self.kernel_size[0]) == (1, 1) != _both(self.kernel_size[1]) else 0

    @classmethod
    def like_layer(cls, name: str, /, layer: nn.Conv2d, **settings: Any) -> "Conv2dLora":
        padding = layer.padding if isinstance(layer.padding, str) else _short(layer.padding)
        return cls(
            name,
            in_channels=layer.in_channels,
            out_channels=layer.out_channels,
            kernel_size=(_short(layer.kernel_size), 1),
            stride=(_short(layer.stride), 1),
            padding=(padding, 0),
            dilation=(_short(layer.dilation), 1),
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            **settings,
        )

    @classmethod
    def is_pair(cls, down: Tensor, up: Tensor) -> bool:
        return down.ndim == up.ndim == 4 and down.shape[0] % up.shape[1] == 0

    @classmethod
    def like_weights(cls, name: str, /, down: torch.Size, up: torch.Size, **settings: Any) -> "Conv2dLora":
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

    def is_compatible(self, layer: nn.Module, /) -> bool:
        if not isinstance(layer, nn.Conv2d):
            return False
        channels = (layer.in_channels, layer.out_channels)
        kernel = [a + b - 1 for a, b in zip(self.down.kernel_size, self.up.kernel_size, strict=True)]
        stride = [a * b for a, b in zip(self.down.stride, self.up.stride, strict=True)]
        return (
            channels == (self.in_channels, self.out_channels)
            and kernel == list(layer.kernel_size)
            and (self._geometry_is_guessed or stride == list(layer.stride))
        )

    def fit(self, layer: nn.Module, /) -> None:
        main: Conv2d = self[self._main]
        if self._geometry_is_guessed and isinstance(layer, nn.Conv2d) and main.kernel_size == layer.kernel_size:
            for name in ("stride", "padding", "dilation", "padding_mode", "_reversed_padding_repeated_twice"):
                setattr(main, name, getattr(layer, name))


def _both(size: Pair) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _short(size: Any) -> Pair:
    height, width = size
    return height if height == width else (height, width)


def _same_padding(kernel_size: Pair, dilation: Pair) -> Pair:
    pairs = zip(_both(kernel_size), _both(dilation), strict=True)
    return _short([step * (size - 1) // 2 for size, step in pairs])
