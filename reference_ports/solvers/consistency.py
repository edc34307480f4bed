"""LCM and TCD: sampling of distilled models, which predict the end of the path in few steps.

Follows arXiv:2310.04378 (latent consistency models), arXiv:2402.19159 (trajectory consistency distillation) and
diffusers 0.42.1 (`LCMScheduler`, `TCDScheduler`).

Differs from upstream: `strength` and `eta` are parameters, not arguments.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from reference_ports.blocks.randomness import Generators
from reference_ports.solvers.alphas import AlphaParameters, AlphaSolver
from reference_ports.solvers.parameters import (
    SAMPLING,
    BetaSchedule,
    ClippingParameters,
    PredictionType,
    ZeroTerminalSNRParameters,
)
from reference_ports.solvers.prediction import Number, Sample, clean_sample, clipped, draw, noise_of
from reference_ports.solvers.solver import rows
from refiners.errors import InputError

_SAMPLE_DEVIATION = 0.5


@dataclass(frozen=True, kw_only=True)
class ConsistencyParameters(ClippingParameters, ZeroTerminalSNRParameters, AlphaParameters):
    """What `LCM` and `TCD` share."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    clip_sample: bool = False
    original_inference_steps: int = 50
    """The steps of the distillation, from which those of the run are taken."""
    set_alpha_to_one: bool = True
    """Without effect, as upstream: no step leads before timestep 0."""
    prediction_type: PredictionType = "epsilon"
    timestep_scaling: float = 10.0
    """What the timestep is multiplied by where the boundary of a consistency model is computed."""
    strength: float = field(default=1.0, metadata=SAMPLING)
    """Share of the distillation's steps to choose from, counted from its clean end; below 1 for image to image."""

    def problems(self) -> list[str]:
        problems = super().problems()
        if not 0 < self.original_inference_steps <= self.num_train_timesteps:
            problems.append(f"original_inference_steps is not from 1 to {self.num_train_timesteps}")
        return [*problems, *([] if 0 < self.strength <= 1 else ["strength is not above 0 and up to 1"])]


C = TypeVar("C", bound=ConsistencyParameters)


class ConsistencySolver(AlphaSolver[C]):
    """A solver whose timesteps are some of those of the distillation."""

    takes_timesteps = True

    def spaced(self) -> list[int]:
        own, count = self.params, self.num_inference_steps
        if self.given_timesteps is not None:
            if own.strength != 1:
                raise InputError("timesteps of one's own exclude a strength below 1: begin at a later `first_step`.")
            return list(map(int, self.given_timesteps))
        steps = int(own.original_inference_steps * own.strength)
        if count > steps:
            raise InputError(
                f"num_inference_steps is {count}, and the distillation has {steps} steps at this strength: take fewer, "
                "or raise original_inference_steps or strength."
            )
        falling = np.arange(steps, 0, -1) * (own.num_train_timesteps // own.original_inference_steps) - 1
        return falling[np.floor(np.linspace(0, steps, num=count, endpoint=False)).astype(int)].tolist()

    def following(self) -> Tensor:
        """The timestep that each step leads to; the last one stays."""
        return torch.cat([self.timesteps[1:], self.timesteps[-1:]])


class LCMNumbers(NamedTuple):
    """The numbers of one step of `LCM`."""

    alpha: Number
    sigma: Number
    """√ᾱ and √(1 - ᾱ) at the timestep."""
    skip: Number
    out: Number
    """The shares of the noisy and of the clean sample in a consistency model."""
    next_alpha: Number
    next_sigma: Number
    """√ᾱ and √(1 - ᾱ) where the step leads."""


class LCM(ConsistencySolver[ConsistencyParameters]):
    """Multistep consistency sampling. Every step but the last draws noise.

    Example:
        >>> LCM(4).timesteps
        tensor([999, 759, 499, 259])
    """

    parameters_type = ConsistencyParameters

    def make_steps(self) -> None:
        alpha, next_alpha = self.alphas_cumprod[self.timesteps], self.alphas_cumprod[self.following()]
        scaled = self.timesteps.to(torch.float32) * self.params.timestep_scaling
        variance = _SAMPLE_DEVIATION**2
        skip, out = variance / (scaled**2 + variance), scaled / (scaled**2 + variance) ** 0.5
        roots = (alpha.sqrt(), (1 - alpha).sqrt()), (next_alpha.sqrt(), (1 - next_alpha).sqrt())
        self._numbers = rows(LCMNumbers, *roots[0], skip, out, *roots[1])

    def step(self, x: Sample, prediction: Sample, step: int, generator: Generators = None) -> Sample:
        self._check(x, prediction, step)
        own, numbers = self.params, self._numbers[step]
        sample = clipped(own, clean_sample(own.prediction_type, x, prediction, numbers.alpha, numbers.sigma))
        sample = numbers.out * sample + numbers.skip * x
        if step == len(self.timesteps) - 1:
            return sample
        return numbers.next_alpha * sample + numbers.next_sigma * draw(sample, generator)


@dataclass(frozen=True, kw_only=True)
class TCDParameters(ConsistencyParameters):
    """The parameters of `TCD`. Upstream ignores the bounds of the sample, and so does the solver."""

    eta: float = field(default=0.3, metadata=SAMPLING)
    """γ of the paper: 0 follows the path, 1 jumps to its end and back."""

    def problems(self) -> list[str]:
        return [*super().problems(), *([] if 0 <= self.eta <= 1 else ["eta is not from 0 to 1"])]


class TCDNumbers(NamedTuple):
    """The numbers of one step of `TCD`."""

    alpha: Number
    sigma: Number
    """√ᾱ and √(1 - ᾱ) at the timestep."""
    middle_alpha: Number
    middle_sigma: Number
    """Those of the timestep that is jumped to."""
    kept: Number
    fresh: Number
    """The shares of that sample and of fresh noise where the step leads."""


class TCD(ConsistencySolver[TCDParameters]):
    """Strategic stochastic sampling. Every step but the last draws noise, unless η is 0.

    Example:
        >>> TCD(4).timesteps
        tensor([999, 759, 499, 259])
    """

    parameters_type = TCDParameters

    def make_steps(self) -> None:
        following = self.following()
        following[-1] = 0
        middle = torch.floor((1 - self.params.eta) * following.to(torch.float32)).to(torch.int64)
        alpha, middle_alpha = self.alphas_cumprod[self.timesteps], self.alphas_cumprod[middle]
        ratio = self.alphas_cumprod[following] / middle_alpha
        self._draws = self.params.eta > 0
        roots = (alpha.sqrt(), (1 - alpha).sqrt(), middle_alpha.sqrt(), (1 - middle_alpha).sqrt())
        self._numbers = rows(TCDNumbers, *roots, ratio.sqrt(), (1 - ratio).sqrt())

    def step(self, x: Sample, prediction: Sample, step: int, generator: Generators = None) -> Sample:
        self._check(x, prediction, step)
        own, numbers = self.params, self._numbers[step]
        sample = clean_sample(own.prediction_type, x, prediction, numbers.alpha, numbers.sigma)
        noise = noise_of(own.prediction_type, x, prediction, numbers.alpha, numbers.sigma)
        x = numbers.middle_alpha * sample + numbers.middle_sigma * noise
        if not self._draws or step == len(self.timesteps) - 1:
            return x
        return numbers.kept * x + numbers.fresh * draw(x, generator)
