"""The transformer inside of a UNet: each pixel attends to the others, then to the words of the prompt.

Follows: `Transformer2DModel`, `BasicTransformerBlock` and `AttnProcessor2_0` of diffusers 0.42.1.

Differs from upstream:
- `upcast_attention` of a configuration changes nothing, as in upstream's `AttnProcessor2_0`.
- There is no dropout, and no other implementation than `torch.nn.functional.scaled_dot_product_attention`.
"""

from typing import Unpack

from jaxtyping import Float
from torch import Size, Tensor

import refiners.fluxion.layers as fl
from reference_ports.blocks.attention import Key, Projections, Query, Value
from refiners.errors import ConversionError, InputError

TEXT = "cross_attention_block"


class SelfAttention(fl.Chain):
    """Each pixel gathers from all pixels.

    Receives:
        Float[Tensor, "batch num_pixels channels"]

    Returns:
        Float[Tensor, "batch num_pixels channels"]
    """

    def __init__(self, channels: int, num_heads: int, **factory: Unpack[fl.Factory]) -> None:
        self.channels = channels
        self.num_heads = num_heads
        super().__init__(
            Projections(channels, use_bias=False, **factory),
            fl.ScaledDotProductAttention(num_heads),
            fl.Linear(channels, channels, **factory),
        )


class TextInputs(fl.UseContext):
    """The pixels, which ask, and the words of the prompt, which answer: those of the context `cross_attention_block`.

    Receives:
        x: Float[Tensor, "batch num_pixels channels"]

    Returns:
        x: as it is, for the queries
        text: Float[Tensor, "batch sequence_length text_dim"], for the keys
        text: the same, for the values

    Raises:
        ContextError: no text was set.
        InputError: there is not one text for each of the latents.
    """

    def __init__(self) -> None:
        super().__init__(TEXT, "clip_text_embedding")

    def forward(self, x: Float[Tensor, "batch num_pixels channels"]) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]  # one that reads its input as well
        text: Tensor = super().forward()
        if text.shape[0] != x.shape[0]:
            raise InputError(
                f"There are {x.shape[0]} latents and {text.shape[0]} texts. Give set_clip_text_embedding() one text "
                "for each of the latents."
            )
        return x, text, text


class TextProjections(fl.Distribute):
    """Queries of the pixels, keys and values of the text."""

    def __init__(self, channels: int, text_dim: int, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(
            Query(channels, channels, bias=False, **factory),
            Key(text_dim, channels, bias=False, **factory),
            Value(text_dim, channels, bias=False, **factory),
        )


class TextAttention(fl.ScaledDotProductAttention, fl.ContextModule):
    """Attends with several heads, under the mask of the text in the context `cross_attention_block`, if there is one.

    Receives:
        query: Float[Tensor, "batch num_pixels channels"]
        key, value: Float[Tensor, "batch sequence_length channels"]

    Returns:
        Float[Tensor, "batch num_pixels channels"]
    """

    def forward(
        self,
        query: Float[Tensor, "batch num_pixels channels"],
        key: Float[Tensor, "batch sequence_length channels"],
        value: Float[Tensor, "batch sequence_length channels"],
        mask: Tensor | None = None,
    ) -> Float[Tensor, "batch num_pixels channels"]:
        mask = self.use_context(TEXT).get("text_mask") if mask is None else mask
        return super().forward(query, key, value, mask)


class CrossAttention(fl.Chain):
    """Each pixel gathers from the words of the prompt.

    Receives:
        Float[Tensor, "batch num_pixels channels"]

    Returns:
        Float[Tensor, "batch num_pixels channels"]
    """

    def __init__(self, channels: int, text_dim: int, num_heads: int, **factory: Unpack[fl.Factory]) -> None:
        self.channels = channels
        self.text_dim = text_dim
        self.num_heads = num_heads
        super().__init__(
            TextInputs(),
            TextProjections(channels, text_dim, **factory),
            TextAttention(num_heads),
            fl.Linear(channels, channels, **factory),
        )


class UnmaskedCrossAttention(fl.Chain):
    """Cross-attention in the place of self-attention, which upstream gives no mask."""

    def __init__(self, channels: int, text_dim: int, num_heads: int, **factory: Unpack[fl.Factory]) -> None:
        self.channels = channels
        self.text_dim = text_dim
        self.num_heads = num_heads
        super().__init__(
            TextInputs(),
            TextProjections(channels, text_dim, **factory),
            fl.ScaledDotProductAttention(num_heads),
            fl.Linear(channels, channels, **factory),
        )


class TextProjection(fl.Passthrough):
    """Brings the words of a text encoder of another width to the width that the model attends to: Kolors.

    Receives:
        x: anything, returned as it is
    """

    def __init__(self, encoder_dim: int, text_dim: int, **factory: Unpack[fl.Factory]) -> None:
        self.encoder_dim = encoder_dim
        self.text_dim = text_dim
        super().__init__(
            fl.UseContext(TEXT, "clip_text_embedding"),
            fl.Linear(encoder_dim, text_dim, **factory),
            fl.SetContext(TEXT, "clip_text_embedding"),
        )


class GEGLUFeedForward(fl.Chain):
    """Widens each pixel by itself, gates one half by the other, and narrows it again.

    Receives:
        Float[Tensor, "batch num_pixels channels"]

    Returns:
        Float[Tensor, "batch num_pixels channels"]
    """

    def __init__(self, channels: int, feedforward_dim: int, **factory: Unpack[fl.Factory]) -> None:
        self.channels = channels
        self.feedforward_dim = feedforward_dim
        super().__init__(
            fl.Linear(channels, 2 * feedforward_dim, **factory),
            fl.GLU(fl.GeLU()),
            fl.Linear(feedforward_dim, channels, **factory),
        )


class SelfAttentionResidual(fl.Residual):
    """Normalised, each pixel gathers from all pixels."""


class CrossAttentionResidual(fl.Residual):
    """Normalised, each pixel gathers from the text."""


class FeedForwardResidual(fl.Residual):
    """Normalised, each pixel by itself."""


class TransformerBlock(fl.Chain):
    """Attention to the picture, attention to the text, and a feed-forward, each normalised before and added.

    Receives:
        Float[Tensor, "batch num_pixels channels"]

    Returns:
        Float[Tensor, "batch num_pixels channels"]
    """

    def __init__(self, channels: int, text_dim: int, num_heads: int, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(
            SelfAttentionResidual(
                fl.LayerNorm(channels, **factory),
                SelfAttention(channels, num_heads, **factory),
            ),
            CrossAttentionResidual(
                fl.LayerNorm(channels, **factory),
                CrossAttention(channels, text_dim, num_heads, **factory),
            ),
            FeedForwardResidual(
                fl.LayerNorm(channels, **factory),
                GEGLUFeedForward(channels, 4 * channels, **factory),
            ),
        )


class TextOnlyTransformerBlock(TransformerBlock):
    """A block that attends to the text twice, and not to the picture: the outer stages of the upscaler."""

    def __init__(self, channels: int, text_dim: int, num_heads: int, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(channels, text_dim, num_heads, **factory)
        residual = self.ensure_find(SelfAttentionResidual)
        residual.replace(
            residual.ensure_find(SelfAttention), UnmaskedCrossAttention(channels, text_dim, num_heads, **factory)
        )


def push_size(sizes: list[Size], x: Tensor) -> None:
    """Push the height and the width of an image."""
    sizes.append(x.shape[2:])


class ToTokens(fl.SetContext):
    """Makes each pixel a token, and notes the size of the image in the context `sampling`.

    Receives:
        x: Float[Tensor, "batch channels height width"]

    Returns:
        Float[Tensor, "batch height*width channels"], a view
    """

    def __init__(self) -> None:
        super().__init__("sampling", "shapes", callback=push_size)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch num_pixels channels"]:
        super().forward(x)
        batch, channels, height, width = x.shape
        return x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)


class ToImage(fl.UseContext):
    """Puts the tokens back in the image that `ToTokens` took them from.

    Receives:
        x: Float[Tensor, "batch height*width channels"]

    Returns:
        Float[Tensor, "batch channels height width"], contiguous
    """

    def __init__(self) -> None:
        super().__init__("sampling", "shapes")

    def forward(self, x: Float[Tensor, "batch num_pixels channels"]) -> Float[Tensor, "batch channels height width"]:  # pyright: ignore[reportIncompatibleMethodOverride]  # one that reads its input as well
        height, width = super().forward().pop()
        x = x.reshape(x.shape[0], height, width, x.shape[2])  # batch height width channels
        return x.permute(0, 3, 1, 2).contiguous()


class CrossAttention2d(fl.Residual):
    """A transformer over the pixels of an image, between two 1x1 convolutions.

    Receives:
        Float[Tensor, "batch channels height width"]

    Returns:
        Float[Tensor, "batch channels height width"]

    Raises:
        ConversionError: (a ValueError) the heads do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        text_dim: int,
        num_heads: int,
        num_layers: int = 1,
        num_groups: int = 32,
        block: type[TransformerBlock] = TransformerBlock,
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.channels = channels
        self.text_dim = text_dim
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.num_groups = num_groups
        if channels % num_heads:
            raise ConversionError(
                f"{type(self).__name__}: channels={channels} cannot be cut into num_heads={num_heads} equal heads. "
                "Choose a divisor; diffusers calls it `attention_head_dim`."
            )
        blocks = [block(channels, text_dim, num_heads, **factory) for _ in range(num_layers)]
        super().__init__(
            fl.GroupNorm(channels, num_groups, eps=1e-6, **factory),
            *self._between_projections(blocks, **factory),
        )

    def _between_projections(self, blocks: list[TransformerBlock], **factory: Unpack[fl.Factory]) -> list[fl.Module]:
        return [
            fl.Conv2d(self.channels, self.channels, kernel_size=1, **factory),
            ToTokens(),
            *blocks,
            ToImage(),
            fl.Conv2d(self.channels, self.channels, kernel_size=1, **factory),
        ]


class LinearCrossAttention2d(CrossAttention2d):
    """The same between two linear maps of the tokens: Stable Diffusion 2 and XL."""

    def _between_projections(self, blocks: list[TransformerBlock], **factory: Unpack[fl.Factory]) -> list[fl.Module]:
        return [
            ToTokens(),
            fl.Linear(self.channels, self.channels, **factory),
            *blocks,
            fl.Linear(self.channels, self.channels, **factory),
            ToImage(),
        ]
