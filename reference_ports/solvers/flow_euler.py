"""Flow matching with Euler's method: straight paths from noise to sample, along the velocity that is predicted.

Follows arXiv:2210.02747 (flow matching), arXiv:2403.03206 (shifted timesteps) and diffusers 0.42.1
(`FlowMatchEulerDiscreteScheduler`).

A noisy sample is x = (1 - σ) x₀ + σ ε, and v = ε - x₀ is dx/dσ. Where the shift is fixed, upstream shifts the two ends
of the schedule before it begins and every σ once more, so that the last one is shifted twice. Models are published with
that schedule, and it is kept.

Differs from upstream: `mu` is a parameter. Timesteps that differ from token to token are left out.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reference_ports.blocks.randomness import Generators
from reference_ports.solvers.parameters import SAMPLING, SigmaSpacingParameters
from reference_ports.solvers.prediction import Sample, draw
from reference_ports.solvers.sigmas import indices_of, tensor_of
from reference_ports.solvers.solver import Solver, column
from reference_ports.solvers.spacing import Grid, respaced, shifted_in_time, stretched
from refiners.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FlowEulerParameters(SigmaSpacingParameters):
    """The parameters of `FlowEuler`."""

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    """Whether the shift depends on the size of the sample: then `mu` says it."""
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    """See `mu_for`."""
    invert_sigmas: bool = False
    """Whether the path runs from sample to noise."""
    shift_terminal: float | None = None
    """The last σ, to which the others are stretched."""
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    stochastic_sampling: bool = False
    """Whether each step draws its noise anew."""
    mu: float | None = field(default=None, metadata=SAMPLING)

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.mu is not None and not self.use_dynamic_shifting:
            problems.append("mu needs use_dynamic_shifting")
        return problems

    def mu_for(self, sequence_length: int) -> float:
        """The shift for a number of tokens: a straight line through the two that the configuration holds."""
        if self.base_shift is None or self.max_shift is None:
            raise InputError("base_shift and max_shift are None: give mu itself.")
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return sequence_length * slope + (self.base_shift - slope * self.base_image_seq_len)


class FlowEuler(Solver[FlowEulerParameters]):
    """Euler's method along straight paths.

    Example:
        >>> FlowEuler(5, FlowEulerParameters(shift=3.0)).timesteps
        tensor([1000.0000,  900.3591,  751.1211,  502.9850,    8.9286])
    """

    parameters_type = FlowEulerParameters
    takes_timesteps = True
    takes_sigmas = True

    sigmas: Float[Tensor, "steps_and_one"]

    @property
    def largest_timestep(self) -> int:
        return self.params.num_train_timesteps

    def make_schedule(self) -> None:
        own, count = self.params, self.params.num_train_timesteps
        spaced = self._shifted(self._unshifted())
        if own.shift_terminal:
            spaced = stretched(spaced, own.shift_terminal)
        respaced_by_themselves = respaced(own, spaced[0].item(), spaced[-1].item(), self.num_inference_steps)
        sigmas = tensor_of(spaced if respaced_by_themselves is None else respaced_by_themselves)
        given = self.given_timesteps
        timesteps = sigmas * count if given is None else tensor_of(np.array(given).astype(np.float32))
        if own.invert_sigmas:
            sigmas = 1.0 - sigmas
            timesteps = sigmas * count
        end = torch.ones_like(sigmas[:1]) if own.invert_sigmas else torch.zeros_like(sigmas[:1])
        self.timesteps, self.sigmas = timesteps, torch.cat([sigmas, end])

    def _unshifted(self) -> Grid:
        """σ before the shift that all of them get."""
        own, count = self.params, self.params.num_train_timesteps
        if self.given_sigmas is not None:
            return np.array(self.given_sigmas).astype(np.float32)
        if self.given_timesteps is not None:
            return np.array(self.given_timesteps).astype(np.float32) / count
        ends = torch.tensor([count, 1], dtype=torch.float32, device="cpu") / count
        if not own.use_dynamic_shifting:
            ends = own.shift * ends / (1 + (own.shift - 1) * ends)
        return np.linspace(ends[0].item() * count, ends[1].item() * count, self.num_inference_steps) / count

    def _shifted(self, sigmas: Grid) -> Grid:
        own = self.params
        if not own.use_dynamic_shifting:
            return own.shift * sigmas / (1 + (own.shift - 1) * sigmas)
        if own.mu is None:
            raise InputError("use_dynamic_shifting needs mu, the shift for the size of the sample: see `mu_for`.")
        return shifted_in_time(own.time_shift_type, own.mu, sigmas)

    def make_steps(self) -> None:
        starts, ends = self.sigmas[:-1], self.sigmas[1:]
        columns = (starts.unbind(), ends.unbind(), (ends - starts).unbind(), (1.0 - ends).unbind())
        self._numbers = list(zip(*columns, strict=True))

    def step(self, x: Sample, prediction: Sample, step: int, generator: Generators = None) -> Sample:
        self._check(x, prediction, step)
        sigma, following, change, kept = self._numbers[step]
        x = x.to(torch.float32)
        if self.params.stochastic_sampling:
            x = kept * (x - sigma * prediction) + following * draw(x, generator)
        else:
            x = x + change * prediction
        return x.to(prediction.dtype)

    def add_noise_at(self, x: Sample, noise: Sample, timesteps: Float[Tensor, "batch"]) -> Sample:
        """The sample as noisy as it is at a timestep of the schedule, one for each item of the batch.

        Raises:
            InputError: one of them is not in the schedule.
        """
        return self._mix(x, noise, indices_of(timesteps, self.timesteps))

    def _mix(self, x: Sample, noise: Sample, index: Tensor) -> Sample:
        sigma = column(self.sigmas.to(x.dtype)[index], x)
        return sigma * noise + (1.0 - sigma) * x
