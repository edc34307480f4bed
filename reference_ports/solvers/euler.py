"""Euler: one evaluation of the denoiser a step, along the tangent; and its ancestral form, which adds fresh noise.

Follows arXiv:2206.00364 (algorithm 2 without its correction) and diffusers 0.42.1 (`EulerDiscreteScheduler`,
`EulerAncestralDiscreteScheduler`).

Differs from upstream: the churn is a parameter, not an argument of a step. `get_velocity` is left out: upstream's
reads ᾱ at the place of a timestep in the schedule, which is that of another timestep.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch

from reference_ports.blocks.randomness import Generators
from reference_ports.solvers.parameters import (
    SAMPLING,
    FinalSigma,
    PredictionType,
    SigmaSpacingParameters,
    ZeroTerminalSNRParameters,
)
from reference_ports.solvers.prediction import Number, Sample, draw
from reference_ports.solvers.sigmas import SigmaParameters, SigmaSolver, ancestral, denoised, tensor_of
from reference_ports.solvers.solver import rows
from reference_ports.solvers.spacing import Grid, timesteps_of
from refiners.errors import InputError


@dataclass(frozen=True, kw_only=True)
class EulerParameters(SigmaSpacingParameters, ZeroTerminalSNRParameters, SigmaParameters):
    """The parameters of `Euler`."""

    prediction_type: PredictionType = "epsilon"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    """How σ is read between two timesteps; `log_linear` spaces ln σ evenly instead, whatever the timesteps."""
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    """`continuous` gives a denoiser of `v_prediction` ln σ / 4 instead of the timestep."""
    final_sigmas_type: FinalSigma = "zero"
    s_churn: float = field(default=0.0, metadata=SAMPLING)
    """How much noise is added over the run before it is removed again."""
    s_tmin: float = field(default=0.0, metadata=SAMPLING)
    s_tmax: float = field(default=float("inf"), metadata=SAMPLING)
    """Noise is added where σ lies between the two."""
    s_noise: float = field(default=1.0, metadata=SAMPLING)
    """The deviation of that noise."""


class Numbers(NamedTuple):
    """The numbers of one step."""

    churned: Number
    """σ̂: the noise after some was added."""
    added: Number
    """√(σ̂² - σ²): how much that is."""
    change: Number
    """How far σ falls."""
    skip: Number
    out: Number
    """See `denoised`."""


class Euler(SigmaSolver[EulerParameters]):
    """Euler's method in σ, with churn where it is asked for.

    Example:
        >>> Euler(3, EulerParameters(use_karras_sigmas=True)).timesteps
        tensor([999.0000, 592.9974,   0.0000])
    """

    parameters_type = EulerParameters
    takes_timesteps = True
    takes_sigmas = True
    sigmas_end_in = 1

    def make_schedule(self) -> None:
        self.sigmas, timesteps = self._make_sigmas()
        if self.is_continuous:
            timesteps = torch.stack([0.25 * sigma.log() for sigma in self.sigmas[:-1]])
        self.timesteps = timesteps
        self.set_initial_scale()

    @property
    def is_continuous(self) -> bool:
        """Whether the denoiser is given ln σ / 4."""
        return self.params.timestep_type == "continuous" and self.params.prediction_type == "v_prediction"

    def _make_sigmas(self) -> tuple[torch.Tensor, torch.Tensor]:
        own, training = self.params, self.training_sigmas()
        if self.given_sigmas is not None:
            sigmas = np.array(self.given_sigmas).astype(np.float32)
            return tensor_of(sigmas), tensor_of(timesteps_of(sigmas[:-1], np.log(training)))
        sigmas, timesteps = self.spaced_sigmas()
        if self.given_timesteps is not None and self.is_continuous:
            raise InputError(
                "timestep_type='continuous' with v_prediction has no timesteps of the training: give sigmas instead."
            )
        last = training[0] if own.final_sigmas_type == "sigma_min" else 0
        return tensor_of(np.append(sigmas, last)), tensor_of(timesteps)

    def interpolated(self, timesteps: Grid, training: Grid) -> Grid:
        if self.params.interpolation_type == "linear":
            return super().interpolated(timesteps, training)
        start, end, count = np.log(training[-1]).item(), np.log(training[0]).item(), self.num_inference_steps + 1
        return torch.linspace(start, end, count, dtype=torch.float32, device="cpu").exp().numpy()

    def make_steps(self) -> None:
        super().make_steps()
        own = self.params
        sigmas = self.input_sigmas()
        most = min(own.s_churn / (len(self.sigmas) - 1), 2**0.5 - 1)
        self._churns = [most > 0 and bool(own.s_tmin <= sigma <= own.s_tmax) for sigma in sigmas]
        churned = torch.where(torch.tensor(self._churns, device="cpu"), sigmas * (most + 1), sigmas)
        added = (churned**2 - sigmas**2) ** 0.5
        change = self.sigmas[1 : len(sigmas) + 1] - churned
        skip = sigmas**2 + 1
        self._numbers = rows(Numbers, churned, added, change, skip, -sigmas / skip**0.5)

    def step(self, x: Sample, prediction: Sample, step: int, generator: Generators = None) -> Sample:
        self._check(x, prediction, step)
        own, numbers = self.params, self._numbers[step]
        x = x.to(torch.float32)
        if self._churns[step]:
            x = x + (draw(prediction, generator) * own.s_noise) * numbers.added
        sample = denoised(own.prediction_type, x, prediction, numbers.churned, numbers.skip, numbers.out)
        slope = (x - sample) / numbers.churned
        return (x + slope * numbers.change).to(prediction.dtype)


@dataclass(frozen=True, kw_only=True)
class EulerAncestralParameters(ZeroTerminalSNRParameters, SigmaParameters):
    """The parameters of `EulerAncestral`."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"


class AncestralNumbers(NamedTuple):
    """The numbers of one ancestral step."""

    sigma: Number
    change: Number
    """How far σ falls: below where the step leads, by what the fresh noise brings back."""
    fresh: Number
    """How much noise is drawn."""
    skip: Number
    out: Number
    """See `denoised`."""


class EulerAncestral(SigmaSolver[EulerAncestralParameters]):
    """Euler's method in σ with fresh noise in every step, as in ancestral sampling (arXiv:2006.11239).

    The last step draws noise as well, and leaves it out.
    """

    parameters_type = EulerAncestralParameters

    def make_schedule(self) -> None:
        sigmas, timesteps = self.spaced_sigmas()
        self.sigmas, self.timesteps = tensor_of(np.append(sigmas, 0.0)), tensor_of(timesteps)
        self.set_initial_scale()

    def make_steps(self) -> None:
        super().make_steps()
        sigmas, following = self.sigmas[:-1], self.sigmas[1:]
        up, down = ancestral(sigmas, following)
        skip = sigmas**2 + 1
        self._numbers = rows(AncestralNumbers, sigmas, down - sigmas, up, skip, -sigmas / skip**0.5)

    def step(self, x: Sample, prediction: Sample, step: int, generator: Generators = None) -> Sample:
        self._check(x, prediction, step)
        numbers = self._numbers[step]
        x = x.to(torch.float32)
        kind = self.params.prediction_type
        sample = denoised(kind, x, prediction, numbers.sigma, numbers.skip, numbers.out)
        slope = (x - sample) / numbers.sigma
        x = x + slope * numbers.change
        return (x + draw(prediction, generator) * numbers.fresh).to(prediction.dtype)
