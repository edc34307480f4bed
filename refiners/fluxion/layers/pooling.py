"""Pooling: one number for each window of a sequence or an image."""

import torch

from refiners.fluxion.layers.module import Module


class MaxPool1d(torch.nn.MaxPool1d, Module):
    """The maximum of each window of a sequence. `stride` is `kernel_size` unless given.

    Receives:
        x: `Float[Tensor, "batch channels in_length"]`

    Returns:
        `Float[Tensor, "batch channels out_length"]`, and with `return_indices` the indices of the maxima too
    """

    def __init__(
        self,
        kernel_size: int,
        stride: int | None = None,
        padding: int = 0,
        dilation: int = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)


class MaxPool2d(torch.nn.MaxPool2d, Module):
    """The maximum of each window of an image. `stride` is `kernel_size` unless given.

    Receives:
        x: `Float[Tensor, "batch channels in_height in_width"]`

    Returns:
        `Float[Tensor, "batch channels out_height out_width"]`, and with `return_indices` the indices too
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)
