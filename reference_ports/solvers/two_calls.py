"""Heun and KDPM2: two evaluations of the denoiser a step, the second one where the first leads.

Follows arXiv:2206.00364, algorithms 1 and 2 (Heun: the mean of the slopes at both ends; KDPM2: the slope in the middle,
as DPM-Solver-2 of arXiv:2206.00927), and diffusers 0.42.1 (`HeunDiscreteScheduler`, `KDPM2DiscreteScheduler`,
`KDPM2AncestralDiscreteScheduler`).

`timesteps` has an entry for each call of the denoiser, two for each step but the last, which is one of Euler's. Unlike
other solvers these compute in the dtype of the sample.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reference_ports.blocks.randomness import Generators
from reference_ports.solvers.parameters import PredictionType, SigmaSpacingParameters
from reference_ports.solvers.prediction import Number, Sample, draw
from reference_ports.solvers.sigmas import SigmaParameters, SigmaSolver, ancestral, denoised, tensor_of
from reference_ports.solvers.solver import OrderedState, rows
from reference_ports.solvers.spacing import timestep_of


@dataclass(frozen=True, kw_only=True)
class KDPM2Parameters(SigmaSpacingParameters, SigmaParameters):
    """The parameters of `KDPM2` and `KDPM2Ancestral`."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"


@dataclass(frozen=True, kw_only=True)
class HeunParameters(SigmaSpacingParameters, SigmaParameters):
    """The parameters of `Heun`."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "exp"] = "linear"  # pyright: ignore[reportIncompatibleVariableOverride]: more than others have
    prediction_type: PredictionType = "epsilon"
    clip_sample: bool = False
    clip_sample_range: float = 1.0


T = TypeVar("T", HeunParameters, KDPM2Parameters)


@dataclass(frozen=True)
class TwoCallState(OrderedState):
    """What is remembered between the two calls of a step."""

    sample: Sample | None = None
    """The sample that the step begins from; None before its first call."""
    slope: Sample | None = None
    """The slope of the first call."""


class Numbers(NamedTuple):
    """The numbers of one call."""

    sigma: Number
    """σ of what the denoiser was given."""
    change: Number
    """How far σ falls from the start of the step."""
    fresh: Number
    """How much noise is drawn behind the second call of an ancestral step."""
    skip: Number
    out: Number
    """See `denoised`."""


class TwoCallSolver(SigmaSolver[T]):
    """A solver of two calls a step."""

    order = 2

    def initial_state(self) -> TwoCallState:
        return TwoCallState(self.first_step)

    def set_numbers(self, change: Tensor, fresh: Tensor | None = None) -> None:
        """The numbers of every call, from how far σ falls and how much noise is drawn."""
        sigmas = self.input_sigmas()
        skip = sigmas**2 + 1
        fresh = torch.zeros_like(sigmas) if fresh is None else fresh
        self._numbers = rows(Numbers, sigmas, change, fresh, skip, -sigmas / skip**0.5)

    def _slope(self, x: Sample, prediction: Sample, step: int) -> Sample:
        """dx/dσ as the denoiser has it."""
        numbers, kind = self._numbers[step], self.params.prediction_type
        sample = self.bounded(denoised(kind, x, prediction, numbers.sigma, numbers.skip, numbers.out))
        return (x - sample) / numbers.sigma

    def bounded(self, sample: Sample) -> Sample:
        """The predicted sample within its bounds."""
        return sample


class Heun(TwoCallSolver[HeunParameters]):
    """Heun's method in σ.

    Example:
        >>> Heun(3).timesteps
        tensor([999.0000, 499.5000, 499.5000,   0.0000,   0.0000])
    """

    parameters_type = HeunParameters
    takes_timesteps = True

    def make_schedule(self) -> None:
        sigmas, timesteps = map(tensor_of, self.spaced_sigmas())
        zero = torch.zeros_like(sigmas[:1])
        self.sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2), zero])
        self.timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
        self.set_initial_scale()

    def make_steps(self) -> None:
        super().make_steps()
        first = self.sigmas[1::2] - self.sigmas[:-1:2]
        self.set_numbers(first.repeat_interleave(2)[: len(self.timesteps)])

    def bounded(self, sample: Sample) -> Sample:
        own = self.params
        return sample.clamp(-own.clip_sample_range, own.clip_sample_range) if own.clip_sample else sample

    def step(self, x: Sample, prediction: Sample, step: int, generator: Generators = None) -> Sample:
        self._check_turn(x, prediction, step)
        slope = self._slope(x, prediction, step)
        start, first = self._state.sample, self._state.slope
        if start is None:
            self._state = TwoCallState(step + 1, x, slope)
            return x + slope * self._numbers[step].change
        self._state = TwoCallState(step + 1)
        return start + (first + slope) / 2 * self._numbers[step].change


class KDPM2(TwoCallSolver[KDPM2Parameters]):
    """The midpoint method in ln σ.

    Example:
        >>> KDPM2(3).timesteps
        tensor([999.0000, 778.9362, 499.5000,  54.7067,   0.0000])
    """

    parameters_type = KDPM2Parameters

    def make_schedule(self) -> None:
        spaced, timesteps = self.spaced_sigmas()
        # Timesteps of Karras's σ are rounded here, and like those of other spacings they stay in float64.
        dtype = torch.float32 if timesteps.dtype == np.float32 else torch.float64
        timesteps = tensor_of(timesteps.round() if self.params.use_karras_sigmas else timesteps, dtype)
        levels = tensor_of(np.append(spaced, 0.0))
        middles, logarithms = self.set_middles(levels), np.log(self.training_sigmas())
        between = [timestep_of(np.float32(sigma.item()), logarithms, np.float32) for sigma in middles]
        pairs = torch.stack((tensor_of(np.array(between), dtype), timesteps[1:]), dim=-1)
        self.timesteps = torch.cat([timesteps[:1], pairs.flatten()])
        self.sigmas = torch.cat([levels[:1], levels[1:].repeat_interleave(2), levels[-1:]])
        self.set_initial_scale()

    def set_middles(self, levels: Float[Tensor, "steps_and_one"]) -> Float[Tensor, "steps_less_one"]:
        """Computes σ in the middle of each step, and returns those of two calls."""
        middles = levels.log().lerp(levels.roll(1).log(), 0.5).exp()
        self._middles = middles[1:]
        self._ends = levels[1:]
        self._fresh = torch.zeros_like(levels[1:])
        return middles[1:-1]

    def input_sigmas(self) -> Float[Tensor, "calls"]:
        starts = self.sigmas[:-2:2]
        return torch.stack((starts, self._middles), dim=-1).flatten()[: len(self.timesteps)]

    def make_steps(self) -> None:
        super().make_steps()
        starts = self.sigmas[:-2:2]
        change = torch.stack((self._middles - starts, self._ends - starts), dim=-1).flatten()
        fresh = torch.stack((torch.zeros_like(starts), self._fresh), dim=-1).flatten()
        calls = len(self.timesteps)
        self.set_numbers(change[:calls], fresh[:calls])

    def step(self, x: Sample, prediction: Sample, step: int, generator: Generators = None) -> Sample:
        self._check_turn(x, prediction, step)
        slope = self._slope(x, prediction, step)
        numbers, start = self._numbers[step], self._state.sample
        if start is None:
            self._state = TwoCallState(step + 1, x)
            return x + slope * numbers.change
        x = self.with_noise(start + slope * numbers.change, prediction, numbers, generator)
        self._state = TwoCallState(step + 1)
        return x

    def with_noise(self, x: Sample, prediction: Sample, numbers: Numbers, generator: Generators) -> Sample:
        """The sample at the end of a step, with the noise that comes there."""
        return x


class KDPM2Ancestral(KDPM2):
    """The midpoint method in ln σ with fresh noise after every step of two calls."""

    def set_middles(self, levels: Float[Tensor, "steps_and_one"]) -> Float[Tensor, "steps_less_one"]:
        following = levels.roll(-1)
        following[-1] = 0.0
        up, down = ancestral(levels, following)
        down[-1] = 0.0
        middles = levels.log().lerp(down.log(), 0.5).exp()
        middles[-2:] = 0.0
        self._middles, self._ends, self._fresh = middles[:-1], down[:-1], up[:-1]
        return middles[:-2]

    def with_noise(self, x: Sample, prediction: Sample, numbers: Numbers, generator: Generators) -> Sample:
        return x + draw(prediction, generator) * numbers.fresh
