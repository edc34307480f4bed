"""Which steps of a schedule a task takes."""

import pytest

from reference_ports.pipelines.stable_diffusion.schedule import first_step_at, first_step_of, steps_until
from reference_ports.solvers import DDIM, Euler, from_config
from refiners.errors import InputError

HEUN = {"_class_name": "HeunDiscreteScheduler"}


@pytest.mark.parametrize(("strength", "first"), [(1.0, 0), (0.8, 10), (0.5, 25), (0.02, 49)])
def test_a_strength_leaves_the_first_steps_out(strength: float, first: int) -> None:
    assert first_step_of(DDIM(50), strength) == first


def test_a_solver_of_two_calls_leaves_out_both_calls_of_a_step() -> None:
    assert first_step_of(from_config(HEUN, 10), 0.5) == 10


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(InputError, match="between 0 .* and 1"):
        first_step_of(DDIM(50), strength)


def test_a_strength_that_leaves_no_step_is_refused_with_the_least_that_does() -> None:
    with pytest.raises(InputError, match=r"takes none of 10 steps. Raise it to 0.1"):
        first_step_of(DDIM(10), 0.05)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("count", [5, 30])
def test_base_and_refiner_take_all_steps_between_them(share: float, count: int) -> None:
    solver = Euler(count)
    base = steps_until(solver, solver.steps, share)
    assert [*base, *range(first_step_at(solver, share), count)] == list(range(count))


def test_a_refiner_with_a_solver_of_two_calls_begins_with_the_first_of_them() -> None:
    assert first_step_at(from_config(HEUN, 10), 0.5) % 2 == 0


def test_without_an_end_all_steps_are_taken() -> None:
    assert steps_until(DDIM(5), range(5), None) == range(5)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(InputError, match="denoising_end is"):
        steps_until(DDIM(5), range(5), share)
    with pytest.raises(InputError, match="denoising_start is"):
        first_step_at(DDIM(5), share)


def test_shares_that_leave_no_step_are_refused() -> None:
    with pytest.raises(InputError, match="no step is taken"):
        steps_until(DDIM(5), range(5), 0.01)
    with pytest.raises(InputError, match="no step is left"):
        first_step_at(DDIM(2), 0.9999)
