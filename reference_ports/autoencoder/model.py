"""AutoencoderKL: pictures to latents an eighth their size, and back. The eyes and hands of latent diffusion models.

An encoder halves the picture a few times and says where its latents lie (`Posterior`). A decoder doubles latents back
into a picture. In the middle of each, every pixel attends to all.

Follows: `AutoencoderKL` of diffusers 0.42.1, and its `AttnProcessor2_0` (Rombach et al., arXiv 2112.10752).

Differs from upstream:
- The convolutions beside the latents (`quant_conv`) belong to the encoder and the decoder.
- Scaling of latents, which upstream leaves to its pipelines, is `scale` and `unscale`.
- The scale is part of the model; `force_upcast` is kept for pipelines, which run the model in float32 then.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Unpack

from jaxtyping import Float
from torch import Tensor

import refiners.fluxion.layers as fl
from reference_ports.autoencoder.base import Autoencoder
from reference_ports.autoencoder.posterior import Posterior
from reference_ports.autoencoder.scaling import LatentScaling
from reference_ports.autoencoder.tiling import TilingAdapter
from reference_ports.blocks.attention import Projections
from reference_ports.blocks.residual_block import ResidualBlock
from reference_ports.blocks.upsampling import Upsample

NORM_EPS = 1e-6


class InputConvolution(fl.Conv2d):
    """From colours, or latents, to the channels of the first block."""


class QuantConvolution(fl.Conv2d):
    """Mixes the moments of each latent pixel, after the encoder."""


class PostQuantConvolution(fl.Conv2d):
    """Mixes the channels of each latent pixel, before the decoder."""


class SelfAttention(fl.Chain):
    """Each pixel gathers from all pixels, with one head."""

    def __init__(self, channels: int, **factory: Unpack[fl.Factory]) -> None:
        self.channels = channels
        super().__init__(
            Projections(channels, **factory),
            fl.ScaledDotProductAttention(),
            fl.Linear(channels, channels, **factory),
        )


class PixelTokens(fl.Chain):
    """The pixels as tokens, normalised, after they attended to one another.

    Receives:
        Float[Tensor, "batch channels height width"]

    Returns:
        Float[Tensor, "batch height*width channels"]
    """

    def __init__(self, channels: int, num_groups: int, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(
            fl.Flatten(2),
            fl.GroupNorm(channels, num_groups, eps=NORM_EPS, **factory),
            fl.Transpose(1, 2),
            SelfAttention(channels, **factory),
        )


class TokensAndImage(fl.Parallel):
    """The tokens, and the image whose size they have."""


class ToImage(fl.Module):
    """Puts tokens where they came from.

    Receives:
        tokens: Float[Tensor, "batch height*width channels"]
        image: Float[Tensor, "batch channels height width"], read for its shape

    Returns:
        Float[Tensor, "batch channels height width"]
    """

    def forward(
        self, tokens: Float[Tensor, "batch num_pixels channels"], image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        return tokens.transpose(-1, -2).reshape(image.shape)


class PixelAttention(fl.Residual):
    """Adds to each pixel what it gathers from all pixels.

    Receives:
        Float[Tensor, "batch channels height width"]

    Returns:
        Float[Tensor, "batch channels height width"]
    """

    def __init__(self, channels: int, num_groups: int = 32, **factory: Unpack[fl.Factory]) -> None:
        self.channels = channels
        self.num_groups = num_groups
        super().__init__(TokensAndImage(PixelTokens(channels, num_groups, **factory), fl.Identity()), ToImage())


class DownBlock(fl.Chain):
    """Residual blocks at one size of the image, and the way to half of it."""


class UpBlock(fl.Chain):
    """Residual blocks at one size of the image, and the way to twice of it."""


class DownBlocks(fl.Chain):
    """From the size of the picture to that of the latents."""


class UpBlocks(fl.Chain):
    """From the size of the latents to that of the picture."""


class MiddleBlock(fl.Chain):
    """At the smallest size: two residual blocks, and attention between them where the model has it."""

    def __init__(
        self, channels: int, num_groups: int = 32, use_attention: bool = True, **factory: Unpack[fl.Factory]
    ) -> None:
        self.channels = channels
        self.num_groups = num_groups
        self.use_attention = use_attention
        super().__init__(
            ResidualBlock(channels, channels, num_groups, NORM_EPS, **factory),
            *((PixelAttention(channels, num_groups, **factory),) if use_attention else ()),
            ResidualBlock(channels, channels, num_groups, NORM_EPS, **factory),
        )


class OutputBlock(fl.Chain):
    """From the channels of the last block to moments, or colours."""

    def __init__(
        self, in_channels: int, out_channels: int, num_groups: int = 32, **factory: Unpack[fl.Factory]
    ) -> None:
        self.in_channels = in_channels
        self.out_channels = out_channels
        super().__init__(
            fl.GroupNorm(in_channels, num_groups, eps=NORM_EPS, **factory),
            fl.SiLU(),
            fl.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, **factory),
        )


class Encoder(fl.Chain):
    """From a picture to the moments of its latents.

    Args:
        in_channels: Colours of the picture.
        latent_channels: Channels of the latents, of which there is a mean and a variance each.
        channels: Those of each size, from the largest to the smallest; the picture is halved between them.
        num_layers: Residual blocks at each size.
        num_groups: Groups of the norms.
        use_attention: Whether pixels attend to one another at the smallest size.
        use_quant_convolution: Whether the moments are mixed at the end.

    Receives:
        Float[Tensor, "batch in_channels height width"], mostly between -1 and 1

    Returns:
        Float[Tensor, "batch 2*latent_channels height/scale width/scale"]
    """

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        channels: Sequence[int],
        num_layers: int = 2,
        num_groups: int = 32,
        use_attention: bool = True,
        use_quant_convolution: bool = True,
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.in_channels = in_channels
        moments = 2 * latent_channels
        blocks: list[DownBlock] = []
        for i, width in enumerate(channels):
            widths = [channels[max(i - 1, 0)], *[width] * num_layers]
            block = DownBlock(ResidualBlock(a, b, num_groups, NORM_EPS, **factory) for a, b in pairwise(widths))
            if i < len(channels) - 1:
                block.append(fl.Downsample(width, scale_factor=2, register_shape=False, **factory))
            blocks.append(block)
        super().__init__(
            InputConvolution(in_channels, channels[0], kernel_size=3, padding=1, **factory),
            DownBlocks(*blocks),
            MiddleBlock(channels[-1], num_groups, use_attention, **factory),
            OutputBlock(channels[-1], moments, num_groups, **factory),
            *((QuantConvolution(moments, moments, kernel_size=1, **factory),) if use_quant_convolution else ()),
        )


class Decoder(fl.Chain):
    """From latents to a picture.

    Args:
        out_channels: Colours of the picture.
        latent_channels: Channels of the latents.
        channels: Those of each size, from the largest to the smallest, as in the encoder.
        num_layers: Residual blocks at each size of the encoder; here there is one more.
        num_groups: Groups of the norms.
        use_attention: Whether pixels attend to one another at the smallest size.
        use_post_quant_convolution: Whether the latents are mixed at the beginning.

    Receives:
        Float[Tensor, "batch latent_channels height width"]

    Returns:
        Float[Tensor, "batch out_channels scale*height scale*width"], mostly between -1 and 1
    """

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        channels: Sequence[int],
        num_layers: int = 2,
        num_groups: int = 32,
        use_attention: bool = True,
        use_post_quant_convolution: bool = True,
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.in_channels = latent_channels
        latent = latent_channels
        blocks: list[UpBlock] = []
        for i, width in reversed(list(enumerate(channels))):
            widths = [channels[min(i + 1, len(channels) - 1)], *[width] * (num_layers + 1)]
            block = UpBlock(ResidualBlock(a, b, num_groups, NORM_EPS, **factory) for a, b in pairwise(widths))
            if i > 0:
                block.append(Upsample(width, **factory))
            blocks.append(block)
        super().__init__(
            *((PostQuantConvolution(latent, latent, kernel_size=1, **factory),) if use_post_quant_convolution else ()),
            InputConvolution(latent, channels[-1], kernel_size=3, padding=1, **factory),
            MiddleBlock(channels[-1], num_groups, use_attention, **factory),
            UpBlocks(*blocks),
            OutputBlock(channels[0], out_channels, num_groups, **factory),
        )


class Mode(fl.Module):
    """The most likely latents.

    Receives:
        Float[Tensor, "batch 2*channels height width"], the moments

    Returns:
        Float[Tensor, "batch channels height width"]
    """

    def forward(
        self, moments: Float[Tensor, "batch moments height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        return Posterior(moments).mode()


class AutoencoderKL(Autoencoder):
    """Encodes pictures to the moments of their latents, and decodes latents. Called, it does both.

    Args:
        in_channels: Colours that the encoder takes.
        out_channels: Colours that the decoder makes.
        latent_channels: Channels of the latents.
        channels: Those of each size, from the largest to the smallest. The scale is 2 to the power of their number
            less one.
        num_layers: Residual blocks at each size.
        num_groups: Groups of the norms.
        use_attention: Whether pixels attend to one another at the smallest size.
        use_quant_convolution: Whether moments are mixed after the encoder.
        use_post_quant_convolution: Whether latents are mixed before the decoder.
        scaling: What `scale` and `unscale` do.
        tile_size: The side of a tile of the picture, for `set_tiling`.
        force_upcast: Whether pipelines run it in float32 where the rest is in float16.

    Receives:
        pixels: Float[Tensor, "batch in_channels height width"], mostly between -1 and 1

    Returns:
        Float[Tensor, "batch out_channels out_height out_width"], decoded from the most likely latents

    Example:
        >>> import torch
        >>> autoencoder = AutoencoderKL(channels=(8, 16), num_layers=1, num_groups=4)
        >>> posterior = autoencoder.encode(torch.zeros(1, 3, 16, 16))
        >>> latents = autoencoder.scale(posterior.sample(torch.Generator().manual_seed(1)))
        >>> latents.shape
        torch.Size([1, 4, 8, 8])
        >>> autoencoder.decode(autoencoder.unscale(latents)).shape
        torch.Size([1, 3, 16, 16])
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        channels: Sequence[int] = (128, 256, 512, 512),
        num_layers: int = 2,
        num_groups: int = 32,
        use_attention: bool = True,
        use_quant_convolution: bool = True,
        use_post_quant_convolution: bool = True,
        scaling: LatentScaling = LatentScaling(),  # noqa: B008 (immutable)
        tile_size: int = 512,
        force_upcast: bool = True,
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.latent_channels = latent_channels
        self.channels = tuple(channels)
        self.tile_size = tile_size
        self.force_upcast = force_upcast
        sizes = (latent_channels, self.channels, num_layers, num_groups, use_attention)
        super().__init__(
            Encoder(in_channels, *sizes, use_quant_convolution, **factory),
            Mode(),
            Decoder(out_channels, *sizes, use_post_quant_convolution, **factory),
            scaling=scaling,
            downscale_factor=2 ** (len(self.channels) - 1),
        )

    def encode(self, pixels: Float[Tensor, "batch in_channels height width"]) -> Posterior:
        return Posterior(self._encode(pixels))

    def _tiling_adapters(self) -> tuple[TilingAdapter, TilingAdapter]:
        latent_tile = self.tile_size // self.downscale_factor
        return (
            TilingAdapter(self.encoder, self.tile_size, latent_tile),
            TilingAdapter(self.decoder, latent_tile, self.tile_size),
        )


class SD1Autoencoder(AutoencoderKL):
    """The autoencoder of Stable Diffusion 1 and 2, and its finetuned decoders (`sd-vae-ft-mse`, `sd-vae-ft-ema`)."""

    def __init__(self, tile_size: int = 512, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(tile_size=tile_size, **factory)


class SDXLAutoencoder(AutoencoderKL):
    """The autoencoder of Stable Diffusion XL."""

    def __init__(self, tile_size: int = 1024, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(scaling=LatentScaling(0.13025), tile_size=tile_size, **factory)


class SD3Autoencoder(AutoencoderKL):
    """The autoencoder of Stable Diffusion 3 and 3.5, of 16 channels."""

    def __init__(self, tile_size: int = 1024, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(
            latent_channels=16,
            use_quant_convolution=False,
            use_post_quant_convolution=False,
            scaling=LatentScaling(1.5305, shift=0.0609),
            tile_size=tile_size,
            **factory,
        )


class FluxAutoencoder(AutoencoderKL):
    """The autoencoder of Flux.1, of 16 channels."""

    def __init__(self, tile_size: int = 1024, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(
            latent_channels=16,
            use_quant_convolution=False,
            use_post_quant_convolution=False,
            scaling=LatentScaling(0.3611, shift=0.1159),
            tile_size=tile_size,
            **factory,
        )
