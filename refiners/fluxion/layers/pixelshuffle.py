"""Pixel shuffling: trade image size for channels, losing nothing."""

import torch

from refiners.fluxion.layers.module import Module


class PixelUnshuffle(torch.nn.PixelUnshuffle, Module):
    """Moves each block of `downscale_factor` × `downscale_factor` pixels into channels.

    Receives:
        x: `Float[Tensor, "batch channels factor*height factor*width"]`

    Returns:
        `Float[Tensor, "batch channels*factor*factor height width"]`
    """

    def __init__(self, downscale_factor: int) -> None:
        super().__init__(downscale_factor)
