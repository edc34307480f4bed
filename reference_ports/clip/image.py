"""CLIP's image encoder: a transformer over the patches of a picture. See `reference_ports.clip.model`."""

from collections.abc import Callable
from typing import Self, TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from reference_ports.blocks.activations import quick_gelu
from reference_ports.blocks.hidden_states import declare_hidden_states, keep_hidden_states
from reference_ports.blocks.pooling import FirstToken
from reference_ports.clip.layers import StatesAndPooled, TransformerLayer
from refiners.errors import InputError
from refiners.fluxion.context import Contexts


class ClassToken(fl.WeightedModule):
    """A learned token in front of the patches, which gathers what the picture shows.

    Receives:
        pixels: Float[Tensor, "batch channels height width"], read for its batch alone

    Returns:
        Float[Tensor, "batch 1 embedding_dim"]
    """

    def __init__(self, embedding_dim: int, **factory: Unpack[fl.Factory]) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.weight = nn.Parameter(torch.randn(embedding_dim, **factory))

    def forward(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 embedding_dim"]:
        return self.weight.expand(pixels.shape[0], 1, -1)


class PatchEncoder(fl.Chain):
    """Cuts a picture in square patches, each made one token.

    Receives:
        pixels: Float[Tensor, "batch channels height width"], cast to the dtype of the weights

    Returns:
        Float[Tensor, "batch num_patches embedding_dim"]
    """

    def __init__(self, channels: int, embedding_dim: int, patch_size: int, **factory: Unpack[fl.Factory]) -> None:
        self.channels = channels
        self.embedding_dim = embedding_dim
        self.patch_size = patch_size
        super().__init__(
            fl.Converter(set_device=False),
            fl.Conv2d(channels, embedding_dim, patch_size, stride=patch_size, use_bias=False, **factory),
            fl.Flatten(2),  # batch embedding_dim num_patches
            fl.Transpose(1, 2),  # batch num_patches embedding_dim
        )


class ImagePositions(fl.WeightedModule):
    """A learned vector for the class token and for each place of the grid of patches.

    Receives:
        pixels: Float[Tensor, "batch channels height width"], read for its size alone

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
        self, pixels: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "1 num_tokens embedding_dim"]:
        height, width = pixels.shape[-2:]
        rows, columns = height // self.patch_size, width // self.patch_size
        if not self.interpolate and (height != self.image_size or width != self.image_size):
            raise InputError(
                f"The picture measures {height}x{width} pixels and the model {self.image_size}x{self.image_size}. "
                f"Resize it with CLIPImageProcessor(size={self.image_size}), or build the model with "
                "interpolate_positions=True."
            )
        if height == width and rows * columns == self.grid_size**2:
            positions = torch.arange(self.weight.shape[0], device=pixels.device)[None, :]
            return nn.functional.embedding(positions, self.weight)
        return self._resize(rows, columns)

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


class ImageEmbeddings(fl.Chain):
    """Turns pixels into the first hidden state."""

    def __init__(
        self,
        channels: int,
        image_size: int,
        patch_size: int,
        embedding_dim: int,
        layer_norm_eps: float,
        interpolate_positions: bool,
        **factory: Unpack[fl.Factory],
    ) -> None:
        super().__init__(
            PlacedTokens(
                ClassTokenAndPatches(
                    ClassToken(embedding_dim, **factory),
                    PatchEncoder(channels, embedding_dim, patch_size, **factory),
                    dim=1,
                ),
                ImagePositions(image_size, patch_size, embedding_dim, interpolate_positions, **factory),
            ),
            fl.LayerNorm(embedding_dim, eps=layer_norm_eps, **factory),
        )


class CLIPImageEncoder(fl.Chain):
    """CLIP's image transformer, without a head.

    Receives:
        pixels: Float[Tensor, "batch channels height width"], as `CLIPImageProcessor` makes them

    Returns:
        Float[Tensor, "batch 1+num_patches embedding_dim"], the last hidden state, not normalised

    Raises:
        InputError: the picture has another size than the model, which does not interpolate positions.

    Example:
        >>> encoder = CLIPImageEncoder(image_size=32, patch_size=8, embedding_dim=8, num_layers=2, num_heads=2)
        >>> encoder(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 17, 8])
        >>> encoder[:-1](torch.zeros(1, 3, 32, 32)).shape  # the penultimate hidden state, which IP-Adapter Plus reads
        torch.Size([1, 17, 8])
    """

    def __init__(
        self,
        embedding_dim: int = 1024,
        num_layers: int = 24,
        num_heads: int = 16,
        feedforward_dim: int = 4096,
        image_size: int = 224,
        patch_size: int = 14,
        channels: int = 3,
        activation: Callable[[], nn.Module] = quick_gelu,
        layer_norm_eps: float = 1e-5,
        interpolate_positions: bool = False,
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.embedding_dim = embedding_dim
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.feedforward_dim = feedforward_dim
        self.image_size = image_size
        self.patch_size = patch_size
        self.channels = channels
        self.layer_norm_eps = layer_norm_eps
        self.interpolate_positions = interpolate_positions
        super().__init__(
            ImageEmbeddings(
                channels, image_size, patch_size, embedding_dim, layer_norm_eps, interpolate_positions, **factory
            ),
            *(
                TransformerLayer(
                    embedding_dim, num_heads, feedforward_dim, activation, layer_norm_eps, False, **factory
                )
                for _ in range(num_layers)
            ),
        )

    def init_context(self) -> Contexts:
        return {"attention": {"mask": None}, **declare_hidden_states()}

    def with_hidden_states(self) -> Self:
        """A copy that shares the weights and returns all hidden states: a tuple of `num_layers + 1` tensors."""
        return keep_hidden_states(self, self.num_layers + 1)


class CLIPImageNumbers(TypedDict, total=False):
    """The numbers of a `CLIPImageEncoder`."""

    embedding_dim: int
    num_layers: int
    num_heads: int
    feedforward_dim: int
    image_size: int
    patch_size: int
    channels: int
    activation: Callable[[], nn.Module]
    layer_norm_eps: float


class CLIPImageArguments(CLIPImageNumbers, fl.Factory, total=False):
    """The keyword arguments of `CLIPImageEncoder`, for the models that add a head to it."""

    interpolate_positions: bool


class PooledClassToken(fl.Chain):
    """The normalised state of the class token.

    Receives:
        states: Float[Tensor, "batch 1+num_patches embedding_dim"]

    Returns:
        Float[Tensor, "batch embedding_dim"]
    """

    def __init__(self, embedding_dim: int, layer_norm_eps: float, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(
            FirstToken(),
            fl.LayerNorm(embedding_dim, eps=layer_norm_eps, **factory),
        )


class ImageEmbedding(fl.Chain):
    """One vector for each picture, in the space that texts and pictures share.

    Receives:
        states: Float[Tensor, "batch 1+num_patches embedding_dim"]

    Returns:
        Float[Tensor, "batch projection_dim"]
    """

    def __init__(
        self, embedding_dim: int, projection_dim: int, layer_norm_eps: float, **factory: Unpack[fl.Factory]
    ) -> None:
        super().__init__(
            PooledClassToken(embedding_dim, layer_norm_eps, **factory),
            fl.Linear(embedding_dim, projection_dim, bias=False, **factory),
        )


class CLIPImageModel(fl.Chain):
    """CLIP's image encoder with the normalised state of its class token.

    Receives:
        pixels: Float[Tensor, "batch channels height width"]

    Returns:
        Float[Tensor, "batch 1+num_patches embedding_dim"], the last hidden state, not normalised
        Float[Tensor, "batch embedding_dim"], that of the class token, normalised
    """

    def __init__(self, **arguments: Unpack[CLIPImageArguments]) -> None:
        encoder = CLIPImageEncoder(**arguments)
        pooled = PooledClassToken(
            encoder.embedding_dim, encoder.layer_norm_eps, device=encoder.device, dtype=encoder.dtype
        )
        super().__init__(encoder, StatesAndPooled(fl.Identity(), pooled))

    @property
    def encoder(self) -> CLIPImageEncoder:
        """The transformer, whose slices are of use by themselves."""
        return self.ensure_find(CLIPImageEncoder)


class CLIPImageModelWithProjection(fl.Chain):
    """CLIP's image encoder with one vector for each picture, in the space that texts and pictures share.

    Receives:
        pixels: Float[Tensor, "batch channels height width"]

    Returns:
        Float[Tensor, "batch 1+num_patches embedding_dim"], the last hidden state, not normalised
        Float[Tensor, "batch projection_dim"], the embedding of each picture
    """

    def __init__(self, projection_dim: int = 768, **arguments: Unpack[CLIPImageArguments]) -> None:
        self.projection_dim = projection_dim
        encoder = CLIPImageEncoder(**arguments)
        embedding = ImageEmbedding(
            encoder.embedding_dim,
            projection_dim,
            encoder.layer_norm_eps,
            device=encoder.device,
            dtype=encoder.dtype,
        )
        super().__init__(encoder, StatesAndPooled(fl.Identity(), embedding))

    @property
    def encoder(self) -> CLIPImageEncoder:
        """The transformer, whose slices are of use by themselves."""
        return self.ensure_find(CLIPImageEncoder)
