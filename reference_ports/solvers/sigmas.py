"""Solvers on noise levels σ: a noisy sample is x = x₀ + σ ε, and falls along dx/dσ = (x - x₀) / σ (arXiv:2206.00364).

Denoisers were trained on samples of variance 1, so they are given x / √(σ² + 1).
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reference_ports.solvers.noise import alphas_cumprod_of, sigmas_of
from reference_ports.solvers.parameters import BetaParameters, PredictionType, SigmaSpacingParameters, TimestepSpacing
from reference_ports.solvers.prediction import Number, Sample
from reference_ports.solvers.solver import Solver, column
from reference_ports.solvers.spacing import Grid, respaced, spaced_timesteps, timesteps_of
from refiners.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SigmaParameters(BetaParameters):
    """Where the timesteps of the schedule stand among those of the training."""

    timestep_spacing: TimestepSpacing = "linspace"
    steps_offset: int = 0


B = TypeVar("B", bound=SigmaParameters)


def denoised(kind: PredictionType, x: Sample, prediction: Sample, sigma: Number, skip: Number, out: Number) -> Sample:
    """The clean sample that a prediction stands for.

    Receives:
        skip: σ² + 1, what the sample is divided by under `v_prediction`.
        out: -σ / √(σ² + 1), what the prediction is multiplied by.
    """
    if kind == "epsilon":
        return x - sigma * prediction
    if kind == "v_prediction":
        return prediction * out + x / skip
    return prediction


def tensor_of(grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """A grid as a tensor on the CPU."""
    return torch.tensor(np.ascontiguousarray(grid), device="cpu").to(dtype)


class SigmaSolver(Solver[B]):
    """A solver with noise levels of its own.

    `sigmas` holds σ before each call of the denoiser, and last where the last step leads.
    """

    sigmas: Float[Tensor, "calls_and_one"]

    def spaced(self) -> Grid:
        """The timesteps that the schedule begins with, in float32."""
        own = self.params
        if self.given_timesteps is not None:
            return np.array(self.given_timesteps).astype(np.float32)
        count = self.num_inference_steps
        spaced = spaced_timesteps(own.timestep_spacing, own.num_train_timesteps, count, offset=own.steps_offset)
        return spaced.astype(np.float32)

    def training_sigmas(self) -> Grid:
        """σ at every timestep of the training, from the cleanest on."""
        return sigmas_of(alphas_cumprod_of(self.params, never_zero=True))

    def spaced_sigmas(self) -> tuple[Grid, Grid]:
        """σ of each step but where the last leads, and its timestep."""
        own, training, timesteps = self.params, self.training_sigmas(), self.spaced()
        sigmas = self.interpolated(timesteps, training)
        if isinstance(own, SigmaSpacingParameters):
            spaced = respaced(own, sigmas[0].item(), sigmas[-1].item(), self.num_inference_steps)
            if spaced is not None:
                if self.given_timesteps is not None:
                    raise InputError(
                        "σ that are spaced by themselves exclude timesteps of one's own: give one of them."
                    )
                return spaced, timesteps_of(spaced, np.log(training))
        return sigmas, timesteps

    def interpolated(self, timesteps: Grid, training: Grid) -> Grid:
        """σ at some timesteps."""
        return np.interp(timesteps, np.arange(len(training)), training)

    def set_initial_scale(self) -> None:
        """The scale of the first sample: √(σ² + 1) where the schedule begins below the noisiest timestep."""
        largest = self.sigmas.max()
        noisiest = self.params.timestep_spacing in ("linspace", "trailing")
        self.initial_noise_scale = (largest if noisiest else (largest**2 + 1) ** 0.5).item()

    def input_sigmas(self) -> Float[Tensor, "calls"]:
        """σ of what the denoiser is given in each call."""
        return self.sigmas[: len(self.timesteps)]

    def make_steps(self) -> None:
        self._input_scales = ((self.input_sigmas() ** 2 + 1) ** 0.5).unbind()

    def scale_model_input(self, x: Sample, step: int) -> Sample:
        self._check_step(step)
        return x / self._input_scales[step]

    def add_noise_at(self, x: Sample, noise: Sample, timesteps: Float[Tensor, "batch"]) -> Sample:
        """The sample as noisy as it is at a timestep of the schedule, one for each item of the batch.

        Raises:
            InputError: one of them is not in the schedule.
        """
        return self._mix(x, noise, indices_of(timesteps, self.timesteps))

    def _mix(self, x: Sample, noise: Sample, index: Tensor) -> Sample:
        return x + noise * column(self.sigmas.to(x.dtype)[index], x)


def ancestral(sigmas: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """How a step between two noise levels is split: the noise that is drawn, and the level that the slope leads to."""
    up = (following**2 * (sigmas**2 - following**2) / sigmas**2) ** 0.5
    return up, (following**2 - up**2) ** 0.5


def indices_of(timesteps: Tensor, schedule: Tensor) -> Tensor:
    """Where some timesteps stand in a schedule: for one that stands there twice, its second place."""
    places: list[Tensor] = []
    for timestep in timesteps.cpu():
        found = (schedule == timestep).nonzero().flatten()
        if len(found) == 0:
            raise InputError(f"Timestep {timestep.item():g} is not in the schedule, {schedule}.")
        places.append(found[:2][-1])
    return torch.stack(places)
