"""DDIM: denoising along an implicit process that needs few steps, with as much fresh noise as η asks for.

Follows arXiv:2010.02502, equations 12 and 16, and diffusers 0.42.1 (`DDIMScheduler`).

Differs from upstream: `eta` and `use_clipped_model_output` are parameters, not arguments of a step.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from reference_ports.blocks.randomness import Generators
from reference_ports.solvers.alphas import AlphaParameters, AlphaSolver
from reference_ports.solvers.parameters import (
    SAMPLING,
    ClippingParameters,
    PredictionType,
    ZeroTerminalSNRParameters,
)
from reference_ports.solvers.prediction import Number, Sample, clean_sample, clipped, draw, noise_of
from reference_ports.solvers.solver import rows


@dataclass(frozen=True, kw_only=True)
class DDIMParameters(ClippingParameters, ZeroTerminalSNRParameters, AlphaParameters):
    """The parameters of `DDIM`."""

    set_alpha_to_one: bool = True
    """Whether the last step leads to ᾱ = 1, or to that of timestep 0."""
    prediction_type: PredictionType = "epsilon"
    eta: float = field(default=0.0, metadata=SAMPLING)
    """Share of fresh noise in each step: 0 for none, 1 for as much as DDPM has."""
    use_clipped_model_output: bool = field(default=False, metadata=SAMPLING)
    """Whether the noise follows from the clipped sample."""


class Numbers(NamedTuple):
    """The numbers of one step."""

    alpha: Number
    """√ᾱ at the timestep."""
    sigma: Number
    """√(1 - ᾱ) at the timestep."""
    next_alpha: Number
    """√ᾱ where the step leads."""
    direction: Number
    """√(1 - ᾱ - σ²) there: how much of the predicted noise stays."""
    fresh: Number
    """σ: how much noise is drawn."""


class DDIM(AlphaSolver[DDIMParameters]):
    """Denoising diffusion implicit models.

    Example:
        >>> DDIM(5, DDIMParameters(steps_offset=1)).timesteps
        tensor([801, 601, 401, 201,   1])
    """

    parameters_type = DDIMParameters

    def make_steps(self) -> None:
        own = self.params
        next_timesteps = self.timesteps - own.num_train_timesteps // self.num_inference_steps
        alpha = self.alphas_cumprod[self.timesteps]
        next_alpha = self._alphas_at(next_timesteps, 1.0 if own.set_alpha_to_one else self.alphas_cumprod[0])
        variance = ((1 - next_alpha) / (1 - alpha)) * (1 - alpha / next_alpha)
        fresh = own.eta * variance**0.5
        self._draws = own.eta > 0
        direction = (1 - next_alpha - fresh**2) ** 0.5
        self._numbers = rows(Numbers, alpha**0.5, (1 - alpha) ** 0.5, next_alpha**0.5, direction, fresh)

    def step(self, x: Sample, prediction: Sample, step: int, generator: Generators = None) -> Sample:
        self._check(x, prediction, step)
        own, numbers = self.params, self._numbers[step]
        sample = clean_sample(own.prediction_type, x, prediction, numbers.alpha, numbers.sigma)
        noise = noise_of(own.prediction_type, x, prediction, numbers.alpha, numbers.sigma)
        sample = clipped(own, sample)
        if own.use_clipped_model_output:
            noise = noise_of("sample", x, sample, numbers.alpha, numbers.sigma)
        x = numbers.next_alpha * sample + numbers.direction * noise
        return x + numbers.fresh * draw(prediction, generator) if self._draws else x
