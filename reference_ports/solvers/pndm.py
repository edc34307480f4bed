"""PNDM: linear multistep methods along the path of DDIM, with or without Runge-Kutta steps to begin with.

Follows arXiv:2202.09778, equations 9 (transfer), 12 (PLMS) and 13 (PRK), and diffusers 0.42.1 (`PNDMScheduler`).

Without Runge-Kutta steps (`skip_prk_steps`, as Stable Diffusion has it) the second timestep comes twice: its first call
corrects the step before. With them, each of the first three steps takes four calls of the denoiser.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from reference_ports.blocks.randomness import Generators
from reference_ports.solvers.alphas import AlphaParameters, AlphaSolver
from reference_ports.solvers.prediction import Number, Sample, noise_of
from reference_ports.solvers.solver import OrderedState, rows
from refiners.errors import InputError

_CALLS = 4
"""Calls of the denoiser in a Runge-Kutta step."""


@dataclass(frozen=True, kw_only=True)
class PNDMParameters(AlphaParameters):
    """The parameters of `PNDM`."""

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    """Whether the last step leads to ᾱ = 1, or to that of timestep 0."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"


@dataclass(frozen=True)
class PNDMState(OrderedState):
    """What `PNDM` remembers."""

    predictions: tuple[Sample, ...] = ()
    """The last predictions, at most four, the latest last."""
    sample: Sample | None = None
    """The sample that the calls of one step begin from."""
    combined: Sample | int = 0
    """What the calls of a Runge-Kutta step add up to."""


class Numbers(NamedTuple):
    """The numbers of one transfer (equation 9)."""

    alpha: Number
    sigma: Number
    """√ᾱ and √(1 - ᾱ) at the timestep that the transfer begins from."""
    of_x: Number
    of_noise: Number
    divisor: Number


class PNDM(AlphaSolver[PNDMParameters]):
    """Pseudo numerical methods for diffusion models.

    Example:
        >>> PNDM(4, PNDMParameters(skip_prk_steps=True, steps_offset=1)).timesteps
        tensor([751, 501, 501, 251,   1])
    """

    parameters_type = PNDMParameters

    def spaced(self) -> list[int]:
        falling = np.array(super().spaced())
        if self.params.skip_prk_steps:
            self._runge_kutta: list[int] = []
            return [*falling[:1], *falling[1:2], *falling[1:]]
        if len(falling) < _CALLS:
            raise InputError(
                f"Runge-Kutta steps need {_CALLS} inference steps or more, got {len(falling)}: "
                "take more, or skip_prk_steps=True."
            )
        own = self.params
        halves = np.tile([0, own.num_train_timesteps // self.num_inference_steps // 2], _CALLS)
        rising = falling[:_CALLS][::-1].repeat(2) + halves
        self._runge_kutta = rising[:-1].repeat(2)[1:-1][::-1].tolist()
        return [*self._runge_kutta, *falling[3:]]

    def make_steps(self) -> None:
        own = self.params
        pairs = torch.tensor([self._transfer(step) for step in self.steps], device="cpu")
        alpha = self.alphas_cumprod[pairs[:, 0]]
        next_alpha = self._alphas_at(pairs[:, 1], 1.0 if own.set_alpha_to_one else self.alphas_cumprod[0])
        beta, next_beta = 1 - alpha, 1 - next_alpha
        divisor = alpha * next_beta**0.5 + (alpha * beta * next_alpha) ** 0.5
        of_x = (next_alpha / alpha) ** 0.5
        self._is_first = [step - self.first_step < len(self._runge_kutta) for step in self.steps]
        self._numbers = rows(Numbers, alpha**0.5, beta**0.5, of_x, next_alpha - alpha, divisor)

    def _transfer(self, step: int) -> tuple[int, int]:
        """The timesteps that a step leads from and to."""
        own, call, timestep = self.params, step - self.first_step, int(self.timesteps[step])
        ratio = own.num_train_timesteps // self.num_inference_steps
        if call < len(self._runge_kutta):
            return self._runge_kutta[call // _CALLS * _CALLS], timestep - (0 if call % 2 else ratio // 2)
        return (timestep + ratio, timestep) if call == 1 else (timestep, timestep - ratio)

    def initial_state(self) -> PNDMState:
        return PNDMState(self.first_step)

    def step(self, x: Sample, prediction: Sample, step: int, generator: Generators = None) -> Sample:
        self._check_turn(x, prediction, step)
        call = step - self.first_step
        follow = self._runge_kutta_call if self._is_first[call] else self._multistep_call
        state, x, noise = follow(call, x, prediction)
        numbers = self._numbers[call]
        noise = noise_of(self.params.prediction_type, x, noise, numbers.alpha, numbers.sigma)
        x = numbers.of_x * x - numbers.of_noise * noise / numbers.divisor
        self._state = state
        return x

    def _runge_kutta_call(self, call: int, x: Sample, prediction: Sample) -> tuple[PNDMState, Sample, Sample]:
        """Equation 13: a call at the start, two in the middle, one at the end."""
        state: PNDMState = self._state
        following, turn = state.next_step + 1, call % _CALLS
        combined = state.combined + (1 / 3 if turn in (1, 2) else 1 / 6) * prediction
        if turn == 0:
            return PNDMState(following, (*state.predictions, prediction), x, combined), x, prediction
        start = x if state.sample is None else state.sample
        if turn < _CALLS - 1:
            return PNDMState(following, state.predictions, state.sample, combined), start, prediction
        return PNDMState(following, state.predictions, state.sample), start, combined

    def _multistep_call(self, call: int, x: Sample, prediction: Sample) -> tuple[PNDMState, Sample, Sample]:
        """Equation 12, and the orders below it until four predictions are there."""
        state: PNDMState = self._state
        following = state.next_step + 1
        if call == 1:
            assert state.sample is not None
            return PNDMState(following, state.predictions), state.sample, (prediction + state.predictions[-1]) / 2
        last = (*state.predictions[-3:], prediction)
        kept = PNDMState(following, last, x if call == 0 else None)
        if len(last) == 1:
            return kept, x, prediction
        if len(last) == 2:
            return kept, x, (3 * last[-1] - last[-2]) / 2
        if len(last) == 3:
            return kept, x, (23 * last[-1] - 16 * last[-2] + 5 * last[-3]) / 12
        return kept, x, (1 / 24) * (55 * last[-1] - 59 * last[-2] + 37 * last[-3] - 9 * last[-4])
