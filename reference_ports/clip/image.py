"""CLIP's image encoder: a transformer over the patches of a picture. See `reference_ports.clip.model`."""

from collections.abc import Callable
from typing import Self, TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from reference_ports.blocks.activations import quick_gelu
from reference_ports.blocks.hidden_states import declare_hidden_states, keep_hidden_states
from reference_ports.blocks.images import ClassToken, ClassTokenAndPatches, GridPositions, PatchEncoder, PlacedTokens
from reference_ports.blocks.pooling import FirstToken
from reference_ports.blocks.transformer import StatesAndPooled, TransformerLayer
from refiners.fluxion.context import Contexts


class ImagePositions(GridPositions):
    """A learned vector for the class token and for each place of the grid of patches, looked up by number."""

    def at_own_size(self) -> Float[Tensor, "1 num_tokens embedding_dim"]:
        positions = torch.arange(self.weight.shape[0], device=self.device)[None, :]
        return nn.functional.embedding(positions, self.weight)


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
                    PatchEncoder(channels, embedding_dim, patch_size, use_bias=False, **factory),
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
                TransformerLayer(embedding_dim, num_heads, feedforward_dim, activation, layer_norm_eps, **factory)
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
