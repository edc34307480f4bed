"""ViT: a transformer over the patches of a picture, with no convolution beyond the one that cuts it.

A picture becomes a row of tokens, one a patch, behind a token of its own; layers of self-attention and feed-forward
follow, each on normalised states; a last norm ends the encoder. What the model was trained to say of the whole picture
is read from the first token.

Follows: Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv:2010.11929); Xie et al., "SimMIM"
(arXiv:2111.09886), for masked patches. Upstream: `transformers.ViTModel` 5.23.0 with `attn_implementation="sdpa"`.

Differs from upstream:
- A model returns tensors, not a record; hidden state i is `encoder[: i + 1](pixels)`, and all of them, which come
  before the last norm, are `encoder.with_hidden_states()(pixels)`.
- The pooler and the mask token are trees of their own, `ViT` and `MaskedViTEncoder`; no tree has both.
- Masks are set before the forward and hold for that one.
- Pictures of another size are a choice made at construction (`interpolate_positions`), not at each call.
- Pictures and patches that the model is made for are squares.
- There is no dropout, no classifier and no decoder.
"""

from collections.abc import Callable
from typing import Self, TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from reference_ports.blocks.attention import prepare_attention_mask
from reference_ports.blocks.hidden_states import declare_hidden_states, keep_hidden_states
from reference_ports.blocks.images import ClassToken, ClassTokenAndPatches, GridPositions, PatchEncoder
from reference_ports.blocks.pooling import Pooler
from reference_ports.blocks.transformer import StatesAndPooled, TransformerLayer
from refiners.errors import InputError
from refiners.fluxion.context import Contexts


class ImageEmbeddings(fl.Sum):
    """Turns pixels into the first hidden state: the class token and the patches, each with its place added."""

    def __init__(
        self,
        channels: int,
        image_size: int,
        patch_size: int,
        embedding_dim: int,
        interpolate_positions: bool,
        **factory: Unpack[fl.Factory],
    ) -> None:
        super().__init__(
            ClassTokenAndPatches(
                ClassToken(embedding_dim, **factory),
                PatchEncoder(channels, embedding_dim, patch_size, **factory),
                dim=1,
            ),
            GridPositions(image_size, patch_size, embedding_dim, interpolate_positions, **factory),
        )


class ViTEncoder(fl.Chain):
    """The layers of ViT and the norm after them, without a head.

    Receives:
        pixels: Float[Tensor, "batch channels height width"], cast to the dtype of the weights

    Returns:
        Float[Tensor, "batch 1+num_patches embedding_dim"], the last hidden state, normalised

    Raises:
        InputError: the picture has another size than the model, which does not interpolate positions.

    Contexts:
        attention.mask: which tokens see which, in the form that attention takes; None where nothing is masked.

    Example:
        >>> encoder = ViTEncoder(image_size=32, patch_size=8, embedding_dim=8, num_layers=2, num_heads=2)
        >>> encoder(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 17, 8])
    """

    def __init__(
        self,
        embedding_dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        feedforward_dim: int = 3072,
        image_size: int = 224,
        patch_size: int = 16,
        channels: int = 3,
        activation: Callable[[], nn.Module] = fl.GeLU,
        layer_norm_eps: float = 1e-12,
        use_projection_bias: bool = True,
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
        self.use_projection_bias = use_projection_bias
        self.interpolate_positions = interpolate_positions
        super().__init__(
            ImageEmbeddings(channels, image_size, patch_size, embedding_dim, interpolate_positions, **factory),
            *(
                TransformerLayer(
                    embedding_dim,
                    num_heads,
                    feedforward_dim,
                    activation,
                    layer_norm_eps,
                    use_projection_bias=use_projection_bias,
                    **factory,
                )
                for _ in range(num_layers)
            ),
            fl.LayerNorm(embedding_dim, eps=layer_norm_eps, **factory),
        )

    def init_context(self) -> Contexts:
        return {"attention": {"mask": None}, **declare_hidden_states()}

    def set_attention_mask(self, mask: Tensor | None) -> None:
        """Hides tokens from the next forward.

        Receives:
            mask: 1 for what may be attended to and 0 for the rest, "batch 1+num_patches", the class token first; or a
                finished mask, boolean or to be added to the scores, "batch num_heads 1+num_patches 1+num_patches"; or
                None.

        Raises:
            InputError: the mask has neither two nor four axes.
        """
        if mask is not None and self.device is not None:
            mask = mask.to(self.device)
        self.set_context("attention", {"mask": prepare_attention_mask(mask, is_causal=False)})

    def with_hidden_states(self) -> Self:
        """A copy that shares the weights and returns all hidden states: a tuple of `num_layers + 1` tensors.

        The last of them comes before the norm. Its knobs are its own: set the mask of the copy, not of the original.
        """
        return keep_hidden_states(self, self.num_layers + 1)


class ViTNumbers(TypedDict, total=False):
    """The numbers of a `ViTEncoder`."""

    embedding_dim: int
    num_layers: int
    num_heads: int
    feedforward_dim: int
    image_size: int
    patch_size: int
    channels: int
    activation: Callable[[], nn.Module]
    layer_norm_eps: float
    use_projection_bias: bool


class ViTArguments(ViTNumbers, fl.Factory, total=False):
    """The keyword arguments of `ViTEncoder`, for the models that add something to it."""

    interpolate_positions: bool


class ViT(ViTEncoder):
    """ViT with its pooler.

    Receives:
        pixels: Float[Tensor, "batch channels height width"], cast to the dtype of the weights

    Returns:
        Float[Tensor, "batch 1+num_patches embedding_dim"], the last hidden state, normalised
        Float[Tensor, "batch pooled_dim"], the pooled class token; `pooled_dim` is `embedding_dim` unless given

    Example:
        >>> model = ViT(image_size=32, patch_size=8, embedding_dim=8, num_layers=2, num_heads=2)
        >>> states, pooled = model(torch.zeros(1, 3, 32, 32))
        >>> states.shape, pooled.shape
        (torch.Size([1, 17, 8]), torch.Size([1, 8]))
    """

    def __init__(
        self,
        pooled_dim: int | None = None,
        pooler_activation: Callable[[], nn.Module] = nn.Tanh,
        **arguments: Unpack[ViTArguments],
    ) -> None:
        self.pooled_dim = pooled_dim
        super().__init__(**arguments)
        pooler = Pooler(self.embedding_dim, pooled_dim, pooler_activation, device=self.device, dtype=self.dtype)
        self.append(StatesAndPooled(fl.Identity(), pooler))


class MaskedPlaces(fl.ContextModule):
    """Which patches are masked, by the context `vit`.

    Receives:
        patches: Float[Tensor, "batch num_patches embedding_dim"], which it does not read

    Returns:
        Bool[Tensor, "batch num_patches"], or None where nothing is masked
    """

    def forward(self, patches: Float[Tensor, "batch num_patches embedding_dim"]) -> Tensor | None:
        return self.use_context("vit").get("masked_patches")


class MaskToken(fl.WeightedModule):
    """A learned token that stands in for the patches that are masked.

    Receives:
        patches: Float[Tensor, "batch num_patches embedding_dim"]
        masked: Bool[Tensor, "batch num_patches"], or the same as 1 and 0; or None

    Returns:
        Float[Tensor, "batch num_patches embedding_dim"]

    Raises:
        InputError: the mask does not have one value a patch.
    """

    def __init__(self, embedding_dim: int, **factory: Unpack[fl.Factory]) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.weight = nn.Parameter(torch.zeros(embedding_dim, **factory))

    def forward(
        self, patches: Float[Tensor, "batch num_patches embedding_dim"], masked: Tensor | None
    ) -> Float[Tensor, "batch num_patches embedding_dim"]:
        if masked is None:
            return patches
        if masked.shape != patches.shape[:2]:
            raise InputError(
                f"There are {tuple(patches.shape[:2])} patches (batch, num_patches), and the mask that was set has the "
                f"shape {tuple(masked.shape)}. Give one value a patch to set_masked_patches()."
            )
        tokens = self.weight.expand(*patches.shape)  # batch num_patches embedding_dim
        mask = masked.unsqueeze(-1).to(tokens.dtype)  # batch num_patches 1
        return patches * (1.0 - mask) + tokens * mask


class PatchesAndMask(fl.Parallel):
    """The patches as they are, and which of them are masked."""


class MaskPatches(fl.Chain):
    """Puts the mask token in the place of the patches that are masked."""

    def __init__(self, embedding_dim: int, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(
            PatchesAndMask(fl.Identity(), MaskedPlaces()),
            MaskToken(embedding_dim, **factory),
        )


class MaskedViTEncoder(ViTEncoder):
    """ViT's encoder with a token for masked patches, by which it is trained to guess what it does not see.

    Receives:
        pixels: Float[Tensor, "batch channels height width"], cast to the dtype of the weights

    Returns:
        Float[Tensor, "batch 1+num_patches embedding_dim"], the last hidden state, normalised

    Contexts:
        vit.masked_patches: as given; None where nothing is masked.

    Example:
        >>> encoder = MaskedViTEncoder(image_size=16, patch_size=8, embedding_dim=8, num_layers=1, num_heads=2)
        >>> encoder.set_masked_patches(torch.tensor([[True, False, False, True]]))
        >>> encoder(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, **arguments: Unpack[ViTArguments]) -> None:
        super().__init__(**arguments)
        mask_patches = MaskPatches(self.embedding_dim, device=self.device, dtype=self.dtype)
        self.ensure_find(PatchEncoder).append(mask_patches)

    def init_context(self) -> Contexts:
        return {**super().init_context(), "vit": {"masked_patches": None}}

    def set_masked_patches(self, masked: Tensor | None) -> None:
        """Hides patches from the next forward: Bool[Tensor, "batch num_patches"], True for those that are masked."""
        if masked is not None and self.device is not None:
            masked = masked.to(self.device)
        self.set_context("vit", {"masked_patches": masked})


LARGE: ViTNumbers = {"embedding_dim": 1024, "num_layers": 24, "num_heads": 16, "feedforward_dim": 4096}
LARGE_32: ViTNumbers = {**LARGE, "patch_size": 32}


def vit_b16(**factory: Unpack[fl.Factory]) -> ViT:
    """The numbers of `vit-base-patch16-224-in21k`."""
    return ViT(**factory)


def vit_b32(**factory: Unpack[fl.Factory]) -> ViT:
    """The numbers of `vit-base-patch32-224-in21k`."""
    return ViT(patch_size=32, **factory)


def vit_l16(**factory: Unpack[fl.Factory]) -> ViT:
    """The numbers of `vit-large-patch16-224-in21k`."""
    return ViT(**LARGE, **factory)


def vit_l32(**factory: Unpack[fl.Factory]) -> ViT:
    """The numbers of `vit-large-patch32-224-in21k`."""
    return ViT(**LARGE_32, **factory)
