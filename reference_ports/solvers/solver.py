"""Solver: an integrator of the diffusion process, from noise to a sample, one call of the denoiser at a time.

A solver is a schedule and a state. The schedule never changes after construction: timesteps, and the numbers of every
step, computed once so that a step is nothing but operations on the sample. The state is what a multistep method
remembers of the steps before; it is a frozen dataclass that each step replaces, and can be read, kept and put back.

```py
solver = Euler(30)
x = solver.initial_noise_scale * noise
for step in solver.steps:
    prediction = denoiser(solver.scale_model_input(x, step), solver.timesteps[step])
    x = solver(x, prediction, step)
```

Differs from upstream: a step is named by its place in `timesteps`, not by a timestep that is searched for; options of
the sampling (η, churn) are parameters; a step that draws noise needs a generator; nothing global is touched.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

import refiners.fluxion.layers as fl
from reference_ports.blocks.randomness import Generators
from reference_ports.solvers.parameters import Parameters
from reference_ports.solvers.prediction import Sample
from refiners.errors import InputError

P = TypeVar("P", bound=Parameters)
N = TypeVar("N")


@dataclass(frozen=True)
class State:
    """What a solver remembers of the steps before. Nothing, unless its method needs it."""


@dataclass(frozen=True)
class OrderedState(State):
    """The state of a method whose steps must come one after the other."""

    next_step: int
    """The only step that may come now."""


class Solver(fl.Module, ABC, Generic[P]):
    """One run over a fixed schedule.

    Receives:
        num_inference_steps: steps of the run; None where `timesteps` or `sigmas` are given.
        params: the numbers of the method and of the training; the class's defaults unless given.
        first_step: where the run begins in `timesteps`; above 0 for image to image.
        timesteps: timesteps of one's own, from the noisiest on.
        sigmas: noise levels of one's own, from the noisiest on.

    Raises:
        InputError: the schedule cannot be made of these numbers.
    """

    order: ClassVar[int] = 1
    """Calls of the denoiser for each step of the schedule."""
    parameters_type: ClassVar[type[Parameters]]
    takes_timesteps: ClassVar[bool] = False
    takes_sigmas: ClassVar[bool] = False
    sigmas_end_in: ClassVar[int] = 0
    """How many of the sigmas that are given come after the last step."""

    timesteps: Shaped[Tensor, "calls"]
    """What the denoiser is given, one entry for each call of it."""
    initial_noise_scale: float
    """What normal noise is multiplied by to begin with."""

    def __init__(
        self,
        num_inference_steps: int | None = None,
        params: P | None = None,
        *,
        first_step: int = 0,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.params: P = self._checked_params(params)
        self.given_timesteps = None if timesteps is None else tuple(timesteps)
        self.given_sigmas = None if sigmas is None else tuple(sigmas)
        self.num_inference_steps = self._checked_count(num_inference_steps)
        self.initial_noise_scale = 1.0
        self.make_schedule()
        self.first_step = self._checked_first_step(first_step)
        self.make_steps()
        self._state: Any = self.initial_state()

    # What a method defines

    @abstractmethod
    def make_schedule(self) -> None:
        """Sets `timesteps`, the noise levels, and `initial_noise_scale` where it is not 1."""

    @abstractmethod
    def make_steps(self) -> None:
        """Computes the numbers of every step from `first_step` on."""

    @abstractmethod
    def step(self, x: Sample, prediction: Sample, step: int, generator: Generators = None) -> Sample:
        """The sample after one more step.

        Receives:
            x: the sample as it is, not scaled for the denoiser.
            prediction: what the denoiser made of `scale_model_input(x, step)` and `timesteps[step]`.
            step: an index into `timesteps`.
            generator: where noise is drawn from: one generator, or one for each item of the batch.

        Raises:
            InputError: the step is out of range or out of turn, a generator is missing, or shapes do not fit.
        """

    @abstractmethod
    def _mix(self, x: Sample, noise: Sample, index: Tensor) -> Sample:
        """The sample at the noise levels of some timesteps of the schedule."""

    def initial_state(self) -> State:
        """The state before the first step."""
        return State()

    # What all have

    def forward(self, x: Sample, prediction: Sample, step: int, generator: Generators = None) -> Sample:
        """`step`, so that a solver can be called."""
        return self.step(x, prediction, step, generator)

    @property
    def steps(self) -> range:
        """The steps of the run, as indices into `timesteps`."""
        return range(self.first_step, len(self.timesteps))

    def scale_model_input(self, x: Sample, step: int) -> Sample:
        """What the denoiser is given instead of the sample."""
        self._check_step(step)
        return x

    def add_noise(self, x: Sample, noise: Sample, step: int | Shaped[Tensor, "batch"]) -> Sample:
        """The sample as noisy as it is before a step, or before one step for each item of the batch."""
        if isinstance(step, int):
            self._check_step(step, first=0)
            return self._mix(x, noise, torch.tensor([step], device="cpu"))
        if step.dtype.is_floating_point or step.numel() == 0 or not 0 <= step.min() <= step.max() < len(self.timesteps):
            raise InputError(f"{step} are not all indices of the {len(self.timesteps)} timesteps.")
        return self._mix(x, noise, step.cpu())

    def rebuild(self, num_inference_steps: int | None = None, *, first_step: int | None = None, **changes: Any) -> Self:
        """A fresh solver, with nothing remembered.

        Receives:
            num_inference_steps: steps of the new run; as before unless given.
            first_step: where it begins; as before unless given, and 0 on a new schedule.
            changes: `timesteps` or `sigmas` of one's own, and parameters, by name.
        """
        schedule: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "timesteps": changes.pop("timesteps", None),
            "sigmas": changes.pop("sigmas", None),
        }
        same = all(value is None for value in schedule.values())
        if same:
            own = (self.given_timesteps, self.given_sigmas)
            count = self.num_inference_steps if own == (None, None) else None
            schedule = {"num_inference_steps": count, "timesteps": own[0], "sigmas": own[1]}
        known = {field.name for field in fields(self.params)}
        if unknown := sorted(changes.keys() - known):
            raise InputError(
                f"{type(self).__name__} has no {', '.join(unknown)}. Its parameters are {', '.join(sorted(known))}."
            )
        first_step = (self.first_step if same else 0) if first_step is None else first_step
        return type(self)(params=replace(self.params, **changes), first_step=first_step, **schedule)

    @property
    def state(self) -> Any:
        """What the solver remembers: a frozen dataclass, which may be kept and put back."""
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        expected = type(self.initial_state())
        if type(state) is not expected:
            raise InputError(
                f"The state of {type(self).__name__} is a {expected.__name__}, got {type(state).__name__}: "
                "put back what its `state` was."
            )
        if isinstance(state, OrderedState) and not self.first_step <= state.next_step <= len(self.timesteps):
            raise InputError(
                f"The state waits for step {state.next_step}, which is none of {self.steps}: it is another schedule's."
            )
        self._state = state

    def _check_step(self, step: int, *, first: int | None = None) -> None:
        if not (self.first_step if first is None else first) <= step < len(self.timesteps):
            raise InputError(
                f"Step {step} is out of range: {type(self).__name__} has steps {self.first_step} to "
                f"{len(self.timesteps) - 1} here. Take them from `solver.steps`."
            )

    def _check_turn(self, x: Sample, prediction: Sample, step: int) -> None:
        """For methods whose steps must come one after the other."""
        self._check(x, prediction, step)
        if step != self._state.next_step:
            raise InputError(
                f"Step {step} is out of turn: {type(self).__name__} stands before step {self._state.next_step}. "
                "Go on there, put back an earlier `state`, or begin anew with rebuild()."
            )

    def _check(self, x: Sample, prediction: Sample, step: int) -> None:
        if not self.first_step <= step < len(self.timesteps):
            self._check_step(step)
        if x.shape != prediction.shape:
            raise InputError(f"The prediction has shape {tuple(prediction.shape)}, the sample {tuple(x.shape)}.")

    def _checked_params(self, params: P | None) -> P:
        if params is None:
            return self.parameters_type()  # pyright: ignore[reportReturnType]: it is the class's own P
        if not isinstance(params, self.parameters_type):
            raise InputError(
                f"{type(self).__name__} takes {self.parameters_type.__name__}, got {type(params).__name__}."
            )
        return params

    def _checked_count(self, count: int | None) -> int:
        name = type(self).__name__
        given = {"num_inference_steps": count, "timesteps": self.given_timesteps, "sigmas": self.given_sigmas}
        chosen = [key for key, value in given.items() if value is not None]
        if len(chosen) != 1:
            raise InputError(f"{name} takes one of {', '.join(given)}, got {' and '.join(chosen) or 'none'}.")
        if not {"timesteps": self.takes_timesteps, "sigmas": self.takes_sigmas}.get(chosen[0], True):
            raise InputError(f"{name} makes its own {chosen[0]}: give num_inference_steps.")
        own = self.given_timesteps if self.given_sigmas is None else self.given_sigmas
        if own is not None:
            self._check_own(chosen[0], own)
            return len(own) - (self.sigmas_end_in if chosen[0] == "sigmas" else 0)
        if type(count) is not int or not 0 < count <= self.params.num_train_timesteps:
            raise InputError(
                f"num_inference_steps is {count!r}: it must be a whole number from 1 to "
                f"{self.params.num_train_timesteps}, the timesteps of the training."
            )
        return count

    def _check_own(self, name: str, own: tuple[float, ...]) -> None:
        falling = all(one > other for one, other in pairwise(own))
        limit = self.largest_timestep if name == "timesteps" else float("inf")
        if (
            len(own) <= (self.sigmas_end_in if name == "sigmas" else 0)
            or not falling
            or not 0 <= own[-1] <= own[0] <= limit
        ):
            raise InputError(
                f"The {name} of {type(self).__name__} must fall, from at most {limit} to 0 or above: {own}."
            )

    @property
    def largest_timestep(self) -> int:
        """The noisiest timestep of the training."""
        return self.params.num_train_timesteps - 1

    def _checked_first_step(self, first_step: int) -> int:
        if type(first_step) is not int or first_step % self.order or not 0 <= first_step < len(self.timesteps):
            each = "" if self.order == 1 else f", a multiple of {self.order}"
            raise InputError(
                f"first_step is {first_step!r}: it must be an index of the {len(self.timesteps)} timesteps{each}."
            )
        return first_step


def column(values: Float[Tensor, "batch"], like: Sample) -> Float[Tensor, "batch *ones"]:
    """One number for each item of the batch, to be multiplied with it."""
    return values.reshape(-1, *(1 for _ in like.shape[1:])).to(like.device)


def rows(kind: Callable[..., N], *columns: Float[Tensor, "steps"]) -> list[N]:
    """The numbers of each step, from one column for each kind of number."""
    return [kind(*numbers) for numbers in zip(*(column.unbind() for column in columns), strict=True)]
