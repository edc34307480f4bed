"""Padding: more pixels around an image."""

import torch

from refiners.fluxion.layers.module import Module


class ReflectionPad2d(torch.nn.ReflectionPad2d, Module):
    """Mirrors an image at its borders. `padding` is one number, or (left, right, top, bottom).

    Receives:
        x: `Float[Tensor, "batch channels height width"]`

    Returns:
        `Float[Tensor, "batch channels height+top+bottom width+left+right"]`
    """

    def __init__(self, padding: int | tuple[int, int, int, int]) -> None:
        super().__init__(padding)
