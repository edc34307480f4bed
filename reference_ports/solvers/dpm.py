"""DPM-Solver, multistep and single step: exact in the linear part of the equation, of order up to 3 in the rest.

Follows arXiv:2206.00927, arXiv:2211.01095 and diffusers 0.42.1 (`DPMSolverMultistepScheduler`,
`DPMSolverSinglestepScheduler`). The multistep form uses the predictions of the steps before; the single step form
starts groups of one, two and three calls anew from the sample that the group began with.

Differs from upstream: `mu` is a parameter. Refused are `sde-dpmsolver` of order 3 and thresholding in the single step
form of `dpmsolver`, which upstream takes and then fails at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch

from reference_ports.blocks.randomness import Generators
from reference_ports.solvers.dpm_numbers import Algorithm, SolverType, Terms, advanced, terms_of
from reference_ports.solvers.lambdas import LambdaParameters, LambdaSolver
from reference_ports.solvers.noise import alphas_cumprod_of
from reference_ports.solvers.parameters import TimestepSpacing, ZeroTerminalSNRParameters
from reference_ports.solvers.prediction import Number, Sample, draw
from reference_ports.solvers.solver import OrderedState
from reference_ports.solvers.spacing import Grid, lu, spaced_timesteps, timesteps_of
from refiners.errors import InputError

_SHORT = 15
"""Below that many steps `lower_order_final` has an effect."""


@dataclass(frozen=True, kw_only=True)
class DPMParameters(LambdaParameters):
    """What both forms share."""

    foreign_values: ClassVar[Mapping[str, Mapping[str, str | None]]] = {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
        "variance_type": dict.fromkeys(("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"), None),
    }

    algorithm_type: Algorithm = "dpmsolver++"
    solver_type: SolverType = "midpoint"
    lambda_min_clipped: float = -float("inf")
    """The schedule begins where λ is that large; for cosine betas, whose noisiest timesteps have next to no signal."""
    variance_type: Literal["learned", "learned_range"] | None = None
    """Given, the denoiser predicts a variance behind the three channels of its prediction, which is left out."""

    @property
    def predicts_noise(self) -> bool:
        return not self.algorithm_type.endswith("++")

    @property
    def is_stochastic(self) -> bool:
        """Whether every step draws noise."""
        return self.algorithm_type.startswith("sde")

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.solver_order > 3:
            problems.append(f"solver_order is {self.solver_order}, it must be 1, 2 or 3")
        if self.predicts_noise and self.final_sigmas_type == "zero":
            problems.append(f"{self.algorithm_type} needs final_sigmas_type='sigma_min'")
        return problems


@dataclass(frozen=True, kw_only=True)
class DPMMultistepParameters(DPMParameters, ZeroTerminalSNRParameters):
    """The parameters of `DPMMultistep`."""

    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    timestep_spacing: TimestepSpacing = "linspace"
    steps_offset: int = 0

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.algorithm_type == "sde-dpmsolver" and self.solver_order == 3:
            problems.append("sde-dpmsolver has orders 1 and 2")
        return problems


@dataclass(frozen=True, kw_only=True)
class DPMSingleStepParameters(DPMParameters):
    """The parameters of `DPMSingleStep`."""

    algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver++"] = "dpmsolver++"  # pyright: ignore[reportIncompatibleVariableOverride]: fewer than the other form has
    lower_order_final: bool = False

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.algorithm_type == "dpmsolver" and self.thresholding:
            problems.append("thresholding needs algorithm_type='dpmsolver++'")
        return problems


@dataclass(frozen=True)
class DPMState(OrderedState):
    """What DPM-Solver remembers."""

    outputs: tuple[Sample, ...] = ()
    """The clean samples, or noises, of the last steps, the latest last."""
    sample: Sample | None = None
    """The sample that a group of single steps began with."""


class Plan(NamedTuple):
    """The numbers of one step."""

    terms: Terms
    ratios: tuple[Number, ...] = ()
    """What differences of predictions are multiplied by; none in a step of first order."""


D = TypeVar("D", bound=DPMParameters)


class DPMSolver(LambdaSolver[D]):
    """What both forms share."""

    takes_timesteps = True

    def spaced(self, training: Grid) -> Grid:
        own = self.params
        alphas_cumprod = alphas_cumprod_of(own, never_zero=True)
        lambdas = torch.log(torch.sqrt(alphas_cumprod)) - torch.log(torch.sqrt(1 - alphas_cumprod))
        clipped = int(torch.searchsorted(torch.flip(lambdas, [0]), own.lambda_min_clipped))
        return self.spaced_below(own.num_train_timesteps - clipped).round()

    def spaced_below(self, last: int) -> Grid:
        """Timesteps below one that may be less than those of the training."""
        return spaced_timesteps(
            "linspace", self.params.num_train_timesteps, self.num_inference_steps, last=last, extra=1
        )

    def flow_sigmas(self, count: int) -> Grid:
        own = self.params
        shift = own.flow_shift if own.mu is None else np.exp(own.mu)
        sigmas = 1.0 - np.linspace(1, 1 / own.num_train_timesteps, count + 1)
        return np.flip(shift * sigmas / (1 + (shift - 1) * sigmas))[:-1]

    def make_steps(self) -> None:
        self._levels, self._latest = self.make_levels(), slice(-self.params.solver_order, None)
        self._plans = [self.plan(step, order) for step, order in zip(self.steps, self.orders(), strict=True)]

    def orders(self) -> list[int]:
        """The order of each step of the run."""
        raise NotImplementedError

    def plan(self, step: int, order: int) -> Plan:
        """The numbers of a step."""
        raise NotImplementedError

    def _terms(self, step: int, order: int, start: int) -> Terms:
        own, levels = self.params, self._levels
        return terms_of(own.algorithm_type, own.solver_type, order, levels[start], levels[step + 1])

    def _lambdas(self, *places: int) -> list[Number]:
        return [self._levels[place].lambda_ for place in places]

    def initial_state(self) -> DPMState:
        return DPMState(self.first_step)

    def _converted(self, x: Sample, prediction: Sample, step: int) -> Sample:
        own = self.params
        if own.variance_type is not None and own.prediction_type == "epsilon":
            prediction = prediction[:, :3]
        self._check_turn(x, prediction, step)
        return self.converted(x, prediction, step)


class DPMMultistep(DPMSolver[DPMMultistepParameters]):
    """The multistep form: one call of the denoiser a step, whatever the order.

    Example:
        >>> DPMMultistep(5).timesteps
        tensor([999, 799, 599, 400, 200])
    """

    parameters_type = DPMMultistepParameters

    def spaced_below(self, last: int) -> Grid:
        own, count = self.params, self.num_inference_steps
        extra = 0 if own.timestep_spacing == "trailing" else 1
        return spaced_timesteps(
            own.timestep_spacing, own.num_train_timesteps, count, offset=own.steps_offset, last=last, extra=extra
        )

    def respaced(self, training: Grid) -> tuple[Grid, Grid] | None:
        own = self.params
        logarithms = np.log(training)
        if own.use_lu_lambdas and not own.use_karras_sigmas:
            sigmas = np.exp(lu(logarithms[-1].item(), logarithms[0].item(), self.num_inference_steps))
            timesteps = timesteps_of(sigmas, logarithms)
            return sigmas, timesteps if own.beta_schedule == "squaredcos_cap_v2" else timesteps.round()
        spaced = super().respaced(training)
        if spaced is None or own.beta_schedule != "squaredcos_cap_v2":
            return spaced
        return spaced[0], timesteps_of(spaced[0], logarithms)  # not rounded

    def orders(self) -> list[int]:
        own, last = self.params, len(self.timesteps) - 1
        short = own.lower_order_final and len(self.timesteps) < _SHORT
        first_at_end = own.euler_at_final or short or own.final_sigmas_type == "zero"
        limits = {last: 1 if first_at_end else 3, last - 1: 2 if short else 3}
        return [min(own.solver_order, step - self.first_step + 1, limits.get(step, 3)) for step in self.steps]

    def plan(self, step: int, order: int) -> Plan:
        terms = self._terms(step, order, step)
        if order == 1:
            return Plan(terms)
        end, start, *before = self._lambdas(*range(step + 1, step - order, -1))
        h, r0 = end - start, (start - before[0]) / (end - start)
        if order == 3 and h == 0:
            raise InputError(
                f"Step {step} leads nowhere, for σ is the same before and after it, and upstream computes NaN in third "
                "order: set lower_order_final=True, final_sigmas_type='zero', or solver_order=2."
            )
        if order == 2:
            return Plan(terms, (1.0 / r0,))
        r1 = (before[0] - before[1]) / h
        return Plan(terms, (1.0 / r0, 1.0 / r1, r0 / (r0 + r1), 1.0 / (r0 + r1)))

    def step(self, x: Sample, prediction: Sample, step: int, generator: Generators = None) -> Sample:
        output = self._converted(x, prediction, step)
        noise = draw(output, generator, torch.float32) if self.params.is_stochastic else None
        terms, ratios = self._plans[step - self.first_step]
        outputs = (*self._state.outputs, output)[self._latest]
        x = advanced(terms, x.to(torch.float32), *self._differences(ratios, outputs), noise=noise)
        self._state = DPMState(step + 1, outputs)
        return x.to(output.dtype)

    def _differences(self, ratios: Sequence[Number], outputs: tuple[Sample, ...]) -> tuple[Sample, ...]:
        """D₀, D₁ and D₂, as many as the order of the step."""
        if not ratios:
            return outputs[-1:]
        first = ratios[0] * (outputs[-1] - outputs[-2])
        if len(ratios) == 1:
            return outputs[-1], first
        _, inverse, share, bend = ratios
        second = inverse * (outputs[-2] - outputs[-3])
        # Twice the same difference: gradients are summed up in upstream's order.
        return outputs[-1], first + share * (first - second), bend * (first - second)


class DPMSingleStep(DPMSolver[DPMSingleStepParameters]):
    """The single step form: groups of one, two and three calls, each from the sample that the group began with.

    It computes in the dtype of the sample.

    Example:
        >>> DPMSingleStep(5).timesteps
        tensor([999, 799, 599, 400, 200])
    """

    parameters_type = DPMSingleStepParameters

    def orders(self) -> list[int]:
        own, count = self.params, self.num_inference_steps
        order, to_zero = own.solver_order, own.final_sigmas_type == "zero"
        groups = [1 + step % order for step in range(count)]
        if to_zero or (own.lower_order_final and count % order == 0):
            groups[-1] = 1
        return [min(groups[step], step - self.first_step + 1) for step in self.steps]

    def plan(self, step: int, order: int) -> Plan:
        terms = self._terms(step, order, step - order + 1)
        if order == 1:
            return Plan(terms)
        end, latest, *before = self._lambdas(*range(step + 1, step - order, -1))
        h = end - before[-1]
        r0 = (latest - before[-1]) / h
        if order == 2:
            return Plan(terms, (1.0 / r0,))
        r1 = (before[0] - before[1]) / h
        return Plan(terms, (1.0 / r0, 1.0 / r1, r0, r1, r0 - r1))

    def step(self, x: Sample, prediction: Sample, step: int, generator: Generators = None) -> Sample:
        output = self._converted(x, prediction, step)
        noise = draw(output, generator) if self.params.is_stochastic else None
        terms, ratios = self._plans[step - self.first_step]
        outputs = (*self._state.outputs, output)[self._latest]
        start = self._state.sample if ratios else x
        x = advanced(terms, start, *self._differences(ratios, outputs), noise=noise)
        self._state = DPMState(step + 1, outputs, start)
        return x

    def _differences(self, ratios: Sequence[Number], outputs: tuple[Sample, ...]) -> tuple[Sample, ...]:
        """D₀, D₁ and D₂, as many as the order of the step takes."""
        if not ratios:
            return outputs[-1:]
        if len(ratios) == 1:
            return outputs[-2], ratios[0] * (outputs[-1] - outputs[-2])
        whole, half, r0, r1, gap = ratios
        first, last = half * (outputs[-2] - outputs[-3]), whole * (outputs[-1] - outputs[-3])
        if self.params.solver_type == "midpoint":
            return outputs[-3], last
        return outputs[-3], (r0 * first - r1 * last) / gap, 2.0 * (last - first) / gap
