"""UniPC: a multistep method whose every step is corrected once the next prediction is there, at no further call.

Follows arXiv:2302.04867 and diffusers 0.42.1 (`UniPCMultistepScheduler`). It computes in the dtype of the sample.

Differs from upstream: `mu` is a parameter. `solver_p`, another solver in the place of the predictor, is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reference_ports.blocks.randomness import Generators
from reference_ports.solvers.lambdas import LambdaParameters, LambdaSolver
from reference_ports.solvers.noise import FLOAT32
from reference_ports.solvers.parameters import TimestepSpacing, ZeroTerminalSNRParameters
from reference_ports.solvers.prediction import Number, Sample
from reference_ports.solvers.solver import OrderedState
from reference_ports.solvers.spacing import Grid, shifted_in_time, spaced_timesteps, stretched
from refiners.errors import InputError


@dataclass(frozen=True, kw_only=True)
class UniPCParameters(LambdaParameters, ZeroTerminalSNRParameters):
    """The parameters of `UniPC`."""

    foreign_values: ClassVar[Mapping[str, Mapping[str, str | None]]] = {
        "solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")
    }

    predict_x0: bool = True
    """Whether the method integrates the clean sample, or else the noise."""
    solver_type: Literal["bh1", "bh2"] = "bh2"
    """B(h) of the paper: h, or eʰ - 1."""
    disable_corrector: tuple[int, ...] = ()
    """Steps that are not corrected."""
    timestep_spacing: TimestepSpacing = "linspace"
    steps_offset: int = 0
    shift_terminal: float | None = None
    """The last σ of a straight path, to which the others are stretched."""

    @property
    def predicts_noise(self) -> bool:
        return not self.predict_x0

    @property
    def has_bounds(self) -> bool:
        return self.thresholding and self.predict_x0  # upstream cuts no sample that it does not integrate

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.shift_terminal is not None and not self.use_flow_sigmas:
            problems.append("shift_terminal needs use_flow_sigmas")
        return problems


@dataclass(frozen=True)
class UniPCState(OrderedState):
    """What `UniPC` remembers."""

    outputs: tuple[Sample, ...] = ()
    """The clean samples, or noises, of the last steps, the latest last."""
    sample: Sample | None = None
    """The sample that the last step began with, corrected."""


class Numbers(NamedTuple):
    """The numbers of a prediction or of a correction."""

    of_x: Number
    of_output: Number
    of_rest: Number
    ratios: tuple[Number, ...]
    """What differences of outputs are divided by."""
    weights: Float[Tensor, "differences"]
    """What they are multiplied by then."""
    of_new: Number | None
    """What the difference of a new output is multiplied by, in a correction."""


class UniPC(LambdaSolver[UniPCParameters]):
    """A unified predictor and corrector.

    Example:
        >>> UniPC(5).timesteps
        tensor([999, 799, 599, 400, 200])
    """

    parameters_type = UniPCParameters
    takes_sigmas = True

    def spaced(self, training: Grid) -> Grid:
        own, count = self.params, self.num_inference_steps
        if self.given_sigmas is not None:
            raise InputError("sigmas of one's own need use_flow_sigmas=True.")
        extra = 0 if own.timestep_spacing == "trailing" else 1
        return spaced_timesteps(
            own.timestep_spacing, own.num_train_timesteps, count, offset=own.steps_offset, extra=extra
        ).round()

    def respaced(self, training: Grid) -> tuple[Grid, Grid] | None:
        spaced = super().respaced(training)
        if spaced is None or not (self.params.use_flow_sigmas and self.params.use_karras_sigmas):
            return spaced
        sigmas = spaced[0] / (spaced[0] + 1)
        return sigmas, sigmas * self.params.num_train_timesteps

    def flow_sigmas(self, count: int) -> Grid:
        own = self.params
        sigmas = np.linspace(1, 1 / own.num_train_timesteps, count + 1)[:-1]
        if self.given_sigmas is not None:
            sigmas = np.array(self.given_sigmas, dtype=np.float64)
        if not own.use_dynamic_shifting:
            sigmas = own.flow_shift * sigmas / (1 + (own.flow_shift - 1) * sigmas)
        elif own.mu is None:
            raise InputError("use_dynamic_shifting needs mu, the shift for the size of the sample.")
        else:
            sigmas = shifted_in_time(own.time_shift_type, own.mu, sigmas)
        if own.shift_terminal:
            sigmas = stretched(sigmas, own.shift_terminal)
        if abs(sigmas[0] - 1) < _NEXT_TO_NOTHING:
            sigmas = np.concatenate([sigmas[:1] - _NEXT_TO_NOTHING, sigmas[1:]])  # α would be 0
        return sigmas

    def last_sigma(self, sigmas: Grid, training: Grid) -> float:
        own = self.params
        follows = not (
            own.use_karras_sigmas or own.use_exponential_sigmas or own.use_beta_sigmas or own.use_flow_sigmas
        )
        return (training[0] if follows else sigmas[-1]).item()

    def make_steps(self) -> None:
        own, count = self.params, len(self.timesteps)
        self._levels, self._latest = self.make_levels(), slice(-own.solver_order, None)
        lasts = [count - step if own.lower_order_final else own.solver_order for step in self.steps]
        orders = [min(own.solver_order, last, done + 1) for done, last in enumerate(lasts)]
        self._predictions = [self._numbers(step, order) for step, order in zip(self.steps, orders, strict=True)]
        self._corrections = [
            None if step - 1 in own.disable_corrector else self._numbers(step - 1, order, correct=True)
            for step, order in zip(self.steps[1:], orders, strict=False)
        ]

    def _numbers(self, step: int, order: int, *, correct: bool = False) -> Numbers:
        """The numbers of a step of some order: of its prediction, or of its correction by the output at its end."""
        own = self.params
        end, start = self._levels[step + 1], self._levels[step]
        h = end.lambda_ - start.lambda_
        before = [self._levels[step - back].lambda_ for back in range(1, order)]
        ratios = tuple((lambda_ - start.lambda_) / h for lambda_ in before)
        signed = h if own.predicts_noise else -h
        phi = torch.expm1(signed)
        base = signed if own.solver_type == "bh1" else torch.expm1(signed)
        if own.predicts_noise:
            of_x, size = end.alpha / start.alpha, end.sigma
        else:
            of_x, size = end.sigma / start.sigma, end.alpha
        weights = _weights(ratios, signed, phi, base, order if correct else order - 1)
        weights, of_new = (weights[:-1], weights[-1]) if correct else (weights, None)
        return Numbers(of_x, size * phi, size * base, ratios, weights, of_new)

    def initial_state(self) -> UniPCState:
        return UniPCState(self.first_step)

    def step(self, x: Sample, prediction: Sample, step: int, generator: Generators = None) -> Sample:
        self._check_turn(x, prediction, step)
        state: UniPCState = self._state
        call = step - self.first_step
        output = self.converted(x, prediction, step)
        correction = self._corrections[call - 1] if call > 0 else None
        if correction is not None:
            assert state.sample is not None
            x = self._advanced(correction, state.sample, state.outputs, output)
        outputs = (*state.outputs, output)[self._latest]
        advanced = self._advanced(self._predictions[call], x, outputs)
        self._state = UniPCState(step + 1, outputs, x)
        return advanced

    def _advanced(
        self, numbers: Numbers, x: Sample, outputs: Sequence[Sample], corrector: Sample | None = None
    ) -> Sample:
        """The sample at the end of a step, from the outputs up to its start, and that at its end if it is there."""
        latest = outputs[-1]
        differences = [
            (earlier - latest) / ratio for earlier, ratio in zip(outputs[-2::-1], numbers.ratios, strict=False)
        ]
        stacked = torch.stack(differences, dim=1) if differences else None  # batch differences channels *size
        linear = numbers.of_x * x - numbers.of_output * latest
        rest: Sample | int = 0
        if stacked is not None:
            rest = torch.einsum("k,bkc...->bc...", numbers.weights.to(x.device, x.dtype), stacked)
        if corrector is not None and numbers.of_new is not None:
            rest = rest + numbers.of_new.to(x.dtype) * (corrector - latest)
        return (linear - numbers.of_rest * rest).to(x.dtype)


_NEXT_TO_NOTHING = 1e-6


def _weights(ratios: Sequence[Number], h: Number, phi: Number, base: Number, count: int) -> Float[Tensor, "count"]:
    """The weights of some differences: they solve R ρ = b of the paper's theorem 3.1."""
    if count < 2:
        return torch.full((count,), 0.5, **FLOAT32)
    points = torch.stack([*ratios, torch.ones((), **FLOAT32)])
    phi, factorial = phi / h - 1, 1
    right: list[Number] = []
    for power in range(1, len(points) + 1):
        right.append(phi * factorial / base)
        factorial *= power + 1
        phi = phi / h - 1 / factorial
    left = torch.stack([torch.pow(points, power) for power in range(len(points))])
    try:
        return torch.linalg.solve(left[:count, :count], torch.stack(right)[:count])  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]: torch does not type it
    except RuntimeError as error:
        raise InputError(
            "The weights of a step cannot be computed, since it leads to no noise at full order: set "
            "lower_order_final=True, or final_sigmas_type='sigma_min'."
        ) from error
