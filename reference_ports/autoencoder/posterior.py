"""What an encoder says of a picture: not one point of the latent space but where it may lie.

Follows: `DiagonalGaussianDistribution` and the latents of `AutoencoderTiny` of diffusers 0.42.1.

Differs from upstream:
- There is no likelihood of a sample.
"""

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from reference_ports.blocks.randomness import Generators, draw_normal


class Posterior:
    """A normal distribution of latents, independent in each number.

    Receives:
        moments: Float[Tensor, "batch 2*channels height width"], the means and then the logarithms of the variances,
            which are held between -30 and 20.
    """

    def __init__(self, moments: Float[Tensor, "batch moments height width"]) -> None:
        self.mean, self._unbounded = moments.chunk(2, dim=1)

    @cached_property
    def log_variance(self) -> Float[Tensor, "batch channels height width"]:
        """The logarithm of the variance."""
        return self._unbounded.clamp(-30.0, 20.0)

    @property
    def standard_deviation(self) -> Float[Tensor, "batch channels height width"]:
        """The root of the variance."""
        return torch.exp(0.5 * self.log_variance)

    def mode(self) -> Float[Tensor, "batch channels height width"]:
        """The most likely latents, which are the mean."""
        return self.mean

    def sample(self, generator: Generators = None) -> Float[Tensor, "batch channels height width"]:
        """Latents drawn at random, in the dtype of the moments.

        Raises:
            InputError: there are more or fewer generators than pictures.
        """
        drawn = draw_normal(self.mean.shape, generator, self.mean.device, self.mean.dtype)
        return self.mean + self.standard_deviation * drawn

    def divergence(self) -> Float[Tensor, "batch"]:
        """The Kullback-Leibler divergence from the standard normal distribution, a loss of training, by picture."""
        terms = torch.pow(self.mean, 2) + torch.exp(self.log_variance) - 1.0 - self.log_variance
        return 0.5 * torch.sum(terms, dim=[1, 2, 3])


class PointPosterior(Posterior):
    """Latents that are certain, where a distribution is expected: a sample draws nothing."""

    def __init__(self, latents: Float[Tensor, "batch channels height width"]) -> None:  # pyright: ignore[reportMissingSuperCall] (there are no moments)
        self.mean = latents

    @cached_property
    def log_variance(self) -> Float[Tensor, "batch channels height width"]:
        """The logarithm of 0."""
        return torch.full_like(self.mean, float("-inf"))

    def sample(self, generator: Generators = None) -> Float[Tensor, "batch channels height width"]:
        return self.mean
