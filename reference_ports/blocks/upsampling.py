"""Enlarging an image by whole factors: each pixel becomes a square of pixels.

Follows: `torch.nn.Upsample(scale_factor=…, mode="nearest")`, as the autoencoders of diffusers 0.42.1 use it.
"""

from typing import Unpack

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

import refiners.fluxion.layers as fl


class Enlarge(fl.Module):
    """Makes each pixel a square of pixels.

    Receives:
        x: Float[Tensor, "batch channels height width"]

    Returns:
        Float[Tensor, "batch channels factor*height factor*width"]
    """

    def __init__(self, factor: int = 2) -> None:
        self.factor = factor
        super().__init__()

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels out_height out_width"]:
        return functional.interpolate(x, scale_factor=float(self.factor), mode="nearest")


class Upsample(fl.Chain):
    """Enlarges an image twice, and smooths it."""

    def __init__(self, channels: int, **factory: Unpack[fl.Factory]) -> None:
        self.channels = channels
        super().__init__(Enlarge(), fl.Conv2d(channels, channels, kernel_size=3, padding=1, **factory))
