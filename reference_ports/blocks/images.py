"""How a transformer sees a picture: square patches, a token of its own in front, and a learned vector for each place.

Follows: Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv:2010.11929); for pictures of other sizes, the
bicubic `interpolate_pos_encoding` of transformers 5.23.0.
"""

from typing import Unpack

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import InputError


class ClassToken(fl.WeightedModule):
    """A learned token in front of the patches, which gathers what the picture shows.

    Receives:
        pixels: Num[Tensor, "batch channels height width"], read for its batch alone

    Returns:
        Float[Tensor, "batch 1 embedding_dim"]
    """

    def __init__(self, embedding_dim: int, **factory: Unpack[fl.Factory]) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.weight = nn.Parameter(torch.randn(embedding_dim, **factory))

    def forward(self, pixels: Num[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 embedding_dim"]:
        return self.weight.expand(pixels.shape[0], 1, -1)


class PatchEncoder(fl.Chain):
    """Cuts a picture in square patches, each made one token.

    Receives:
        pixels: Num[Tensor, "batch channels height width"], cast to the dtype of the weights

    Returns:
        Float[Tensor, "batch num_patches embedding_dim"]
    """

    def __init__(
        self,
        channels: int,
        embedding_dim: int,
        patch_size: int,
        use_bias: bool = True,
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.channels = channels
        self.embedding_dim = embedding_dim
        self.patch_size = patch_size
        self.use_bias = use_bias
        super().__init__(
            fl.Converter(set_device=False),
            fl.Conv2d(channels, embedding_dim, patch_size, stride=patch_size, use_bias=use_bias, **factory),
            fl.Flatten(2),  # batch embedding_dim num_patches
            fl.Transpose(1, 2),  # batch num_patches embedding_dim
        )


class GridPositions(fl.WeightedModule):
    """A learned vector for the class token and for each place of the grid of patches.

    Receives:
        pixels: Num[Tensor, "batch channels height width"], read for its size alone

    Returns:
        Float[Tensor, "1 1+num_patches embedding_dim"]

    Raises:
        InputError: the picture has another size than the model, and `interpolate` is not set.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        embedding_dim: int,
        interpolate: bool = False,
        **factory: Unpack[fl.Factory],
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_size = patch_size
        self.embedding_dim = embedding_dim
        self.interpolate = interpolate
        self.grid_size = image_size // patch_size
        self.weight = nn.Parameter(torch.randn(self.grid_size**2 + 1, embedding_dim, **factory))

    def forward(
        self, pixels: Num[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "1 num_tokens embedding_dim"]:
        height, width = pixels.shape[-2:]
        rows, columns = height // self.patch_size, width // self.patch_size
        if not self.interpolate and (height != self.image_size or width != self.image_size):
            raise InputError(
                f"The picture measures {height}x{width} pixels and the model {self.image_size}x{self.image_size}. "
                "Resize it, or build the model with interpolate_positions=True."
            )
        if height == width and rows * columns == self.grid_size**2:
            return self.at_own_size()
        return self._resize(rows, columns)

    def at_own_size(self) -> Float[Tensor, "1 num_tokens embedding_dim"]:
        """The vectors as they are. Upstreams differ in how they read them, and so do the bits of the gradient."""
        return self.weight.unsqueeze(0)

    def _resize(self, rows: int, columns: int) -> Tensor:
        weight = self.weight.unsqueeze(0)
        class_position, grid = weight[:, :1], weight[:, 1:]
        grid = grid.reshape(1, self.grid_size, self.grid_size, self.embedding_dim).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        grid = grid.permute(0, 2, 3, 1).view(1, -1, self.embedding_dim)  # 1 rows*columns embedding_dim
        return torch.cat((class_position, grid), dim=1)


class ClassTokenAndPatches(fl.Concatenate):
    """The class token, then the patches row by row."""


class PlacedTokens(fl.Sum):
    """Each token with its place added."""
