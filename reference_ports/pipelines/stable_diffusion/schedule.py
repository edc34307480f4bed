"""Which steps of a schedule a task takes.

Follows: `get_timesteps` and `denoising_end` of the Stable Diffusion pipelines of diffusers 0.42.1.
"""

from collections.abc import Sequence
from typing import Any

from reference_ports.solvers import Solver
from refiners.errors import InputError


def first_step_of(solver: Solver[Any], strength: float) -> int:
    """Where image to image begins: a strength of 1 takes all steps, one of 0.5 the last half.

    Raises:
        InputError: the strength is not in 0 … 1, or leaves no step.
    """
    if not 0 <= strength <= 1:
        raise InputError(f"strength is {strength}: it must be between 0 (leave the picture) and 1 (ignore it).")
    count = solver.num_inference_steps
    taken = min(int(count * strength), count)
    if taken == 0:
        raise InputError(
            f"A strength of {strength} takes none of {count} steps. Raise it to {1 / count:.2g}, or take more steps."
        )
    return (count - taken) * solver.order


def first_step_at(solver: Solver[Any], denoising_start: float) -> int:
    """Where a refiner begins, when another model has done a share of the denoising.

    Raises:
        InputError: the share is not between 0 and 1, or leaves no step.
    """
    cutoff = _cutoff(solver, denoising_start, "denoising_start")
    count = int((solver.timesteps < cutoff).sum())
    if solver.order == 2 and count % 2 == 0:
        count += 1  # the two calls of a step stay together
    if count == 0:
        raise InputError(f"denoising_start is {denoising_start}: no step is left. Lower it, or take more steps.")
    return len(solver.timesteps) - count


def steps_until(solver: Solver[Any], steps: Sequence[int], denoising_end: float | None) -> Sequence[int]:
    """The steps of a base model that leaves the rest of the denoising to a refiner; all of them for None.

    Raises:
        InputError: the share is not between 0 and 1, or leaves no step.
    """
    if denoising_end is None:
        return steps
    cutoff = _cutoff(solver, denoising_end, "denoising_end")
    count = sum(bool(solver.timesteps[step] >= cutoff) for step in steps)
    if count == 0:
        raise InputError(f"denoising_end is {denoising_end}: no step is taken. Raise it, or take more steps.")
    return steps[:count]


def _cutoff(solver: Solver[Any], share: float, name: str) -> int:
    """The timestep at which a share of the denoising is done."""
    if not 0 < share < 1:
        raise InputError(f"{name} is {share}: it is a share of the denoising, above 0 and below 1.")
    total = solver.params.num_train_timesteps
    return round(total - share * total)
