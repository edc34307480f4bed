"""DDPM: ancestral sampling, which takes back what the training added one step at a time.

Follows arXiv:2006.11239, equations 6 and 7, arXiv:2102.09672 for learned variances, and diffusers 0.42.1
(`DDPMScheduler`).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reference_ports.blocks.randomness import Generators
from reference_ports.solvers.alphas import AlphaParameters, AlphaSolver
from reference_ports.solvers.noise import each
from reference_ports.solvers.parameters import ClippingParameters, PredictionType, ZeroTerminalSNRParameters
from reference_ports.solvers.prediction import Number, Sample, clean_sample, clipped, draw
from reference_ports.solvers.solver import rows
from refiners.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DDPMParameters(ClippingParameters, ZeroTerminalSNRParameters, AlphaParameters):
    """The parameters of `DDPM`."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"] = "linear"  # pyright: ignore[reportIncompatibleVariableOverride]: more than others have
    variance_type: Literal[
        "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
    ] = "fixed_small"
    """The variance of the noise: that of the posterior, β, or what the denoiser predicts behind the noise."""
    prediction_type: PredictionType = "epsilon"


class Numbers(NamedTuple):
    """The numbers of one step."""

    alpha: Number
    """√ᾱ at the timestep."""
    sigma: Number
    """√(1 - ᾱ) at the timestep."""
    of_sample: Number
    of_x: Number
    """The shares of the clean and of the noisy sample in the mean of the posterior."""
    deviation: Number
    """That of the noise, where it is fixed."""
    low: Number
    high: Number
    """ln of the two variances between which a learned one lies."""


class DDPM(AlphaSolver[DDPMParameters]):
    """Denoising diffusion probabilistic models.

    Every step but that of timestep 0 draws noise. With a learned variance the prediction has twice the channels.

    Example:
        >>> DDPM(4).timesteps
        tensor([750, 500, 250,   0])
    """

    parameters_type = DDPMParameters
    takes_timesteps = True

    def spaced(self) -> list[int]:
        return super().spaced() if self.given_timesteps is None else list(map(int, self.given_timesteps))

    def make_steps(self) -> None:
        alpha = self.alphas_cumprod[self.timesteps]
        next_alpha = torch.cat([alpha[1:], torch.ones_like(alpha[:1])])
        beta, next_beta = 1 - alpha, 1 - next_alpha
        kept = alpha / next_alpha
        added = 1 - kept
        variance = (next_beta / beta * added).clamp(min=1e-20)
        self._numbers = rows(
            Numbers,
            alpha**0.5,
            beta**0.5,
            (next_alpha**0.5 * added) / beta,
            kept**0.5 * next_beta / beta,
            self._deviation(variance, added),
            each(torch.log, variance),
            each(torch.log, added),
        )
        self._draws = [bool(timestep > 0) for timestep in self.timesteps]

    def _deviation(self, variance: Tensor, added: Tensor) -> Tensor:
        match self.params.variance_type:
            case "fixed_small_log":
                return each(torch.exp, 0.5 * each(torch.log, variance))
            case "fixed_large":
                return added**0.5
            case "fixed_large_log":
                return each(torch.log, added) ** 0.5
            case _:
                return variance**0.5

    def step(self, x: Sample, prediction: Sample, step: int, generator: Generators = None) -> Sample:
        own = self.params
        learned = own.variance_type in ("learned", "learned_range")
        prediction, spread = self._split(x, prediction) if learned else (prediction, x)
        self._check(x, prediction, step)
        numbers = self._numbers[step]
        sample = clipped(own, clean_sample(own.prediction_type, x, prediction, numbers.alpha, numbers.sigma))
        x = numbers.of_sample * sample + numbers.of_x * x
        if not self._draws[step]:
            return x + 0
        noise = draw(prediction, generator)
        if own.variance_type == "learned":
            return x + spread**0.5 * noise
        if own.variance_type == "learned_range":
            share = (spread + 1) / 2
            return x + torch.exp(0.5 * (share * numbers.high + (1 - share) * numbers.low)) * noise
        return x + numbers.deviation * noise

    def _split(self, x: Sample, prediction: Sample) -> tuple[Sample, Sample]:
        if prediction.shape[1] != 2 * x.shape[1]:
            raise InputError(
                f"variance_type={self.params.variance_type!r} takes {2 * x.shape[1]} channels, the prediction and "
                f"its variance; this prediction has {prediction.shape[1]}."
            )
        prediction, spread = torch.split(prediction, x.shape[1], dim=1)
        return prediction, spread
