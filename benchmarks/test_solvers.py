"""What steps of solvers cost beside those of upstream's schedulers, on latents so small that calls take the time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Record
from benchmarks.engine.contestants import Pair
from benchmarks.engine.timers import Act
from reference_ports import solvers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, for what diffusers does
STEPS = 20


@dataclass(frozen=True)
class Sampling:
    """All steps of a schedule. To begin one makes the schedule, which is timed with nothing."""

    begin: Callable[[], Callable[[], Tensor]]

    def __call__(self) -> Tensor:
        return self.begin()()


def by_steps(act: Act, calls: int) -> float:
    """Seconds of processor time that the steps of a sampling take."""
    assert isinstance(act, Sampling)
    seconds = 0.0
    for _ in range(calls):
        sample = act.begin()
        start = time.process_time()
        sample()
        seconds += time.process_time() - start
    return seconds / calls


def samplings(scheduler: Any) -> tuple[Sampling, Sampling]:
    """The same steps by the port and by upstream, with the same noise for those that draw some."""
    solver = solvers.from_config({**scheduler.config, "_class_name": type(scheduler).__name__}, STEPS)
    noise = torch.Generator().manual_seed(0)
    first, prediction = (torch.randn(1, 4, 16, 16, generator=noise) for _ in range(2))
    draws = "generator" in signature(scheduler.step).parameters
    is_scaled = hasattr(scheduler, "scale_model_input")

    def ours(solver: solvers.Solver[Any], generator: torch.Generator) -> Tensor:
        x = first
        for step in solver.steps:
            solver.scale_model_input(x, step)
            x = solver(x, prediction, step, generator)
        return x

    def theirs(generator: torch.Generator) -> Tensor:
        x, options = first, {"generator": generator} if draws else {}
        for timestep in scheduler.timesteps:
            if is_scaled:
                scheduler.scale_model_input(x, timestep)
            x = scheduler.step(prediction, timestep, x, return_dict=False, **options)[0]
        return x

    def begin_theirs() -> Callable[[], Tensor]:
        scheduler.set_timesteps(STEPS)
        return partial(theirs, torch.Generator().manual_seed(1))

    def begin_ours() -> Callable[[], Tensor]:
        return partial(ours, solver.rebuild(STEPS), torch.Generator().manual_seed(1))

    return Sampling(begin_ours), Sampling(begin_theirs)


def against(contestant: Sampling, reference: Sampling) -> Pair:
    """The steps of one sampling divided by those of another."""
    facts = {"steps": STEPS, "latents": [1, 4, 16, 16], "against": "upstream", "threads": 1}
    return Pair(
        contestant=lambda: contestant,
        reference=lambda: reference,
        limit=1.0,
        precision=0.05,
        timer=by_steps,
        facts=facts,
    )


@pytest.mark.parametrize("name", solvers.CLASSES)
def test_steps_of_a_solver_against_upstream(record: Record, name: str) -> None:
    ours, theirs = samplings(getattr(diffusers, name)())
    assert torch.equal(ours(), theirs())
    record(against(ours, theirs))
