"""What all autoencoders share: two sides, the scale of what lies between, and two ways to save memory.

Differs from upstream:
- Slicing and tiling are adapters, which the tree shows; upstream's are flags. `set_slicing` and `set_tiling` inject and
  eject them.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

import refiners.fluxion.layers as fl
from reference_ports.autoencoder.posterior import Posterior
from reference_ports.autoencoder.scaling import LatentScaling
from reference_ports.autoencoder.tiling import SlicingAdapter, TilingAdapter
from refiners.errors import InputError
from refiners.fluxion.layers.journal import all_or_nothing


class Autoencoder(fl.Chain):
    """An encoder, what lies between, and a decoder.

    Args:
        encoder: From pictures to latents, or to what says where they lie.
        between: From there to what the decoder takes.
        decoder: From latents to pictures.
        scaling: What `scale` and `unscale` do.
        downscale_factor: How many pixels the side of one latent pixel spans.
    """

    def __init__(
        self, encoder: fl.Chain, between: fl.Module, decoder: fl.Chain, *, scaling: LatentScaling, downscale_factor: int
    ) -> None:
        self.scaling = scaling
        self.downscale_factor = downscale_factor
        # Kept aside: an adapter may take their places among the children.
        self._sides = (encoder, decoder)
        super().__init__(encoder, between, decoder)

    @property
    def encoder(self) -> fl.Chain:
        """The first side, without the adapters around it."""
        return self._sides[0]

    @property
    def decoder(self) -> fl.Chain:
        """The second side, without the adapters around it."""
        return self._sides[1]

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by for the diffusion model."""
        return self.scaling.factor

    @property
    def shift_factor(self) -> float | None:
        """What is subtracted from latents before that, if anything."""
        return self.scaling.shift

    def encode(self, pixels: Float[Tensor, "batch in_channels height width"]) -> Posterior:
        """Where the latents of pictures lie.

        Raises:
            InputError: the pictures have other channels, or there is no batch.
        """
        raise NotImplementedError

    def decode(
        self, latents: Float[Tensor, "batch latent_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Pictures of latents, mostly between -1 and 1. The latents are not unscaled here: see `unscale`.

        Raises:
            InputError: the latents have other channels, or there is no batch.
        """
        _check("decode", "latents", latents, self.decoder)
        return self[-1](latents)

    def scale(self, latents: Float[Tensor, "batch latent_channels height width"]) -> Tensor:
        """Latents of the encoder, on the scale of the diffusion model."""
        return self.scaling.scale(latents)

    def unscale(self, latents: Float[Tensor, "batch latent_channels height width"]) -> Tensor:
        """Latents of the diffusion model, on the scale of the decoder."""
        return self.scaling.unscale(latents)

    def set_slicing(self, enabled: bool = True) -> None:
        """Encode and decode one item of a batch at a time, or no longer so. The result is the same up to rounding."""
        self._set(SlicingAdapter, enabled)

    def set_tiling(self, enabled: bool = True) -> None:
        """Encode and decode large pictures in overlapping tiles, or no longer so."""
        self._set(TilingAdapter, enabled)

    def _encode(self, pixels: Tensor) -> Tensor:
        _check("encode", "pixels", pixels, self.encoder)
        return self[0](pixels)

    @all_or_nothing
    def _set(self, kind: type[SlicingAdapter] | type[TilingAdapter], enabled: bool) -> None:
        present = [*self.layers(SlicingAdapter, recurse=True), *self.layers(TilingAdapter, recurse=True)]
        kinds = {SlicingAdapter if isinstance(adapter, SlicingAdapter) else TilingAdapter for adapter in present}
        kinds = kinds | {kind} if enabled else kinds - {kind}
        for adapter in present:
            adapter.eject()
        # Slicing first, so that tiling stands inside: the other order adds gradients up in another one.
        if SlicingAdapter in kinds:
            for side in self._sides:
                SlicingAdapter(side).inject()
        if TilingAdapter in kinds:
            for adapter in self._tiling_adapters():
                adapter.inject()

    def _tiling_adapters(self) -> tuple[TilingAdapter, TilingAdapter]:
        """For the encoder and the decoder."""
        raise NotImplementedError

    def _post_structural_copy(self, source: "Autoencoder") -> None:
        self._sides = (self[0], self[-1])


def _check(method: str, name: str, x: Any, side: Any) -> None:
    if x.ndim != 4 or x.shape[1] != side.in_channels:
        raise InputError(
            f"{method}() takes {name} of the axes (batch, {side.in_channels}, height, width); these have the shape "
            f"{tuple(x.shape)}. A single picture needs a batch of one, as in {name}[None]."
        )
