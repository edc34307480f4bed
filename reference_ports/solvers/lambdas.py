"""Solvers in λ = ln α - ln σ, the half logarithm of the signal to noise ratio (arXiv:2206.00927).

A sample is x = α x₀ + σ ε. DPM-Solver and UniPC share the schedule, and how a prediction is read.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reference_ports.solvers.dpm_numbers import Level, level_of
from reference_ports.solvers.noise import alphas_cumprod_of, sigmas_of
from reference_ports.solvers.parameters import SAMPLING, SPACINGS, BetaParameters, FinalSigma, SigmaSpacingParameters
from reference_ports.solvers.prediction import Number, Sample, clean_sample, noise_of, thresholded
from reference_ports.solvers.sigmas import indices_of, tensor_of
from reference_ports.solvers.solver import Solver, column
from reference_ports.solvers.spacing import Grid, respaced, timesteps_of
from refiners.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LambdaParameters(SigmaSpacingParameters, BetaParameters):
    """What the solvers in λ share."""

    solver_order: int = 2
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon"
    """`flow_prediction` is the velocity of a straight path, ε - x₀."""
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    lower_order_final: bool = True
    use_flow_sigmas: bool = False
    """Whether σ runs along a straight path from 1 to 0, where α = 1 - σ."""
    flow_shift: float = 1.0
    final_sigmas_type: FinalSigma = "zero"
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    mu: float | None = field(default=None, metadata=SAMPLING)
    """The shift of a straight path where it depends on the size of the sample."""

    @property
    def predicts_noise(self) -> bool:
        """Whether the method integrates the noise instead of the clean sample."""
        return False

    @property
    def has_bounds(self) -> bool:
        """Whether the clean sample is cut."""
        return self.thresholding

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.solver_order < 1:
            problems.append(f"solver_order is {self.solver_order}, it must be above 0")
        if self.mu is not None and not self.use_dynamic_shifting:
            problems.append("mu needs use_dynamic_shifting")
        if self.predicts_noise and self.prediction_type == "flow_prediction":
            problems.append("a method that integrates the noise cannot read flow_prediction")
        return problems


class Shares(NamedTuple):
    """The shares of the clean sample and of the noise in a noisy sample, and σ / α, their ratio."""

    alpha: Number
    sigma: Number
    ratio: Number


L = TypeVar("L", bound=LambdaParameters)


class LambdaSolver(Solver[L]):
    """A solver whose steps are measured in λ.

    `sigmas` holds σ / α at every timestep, and last where the last step leads.
    """

    sigmas: Float[Tensor, "calls_and_one"]

    def make_schedule(self) -> None:
        training = sigmas_of(alphas_cumprod_of(self.params, never_zero=True))
        sigmas, timesteps = self.spaced_sigmas(training)
        last = self.last_sigma(sigmas, training) if self.params.final_sigmas_type == "sigma_min" else 0
        self.sigmas = tensor_of(np.append(sigmas, last))
        self._check_straight_path()
        self.timesteps = tensor_of(timesteps, torch.int64)

    def _check_straight_path(self) -> None:
        largest = self.sigmas.max().item()
        if self.params.use_flow_sigmas and largest > 1:
            chosen = [name for name in (*SPACINGS, "use_lu_lambdas") if getattr(self.params, name, False)]
            raise InputError(
                f"use_flow_sigmas excludes {' and '.join(chosen)} here: along a straight path σ falls from 1 to 0, and "
                f"these begin at {largest:.4g}, where upstream computes NaN. Leave one of the two out."
            )

    def spaced_sigmas(self, training: Grid) -> tuple[Grid, Grid]:
        """σ of each step but where the last leads, and its timestep, in float64."""
        own, count = self.params, self.num_inference_steps
        spaced = self.respaced(training)
        if spaced is not None:
            if self.given_timesteps is not None or self.given_sigmas is not None:
                raise InputError("σ that are spaced by themselves exclude a schedule of one's own: give one of them.")
            return spaced
        if own.use_flow_sigmas:
            sigmas = self.flow_sigmas(count)
            return sigmas, sigmas * own.num_train_timesteps
        given = self.given_timesteps
        timesteps = (self.spaced(training) if given is None else np.array(given)).astype(np.int64)
        return np.interp(timesteps, np.arange(len(training)), training), timesteps

    def respaced(self, training: Grid) -> tuple[Grid, Grid] | None:
        """σ that are spaced by themselves, and their timesteps, where the parameters ask for it."""
        sigmas = respaced(self.params, training[-1].item(), training[0].item(), self.num_inference_steps)
        if sigmas is None:
            return None
        timesteps = timesteps_of(sigmas, np.log(training))
        return sigmas, timesteps.round() if self.params.use_karras_sigmas else timesteps

    def spaced(self, training: Grid) -> Grid:
        """The timesteps of the schedule."""
        raise NotImplementedError

    def flow_sigmas(self, count: int) -> Grid:
        """σ along a straight path."""
        raise NotImplementedError

    def last_sigma(self, sigmas: Grid, training: Grid) -> float:
        """Where the last step leads if that is not 0."""
        return training[0].item()

    def make_levels(self) -> list[Level]:
        """The points of the path, one for each of `sigmas`."""
        levels = [level_of(sigma, flow=self.params.use_flow_sigmas) for sigma in self.sigmas]
        self._shares = [
            Shares(level.alpha, level.sigma, ratio) for level, ratio in zip(levels, self.sigmas, strict=True)
        ]
        return levels

    def converted(self, x: Sample, prediction: Sample, step: int) -> Sample:
        """The clean sample, or the noise, that a prediction stands for."""
        own, kind = self.params, self.params.prediction_type
        alpha, sigma, ratio = self._shares[step]
        if kind == "flow_prediction":
            sample = x - ratio * prediction
        elif own.predicts_noise:
            noise = noise_of(kind, x, prediction, alpha, sigma)
            if not own.has_bounds:
                return noise
            sample = self._thresholded(clean_sample("epsilon", x, noise, alpha, sigma))
            return noise_of("sample", x, sample, alpha, sigma)
        else:
            sample = clean_sample(kind, x, prediction, alpha, sigma)
        return self._thresholded(sample) if own.has_bounds else sample

    def _thresholded(self, sample: Sample) -> Sample:
        return thresholded(sample, self.params.dynamic_thresholding_ratio, self.params.sample_max_value)

    def add_noise_at(self, x: Sample, noise: Sample, timesteps: Int[Tensor, "batch"]) -> Sample:
        """The sample as noisy as it is at a timestep of the schedule, one for each item of the batch.

        Raises:
            InputError: one of them is not in the schedule.
        """
        return self._mix(x, noise, indices_of(timesteps, self.timesteps))

    def _mix(self, x: Sample, noise: Sample, index: Tensor) -> Sample:
        sigma = column(self.sigmas.to(x.dtype)[index], x)
        if self.params.use_flow_sigmas:
            return (1 - sigma) * x + sigma * noise
        alpha = 1 / ((sigma**2 + 1) ** 0.5)
        return alpha * x + (sigma * alpha) * noise
