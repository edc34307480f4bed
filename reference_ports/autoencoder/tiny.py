"""AutoencoderTiny: TAESD, a small autoencoder that imitates a large one, for previews and on weak machines.

Its latents are those of the large one, for which it stands in. It knows colours from 0 to 1, and latents that a picture
of bytes can hold: called, it encodes, rounds to bytes, and decodes.

Follows: `AutoencoderTiny` of diffusers 0.42.1 (https://github.com/madebyollin/taesd).

Differs from upstream:
- The picture is brought from -1 … 1 to 0 … 1 whatever the mode (upstream forgets it under gradient checkpointing).
- Called in another dtype than torch's default, it goes on in that of its weights (upstream's bytes come back in torch's
  default dtype, and its decoder refuses them).
"""

from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from reference_ports.autoencoder.base import Autoencoder
from reference_ports.autoencoder.posterior import PointPosterior
from reference_ports.autoencoder.scaling import LatentScaling
from reference_ports.autoencoder.tiling import RampTilingAdapter, TilingAdapter
from reference_ports.blocks.upsampling import Enlarge
from refiners.errors import ConversionError


class ToShares(fl.Module):
    """Colours from -1 … 1 to 0 … 1."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return x.add(1).div(2)


class FromShares(fl.Module):
    """Colours from 0 … 1 to -1 … 1."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return x.mul(2).sub(1)


class SoftClamp(fl.Module):
    """Bends latents so that none passes the magnitude."""

    def __init__(self, magnitude: float = 3) -> None:
        self.magnitude = magnitude
        super().__init__()

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.tanh(x / self.magnitude) * self.magnitude


class TinyConvolutions(fl.Residual):
    """Three convolutions beside their input."""


class TinyBlock(fl.Chain):
    """Three convolutions beside their input, and what is positive of the sum.

    Receives:
        Float[Tensor, "batch channels height width"]

    Returns:
        Float[Tensor, "batch channels height width"]
    """

    def __init__(
        self, channels: int, activation: Callable[[], nn.Module] = fl.ReLU, **factory: Unpack[fl.Factory]
    ) -> None:
        self.channels = channels
        super().__init__(
            TinyConvolutions(
                fl.Conv2d(channels, channels, kernel_size=3, padding=1, **factory),
                activation(),
                fl.Conv2d(channels, channels, kernel_size=3, padding=1, **factory),
                activation(),
                fl.Conv2d(channels, channels, kernel_size=3, padding=1, **factory),
            ),
            fl.ReLU(),
        )


class InputBlock(fl.Chain):
    """From colours, or latents, to the channels of the blocks."""


class HalvingConvolution(fl.Conv2d):
    """Halves the image."""


class DownBlock(fl.Chain):
    """The way to half the size, and the blocks there."""


class UpBlock(fl.Chain):
    """The blocks at one size, and the way to the next."""


class OutputBlock(fl.Chain):
    """The blocks at the last size, and the way to latents, or colours."""


class TinyEncoder(fl.Chain):
    """From a picture to its latents.

    Args:
        in_channels: Colours of the picture.
        latent_channels: Channels of the latents.
        width: Channels of all blocks.
        num_blocks: Blocks at each size, from the largest to the smallest; the picture is halved between them.
        activation: Makes the activation of the blocks.

    Receives:
        Float[Tensor, "batch in_channels height width"], between -1 and 1

    Returns:
        Float[Tensor, "batch latent_channels height/scale width/scale"]
    """

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        width: int,
        num_blocks: Sequence[int],
        activation: Callable[[], nn.Module] = fl.ReLU,
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.in_channels = in_channels

        def blocks(count: int) -> list[TinyBlock]:
            return [TinyBlock(width, activation, **factory) for _ in range(count)]

        def halving() -> HalvingConvolution:
            return HalvingConvolution(width, width, kernel_size=3, padding=1, stride=2, use_bias=False, **factory)

        super().__init__(
            ToShares(),
            InputBlock(fl.Conv2d(in_channels, width, kernel_size=3, padding=1, **factory), *blocks(num_blocks[0])),
            *(DownBlock(halving(), *blocks(count)) for count in num_blocks[1:]),
            fl.Conv2d(width, latent_channels, kernel_size=3, padding=1, **factory),
        )


class TinyDecoder(fl.Chain):
    """From latents to a picture.

    Args:
        out_channels: Colours of the picture.
        latent_channels: Channels of the latents.
        width: Channels of all blocks.
        num_blocks: Blocks at each size, from the smallest to the largest.
        upscale: How much the image is enlarged between the sizes.
        activation: Makes the activation of the blocks.

    Receives:
        Float[Tensor, "batch latent_channels height width"]

    Returns:
        Float[Tensor, "batch out_channels scale*height scale*width"], between -1 and 1, or little more
    """

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        width: int,
        num_blocks: Sequence[int],
        upscale: int = 2,
        activation: Callable[[], nn.Module] = fl.ReLU,
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.in_channels = latent_channels

        def blocks(count: int) -> list[TinyBlock]:
            return [TinyBlock(width, activation, **factory) for _ in range(count)]

        def smoothing() -> fl.Conv2d:
            return fl.Conv2d(width, width, kernel_size=3, padding=1, use_bias=False, **factory)

        super().__init__(
            SoftClamp(),
            InputBlock(fl.Conv2d(latent_channels, width, kernel_size=3, padding=1, **factory), activation()),
            *(UpBlock(*blocks(count), Enlarge(upscale), smoothing()) for count in num_blocks[:-1]),
            OutputBlock(*blocks(num_blocks[-1]), fl.Conv2d(width, out_channels, kernel_size=3, padding=1, **factory)),
            FromShares(),
        )


class ThroughBytes(fl.Module):
    """Rounds latents as if a picture of bytes had held them.

    Receives:
        Float[Tensor, "*shape"]

    Returns:
        Float[Tensor, "*shape"], one of 256 values each
    """

    def __init__(self, magnitude: float = 3, shift: float = 0.5) -> None:
        self.magnitude = magnitude
        self.shift = shift
        super().__init__()

    def to_shares(self, latents: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Latents from 0 to 1: what is beyond the magnitude is cut off."""
        return latents.div(2 * self.magnitude).add(self.shift).clamp(0, 1)

    def from_shares(self, shares: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The way back."""
        return shares.sub(self.shift).mul(2 * self.magnitude)

    def forward(self, latents: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        bytes_ = self.to_shares(latents).mul(255).round().byte()
        return self.from_shares(bytes_.to(latents.dtype) / 255.0)


class AutoencoderTiny(Autoencoder):
    """A small encoder and a small decoder. Called, it rounds the latents to bytes in between.

    Args:
        in_channels: Colours that the encoder takes.
        out_channels: Colours that the decoder makes.
        latent_channels: Channels of the latents.
        encoder_width: Channels of the encoder's blocks.
        decoder_width: Channels of the decoder's blocks.
        encoder_blocks: Blocks at each size of the encoder, from the largest to the smallest.
        decoder_blocks: Blocks at each size of the decoder, from the smallest to the largest.
        upscale: How much the decoder enlarges between its sizes.
        activation: Makes the activation of the blocks.
        latent_magnitude: The largest latent that bytes hold.
        latent_shift: Where 0 lies between the smallest and the largest byte.
        scaling: What `scale` and `unscale` do: nothing, since the latents are those that diffusion models take.

    Receives:
        pixels: Float[Tensor, "batch in_channels height width"], between -1 and 1

    Returns:
        Float[Tensor, "batch out_channels out_height out_width"]

    Raises:
        ConversionError: (a ValueError) there are no blocks.

    Example:
        >>> autoencoder = AutoencoderTiny(encoder_width=8, decoder_width=8)
        >>> latents = autoencoder.encode(torch.zeros(1, 3, 16, 16)).mode()
        >>> autoencoder.decode(latents).shape
        torch.Size([1, 3, 16, 16])
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        encoder_width: int = 64,
        decoder_width: int = 64,
        encoder_blocks: Sequence[int] = (1, 3, 3, 3),
        decoder_blocks: Sequence[int] = (3, 3, 3, 1),
        upscale: int = 2,
        activation: Callable[[], nn.Module] = fl.ReLU,
        latent_magnitude: float = 3,
        latent_shift: float = 0.5,
        scaling: LatentScaling = LatentScaling(1.0),  # noqa: B008 (immutable)
        **factory: Unpack[fl.Factory],
    ) -> None:
        if not encoder_blocks or not decoder_blocks:
            raise ConversionError(
                f"AutoencoderTiny: encoder_blocks={tuple(encoder_blocks)} and decoder_blocks={tuple(decoder_blocks)} "
                "give the number of blocks at each size. Give at least one size."
            )
        self.latent_channels = latent_channels
        self.force_upcast = False
        # Upstream's tiles take this size and this scale for granted.
        self.tile_size = 512
        self.tile_scale = 2**out_channels
        super().__init__(
            TinyEncoder(in_channels, latent_channels, encoder_width, encoder_blocks, activation, **factory),
            ThroughBytes(latent_magnitude, latent_shift),
            TinyDecoder(out_channels, latent_channels, decoder_width, decoder_blocks, upscale, activation, **factory),
            scaling=scaling,
            downscale_factor=2 ** (len(encoder_blocks) - 1),
        )

    def encode(self, pixels: Float[Tensor, "batch in_channels height width"]) -> PointPosterior:
        return PointPosterior(self._encode(pixels))

    def _tiling_adapters(self) -> tuple[TilingAdapter, TilingAdapter]:
        scale = self.tile_scale
        return (
            RampTilingAdapter(self.encoder, self.tile_size, (1, scale)),
            RampTilingAdapter(self.decoder, self.tile_size // scale, (scale, 1)),
        )
