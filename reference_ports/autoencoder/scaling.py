"""How latents are brought to the scale that diffusion models work in, and back.

An autoencoder's latents have the variance that its training gave them. A diffusion model wants about 1, so what
pipelines hand to it is scaled, and what it gives is unscaled before it is decoded.

Follows: the pipelines of diffusers 0.42.1, which compute this themselves, from the configuration of the autoencoder.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LatentScaling:
    """One factor for all latents, with a shift before it, or with a mean and a deviation for each channel."""

    factor: float = 0.18215
    shift: float | None = None
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None

    def scale(self, latents: Float[Tensor, "batch channels height width"]) -> Tensor:
        """From the encoder's scale to the diffusion model's."""
        if self.mean is not None and self.deviation is not None:
            mean, deviation = self._per_channel(self.mean, latents), self._per_channel(self.deviation, latents)
            return (latents - mean) * self.factor / deviation
        if self.shift is not None:
            latents = latents - self.shift
        return latents * self.factor

    def unscale(self, latents: Float[Tensor, "batch channels height width"]) -> Tensor:
        """From the diffusion model's scale to the decoder's."""
        if self.mean is not None and self.deviation is not None:
            mean, deviation = self._per_channel(self.mean, latents), self._per_channel(self.deviation, latents)
            return latents * deviation / self.factor + mean
        latents = latents / self.factor
        return latents if self.shift is None else latents + self.shift

    @staticmethod
    def _per_channel(numbers: tuple[float, ...], latents: Tensor) -> Float[Tensor, "1 channels 1 1"]:
        # Through torch's default dtype first, as upstream makes them.
        return torch.tensor(numbers).view(1, -1, 1, 1).to(latents.device, latents.dtype)
