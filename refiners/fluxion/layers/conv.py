"""Convolutions over images.

The constructors keep torch's meaning under the names Refiners uses: `use_bias` for torch's `bias`. An int stands
for the same number on both axes; torch stores pairs, so pairs are what the tree shows.
"""

from typing import Any, Literal, Unpack

import torch

from refiners.fluxion.layers.factory import Factory
from refiners.fluxion.layers.module import WeightedModule

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class Conv2d(torch.nn.Conv2d, WeightedModule):
    """A 2D convolution. Weights and numerics are those of `torch.nn.Conv2d`.

    Receives:
        x: `Float[Tensor, "batch in_channels in_height in_width"]`

    Returns:
        `Float[Tensor, "batch out_channels out_height out_width"]`

    Example:
        >>> fl.Conv2d(3, 32, kernel_size=3, padding=1)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = (1, 1),
        padding: int | tuple[int, int] | str = (0, 0),
        groups: int = 1,
        use_bias: bool = True,
        dilation: int | tuple[int, int] = (1, 1),
        padding_mode: PaddingMode = "zeros",
        **factory: Unpack[Factory],
    ) -> None:
        super().__init__(  # pyright: ignore[reportUnknownMemberType] (untyped device)
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=use_bias,
            padding_mode=padding_mode,
            **factory,
        )
        self.use_bias = use_bias

    def reset_parameters(self) -> None:
        """Draw new weights, as torch does; on the meta device there is nothing to draw."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Any) -> Any:  # symbolic tracing gives no tensors
        own: dict[str, Any] = self._parameters  # see WeightedModule
        try:
            weight, bias = own["weight"], own["bias"]
        except KeyError:
            return super().forward(input)
        return self._conv_forward(input, weight, bias)


class ConvTranspose2d(torch.nn.ConvTranspose2d, WeightedModule):
    """A transposed 2D convolution, which enlarges. Weights and numerics are those of `torch.nn.ConvTranspose2d`.

    Receives:
        x: `Float[Tensor, "batch in_channels in_height in_width"]`

    Returns:
        `Float[Tensor, "batch out_channels out_height out_width"]`, where each output size is
        (input size - 1) · stride - 2 · padding + dilation · (kernel size - 1) + output padding + 1

    Example:
        >>> fl.ConvTranspose2d(3, 8, kernel_size=2, stride=2)(torch.randn(1, 3, 4, 4)).shape
        torch.Size([1, 8, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = (1, 1),
        padding: int | tuple[int, int] = (0, 0),
        output_padding: int | tuple[int, int] = (0, 0),
        groups: int = 1,
        use_bias: bool = True,
        dilation: int | tuple[int, int] = (1, 1),
        padding_mode: PaddingMode = "zeros",
        **factory: Unpack[Factory],
    ) -> None:
        super().__init__(  # pyright: ignore[reportUnknownMemberType] (untyped device)
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            groups=groups,
            bias=use_bias,
            dilation=dilation,
            padding_mode=padding_mode,
            **factory,
        )
        self.use_bias = use_bias
