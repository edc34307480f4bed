"""Schedulers as modules: whole sampling loops over a fixed denoiser, so that ordinary cases can compare them.

A scheduler of diffusers is no `nn.Module`, and neither side of a loop has weights. So both sides get a denoiser: one
weight a channel and a formula that depends on the sample and on the timestep, neither of them linearly. Every input of
the denoiser and every sample is an output of the loop; the last one is drawn from the generator behind the loop, and
differs where one side drew more, less or something else.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from reference_ports import solvers
from refiners.parity import Case
from refiners.parity.torch_state import default_dtype

Config = Mapping[str, Any]
Outputs = Mapping[str, Tensor]
Seeds = int | Sequence[int]

CHANNELS = 3
UPSTREAM_SETTINGS = frozenset({"mu", "strength"})
"""Parameters of a solver that upstream takes in `set_timesteps`, not in `step`."""


def no_options() -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What is run on both sides."""

    scheduler: str
    """The class of diffusers."""
    config: Config
    """The attributes of its scheduler_config.json."""
    steps: int | None = 5
    schedule: Config = field(default_factory=no_options)
    """Timesteps or sigmas of one's own, in the place of `steps`."""
    options: Config = field(default_factory=no_options)
    """Options of the sampling: parameters of the solver, arguments upstream."""
    first: int = 0
    """The step to begin with, from a sample that noise was added to."""
    stochastic: bool = False
    """Whether steps take a generator."""
    prediction: torch.dtype | None = None
    """The dtype of the prediction where it is not the sample's."""
    learned: bool = False
    """Whether the denoiser predicts a variance as well."""


class Denoiser(nn.Module):
    """Not trained: a formula with one weight a channel."""

    def __init__(self, learned: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.learned, self.dtype = learned, dtype
        self.weight = nn.Parameter(torch.randn(CHANNELS, 1, 1))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = (timestep / (timestep + 100)).to(x.dtype).reshape(-1, *(1 for _ in x.shape[1:]))
        prediction = (torch.tanh(self.weight * x) * (1 - time) + x * time).to(self.dtype or x.dtype)
        return torch.cat([prediction, torch.sigmoid(prediction + time)], dim=1) if self.learned else prediction


def generator_of(seeds: Seeds) -> torch.Generator | list[torch.Generator]:
    """One generator, or one for each item of the batch."""
    if isinstance(seeds, int):
        return torch.Generator().manual_seed(seeds)
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def last_draw(generator: torch.Generator | list[torch.Generator]) -> Tensor:
    """What the generator draws next."""
    last = generator if isinstance(generator, torch.Generator) else generator[-1]
    return torch.randn(3, generator=last)


class UpstreamLoop(nn.Module):
    """A scheduler of diffusers with the denoiser."""

    upstream_package = "diffusers"

    def __init__(self, loop: Loop, scheduler: Any) -> None:
        super().__init__()
        self.loop, self.scheduler = loop, scheduler
        self.denoiser = Denoiser(loop.learned, loop.prediction)

    def forward(self, noise: Tensor, seeds: Seeds, clean: Tensor | None = None) -> Outputs:
        scheduler, generator = copy.deepcopy(self.scheduler), generator_of(seeds)
        options = {name: value for name, value in self.loop.options.items() if name not in UPSTREAM_SETTINGS}
        if self.loop.stochastic:
            options["generator"] = generator
        timesteps = scheduler.timesteps
        if clean is None:
            x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        else:
            add_noise = getattr(scheduler, "add_noise", None)
            start = timesteps[self.loop.first :][:1].repeat(len(noise))
            x = scheduler.scale_noise(clean, start, noise) if add_noise is None else add_noise(clean, noise, start)
        outputs = {"timesteps": timesteps, "start": x}
        for step in range(self.loop.first, len(timesteps)):
            timestep = timesteps[step]
            scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(self.denoiser(scaled, timestep), timestep, x, **options).prev_sample
            outputs |= {f"input {step}": scaled, f"sample {step}": x}
        return {**outputs, "draw": last_draw(generator)}


class Start(nn.Module):
    """What a loop begins with: a module, so that faults are planted in what a solver does before its steps."""

    def __init__(self, solver: solvers.Solver[Any]) -> None:
        super().__init__()
        self.solvers = (solver,)  # not a child: it is one of the loop

    def forward(self, noise: Tensor, clean: Tensor | None) -> Tensor:
        (solver,) = self.solvers
        return (
            noise * solver.initial_noise_scale if clean is None else solver.add_noise(clean, noise, solver.first_step)
        )


class PortLoop(nn.Module):
    """A solver with the denoiser."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop
        self.denoiser = Denoiser(loop.learned, loop.prediction)
        self.solver = solver_of(loop)
        self.start = Start(self.solver)

    def forward(self, noise: Tensor, seeds: Seeds, clean: Tensor | None = None) -> Outputs:
        solver, generator = self.solver, generator_of(seeds)
        solver.state = solver.initial_state()
        draws = generator if self.loop.stochastic else None
        x = self.start(noise, clean)
        outputs = {"timesteps": solver.timesteps, "start": x}
        for step in solver.steps:
            scaled = solver.scale_model_input(x, step)
            x = solver(x, self.denoiser(scaled, solver.timesteps[step]), step, draws)
            outputs |= {f"input {step}": scaled, f"sample {step}": x}
        return {**outputs, "draw": last_draw(generator)}


def new_scheduler(name: str, **config: Any) -> Any:
    """A scheduler of diffusers, built in float32 as people do, whatever the lane."""
    with default_dtype(torch.float32), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what upstream says of its own code
        return getattr(diffusers, name).from_config(config)


def scheduler_of(loop: Loop, *, begin: bool = True) -> Any:
    """The scheduler of a loop, set to its steps, and told where to begin as pipelines do."""
    scheduler = new_scheduler(loop.scheduler, **loop.config)
    settings = {name: value for name, value in loop.options.items() if name in UPSTREAM_SETTINGS}
    with default_dtype(torch.float32), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.set_timesteps(loop.steps, **loop.schedule, **settings)
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(loop.first)
    return scheduler


def solver_of(loop: Loop) -> solvers.Solver[Any]:
    """The solver of a loop, through its configuration reader."""
    config = {"_class_name": loop.scheduler, **loop.config}
    return solvers.from_config(config, loop.steps, first_step=loop.first, **loop.schedule, **loop.options)


class Same:
    """The map between two denoisers that are the same."""

    def convert(self, state_dict: Mapping[str, Tensor], target: nn.Module) -> Mapping[str, Tensor]:
        return dict(state_dict)

    def invert(self, state_dict: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return dict(state_dict)


def inputs_of(loop: Loop, seeds: Seeds, generator: torch.Generator) -> Mapping[str, Any]:
    """Noise, where a generator begins, and a clean sample for a run that begins later."""
    noise = torch.randn(2, CHANNELS, 5, 3, generator=generator)
    clean = {"clean": torch.randn(2, CHANNELS, 5, 3, generator=generator)} if loop.first else {}
    return {"noise": noise, "seeds": seeds, **clean}


ONE_GENERATOR = "one generator draws for the whole batch"


def loop_case(name: str, summary: str, loop: Loop, seeds: Seeds = 7) -> Case:
    """A case that runs a loop on both sides."""
    scheduler = cache(lambda: scheduler_of(loop))  # some take their time, and every run has a copy of it
    return Case(
        id=f"solvers/{name}",
        summary=summary,
        upstream=lambda: UpstreamLoop(loop, scheduler()),
        port=lambda: PortLoop(loop),
        key_map=Same(),
        inputs=lambda generator: inputs_of(loop, seeds, generator),
        run_upstream=lambda model, inputs: model(**inputs),
        run_port=lambda model, inputs: model(**inputs),
        batch_axis=0,
        without_cells={
            "padded": "samples are not padded",
            "compiled": "a loop with a generator is no graph; test_solvers.py compiles steps",
            **({"batch": ONE_GENERATOR} if loop.stochastic else {}),
        },
    )
