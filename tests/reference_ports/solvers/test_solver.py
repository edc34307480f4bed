import copy
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reference_ports import solvers
from reference_ports.solvers import SOLVERS
from refiners.errors import InputError

STOCHASTIC = {"ddpm", "dpm++2m-sde", "dpm++2m-sde-karras", "euler-a", "kdpm2-a", "lcm", "tcd"}
ORDERED = [name for name in SOLVERS if name.startswith(("pndm", "dpm", "heun", "kdpm", "unipc"))]
STEPS = 6


def build(name: str, steps: int = STEPS, **options: Any) -> solvers.Solver[Any]:
    recipe = SOLVERS[name]
    return recipe.solver(steps, recipe.solver.parameters_type(**recipe.changes), **options)


def sample(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(solver: solvers.Solver[Any], x: Tensor, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    samples: list[Tensor] = []
    for step in solver.steps:
        prediction = torch.tanh(solver.scale_model_input(x, step)) * solver.timesteps[step] / 1000
        x = solver(x, prediction.to(x.dtype), step, generator)
        samples.append(x)
    return samples


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", SOLVERS)
def test_rebuild_gives_a_fresh_solver_that_does_the_same(name: str) -> None:
    solver = build(name)
    first = run(solver, sample())
    assert same(first, run(solver.rebuild(), sample()))
    assert len(solver.rebuild(4).timesteps) < len(solver.timesteps)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_state_can_be_kept_and_put_back(name: str) -> None:
    solver, generator = build(name), torch.Generator().manual_seed(0)
    x = sample()
    for step in solver.steps[:3]:
        x = solver(x, torch.tanh(x), step, generator)
    kept, draws = solver.state, generator.get_state()
    once = solver(x, torch.tanh(x), 3, generator)
    solver.state = kept
    assert solver.state is kept
    assert torch.equal(solver(x, torch.tanh(x), 3, generator.set_state(draws)), once)


@pytest.mark.parametrize("name", ORDERED)
def test_a_state_is_frozen_and_each_step_replaces_it(name: str) -> None:
    solver = build(name)
    before = solver.state
    solver(sample(), sample(1), 0, torch.Generator().manual_seed(0))
    assert solver.state is not before
    assert (before.next_step, solver.state.next_step) == (0, 1)
    with pytest.raises(FrozenInstanceError):
        solver.state.next_step = 3


@pytest.mark.parametrize("name", ORDERED)
def test_a_step_out_of_turn_is_refused_and_changes_nothing(name: str) -> None:
    solver = build(name)
    run(solver, sample())
    state = solver.state
    with pytest.raises(InputError, match="out of turn"):
        solver(sample(), sample(1), 0, torch.Generator())
    assert solver.state is state


@pytest.mark.parametrize("name", sorted(SOLVERS.keys() - set(ORDERED)))
def test_steps_of_a_solver_without_memory_may_come_in_any_order(name: str) -> None:
    solver = build(name)
    late = solver(sample(), sample(1), 3, torch.Generator().manual_seed(0))
    solver(sample(), sample(1), 0, torch.Generator().manual_seed(0))
    assert torch.equal(solver(sample(), sample(1), 3, torch.Generator().manual_seed(0)), late)


@pytest.mark.parametrize("name", ORDERED)
def test_a_failed_step_leaves_the_state_as_it_was(name: str) -> None:
    solver = build(name)
    state = solver.state
    with pytest.raises(InputError, match="shape"):
        solver(sample(), sample()[:, :2], 0, torch.Generator())
    assert solver.state is state


@pytest.mark.parametrize("name", SOLVERS)
def test_nothing_global_is_touched(name: str) -> None:
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    expected = run(build(name), sample())
    try:
        torch.set_default_dtype(torch.float64)
        assert same(run(build(name), sample(dtype=torch.float32)), expected)
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(dtype)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_built_under_the_meta_device_works(name: str) -> None:
    with torch.device("meta"):
        solver = build(name)
    assert same(run(solver, sample()), run(build(name), sample()))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_samples_keep_their_dtype(name: str, dtype: torch.dtype) -> None:
    assert {x.dtype for x in run(build(name), sample().to(dtype))} == {dtype}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_copy_goes_on_by_itself(name: str) -> None:
    solver = build(name)
    x = solver(sample(), sample(1), 0, torch.Generator().manual_seed(0))
    twin = copy.deepcopy(solver)
    once = solver(x, sample(1), 1, torch.Generator().manual_seed(0))
    assert torch.equal(twin(x, sample(1), 1, torch.Generator().manual_seed(0)), once)


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_noise_is_drawn_from_a_generator_or_refused(name: str) -> None:
    solver = build(name)
    with pytest.raises(InputError, match="generator"):
        for step in solver.steps[:2]:
            solver(sample(), sample(1), step)


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_a_generator_for_each_item_draws_as_for_that_item_alone(name: str) -> None:
    together, alone = build(name), build(name)
    both = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    x, second = sample(), sample()[1:]
    own = [torch.Generator().manual_seed(4)]
    for step in together.steps[:3]:
        x, second = together(x, torch.tanh(x), step, both), alone(second, torch.tanh(second), step, own)
    assert torch.equal(x[1:], second)


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_generators_that_are_too_many_are_refused(name: str) -> None:
    solver = build(name)
    with pytest.raises(InputError, match="3 generators for a batch of 2"):
        for step in solver.steps[:2]:
            solver(sample(), sample(1), step, [torch.Generator() for _ in range(3)])


@pytest.mark.parametrize("count", [0, -3, 1001, 2.0, None, True])
def test_a_wrong_number_of_steps_is_refused(count: Any) -> None:
    with pytest.raises(InputError, match="num_inference_steps"):
        solvers.Euler(count)


@pytest.mark.parametrize("step", [-1, STEPS, 1000])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++2m"])
def test_a_step_out_of_range_is_refused(name: str, step: int) -> None:
    solver = build(name)
    with pytest.raises(InputError, match="out of range"):
        solver(sample(), sample(), step)
    with pytest.raises(InputError, match="out of range"):
        solver.scale_model_input(sample(), step)
    with pytest.raises(InputError, match="out of range"):
        solver.add_noise(sample(), sample(), step)


def test_steps_before_the_first_one_of_a_run_are_refused() -> None:
    solver = build("ddim", first_step=2)
    assert solver.steps == range(2, STEPS)
    with pytest.raises(InputError, match="out of range"):
        solver(sample(), sample(), 1)


@pytest.mark.parametrize(("name", "first_step"), [("ddim", 6), ("ddim", -1), ("heun", 1), ("ddim", 1.0)])
def test_a_wrong_first_step_is_refused(name: str, first_step: Any) -> None:
    with pytest.raises(InputError, match="first_step"):
        build(name, first_step=first_step)


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        (solvers.DDIM, {"timesteps": [3, 2]}),
        (solvers.DDPM, {"timesteps": [2, 3]}),
        (solvers.DDPM, {"timesteps": []}),
        (solvers.DDPM, {"timesteps": [1000, 3]}),
        (solvers.DDPM, {"timesteps": [3, -1]}),
        (solvers.Euler, {"sigmas": [3.0]}),
        (solvers.Euler, {"sigmas": [3.0, 0.0], "timesteps": [3]}),
        (solvers.Euler, {"sigmas": [3.0, 0.0], "num_inference_steps": 1}),
        (solvers.UniPC, {"sigmas": [0.9, 0.1]}),
        (solvers.LCM, {"num_inference_steps": 51}),
        (solvers.PNDM, {"num_inference_steps": 3}),
        (solvers.DDIM, {"num_inference_steps": 1000, "params": solvers.DDIMParameters(steps_offset=1)}),
        (
            solvers.FlowEuler,
            {"num_inference_steps": 3, "params": solvers.FlowEulerParameters(use_dynamic_shifting=True)},
        ),
        (solvers.Euler, {"timesteps": [3], "params": solvers.EulerParameters(use_karras_sigmas=True)}),
        (solvers.DPMMultistep, {"timesteps": [3], "params": solvers.DPMMultistepParameters(use_lu_lambdas=True)}),
        (solvers.Euler, {"num_inference_steps": 3, "params": solvers.DDIMParameters()}),
    ],
)
def test_a_schedule_that_cannot_be_made_is_refused(kind: type[Any], schedule: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        kind(**schedule)


@pytest.mark.parametrize(
    ("kind", "values", "named"),
    [
        (solvers.DDIMParameters, {"prediction_type": "noise"}, "prediction_type"),
        (solvers.DDIMParameters, {"beta_schedule": "cosine", "eta": "1"}, "eta"),
        (solvers.DDIMParameters, {"num_train_timesteps": 0}, "num_train_timesteps"),
        (solvers.DDIMParameters, {"clip_sample": None}, "clip_sample"),
        (solvers.PNDMParameters, {"prediction_type": "sample"}, "prediction_type"),
        (solvers.EulerParameters, {"use_karras_sigmas": True, "use_beta_sigmas": True}, "exclude one another"),
        (solvers.DPMMultistepParameters, {"solver_order": 4}, "solver_order"),
        (solvers.DPMMultistepParameters, {"solver_order": 0}, "solver_order"),
        (solvers.DPMMultistepParameters, {"algorithm_type": "dpmsolver"}, "final_sigmas_type"),
        (solvers.DPMSingleStepParameters, {"algorithm_type": "sde-dpmsolver"}, "algorithm_type"),
        (solvers.FlowEulerParameters, {"mu": 1.0}, "use_dynamic_shifting"),
        (solvers.TCDParameters, {"eta": 1.5}, "eta"),
        (solvers.ConsistencyParameters, {"original_inference_steps": 2000}, "original_inference_steps"),
        (solvers.ConsistencyParameters, {"strength": 0.0}, "strength"),
        (solvers.UniPCParameters, {"shift_terminal": 0.1}, "use_flow_sigmas"),
    ],
)
def test_wrong_parameters_are_refused_by_name(kind: type[Any], values: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        kind(**values)


def test_betas_of_ones_own_are_one_for_each_timestep() -> None:
    with pytest.raises(InputError, match="trained_betas holds 2 numbers"):
        solvers.DDIM(5, solvers.DDIMParameters(trained_betas=(0.1, 0.2)))


def test_a_state_of_another_solver_is_refused() -> None:
    solver, other = build("dpm++2m"), build("pndm")
    with pytest.raises(InputError, match="DPMState"):
        solver.state = other.state
    with pytest.raises(InputError, match="another schedule"):
        solver.state = replace(solver.state, next_step=40)


def test_a_change_that_is_no_parameter_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"Euler has no eta. Its parameters are .*s_churn"):
        build("euler").rebuild(eta=1.0)


def test_rebuild_keeps_a_schedule_of_ones_own_and_changes_parameters() -> None:
    solver = solvers.Euler(timesteps=[900, 20], first_step=1)
    again = solver.rebuild(s_churn=0.3)
    assert again.timesteps.tolist() == [900, 20]
    assert (again.first_step, again.params.s_churn) == (1, 0.3)
    assert solver.rebuild(3).first_step == 0
    assert solver.params.s_churn == 0


def test_noise_is_added_for_each_item_at_its_own_step() -> None:
    for name in ("ddim", "euler", "dpm++2m", "flow-euler"):
        solver = build(name)
        noisy = solver.add_noise(sample(), sample(1), torch.tensor([4, 1]))
        assert torch.equal(noisy[:1], solver.add_noise(sample()[:1], sample(1)[:1], 4))
        assert torch.equal(noisy[1:], solver.add_noise(sample()[1:], sample(1)[1:], 1))
        for steps in (torch.tensor([0, 6]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])):
            with pytest.raises(InputError, match="indices"):
                solver.add_noise(sample(), sample(1), steps)


def test_noise_at_a_timestep_that_is_none_is_refused() -> None:
    for solver, timesteps in ((build("ddim"), [1000, 2]), (build("euler"), [3.0, 999.0]), (build("dpm++2m"), [3, 999])):
        with pytest.raises(InputError, match="timestep|Timestep"):
            solver.add_noise_at(sample(), sample(1), torch.tensor(timesteps))


def test_a_learned_variance_needs_its_channels() -> None:
    solver = solvers.DDPM(3, solvers.DDPMParameters(variance_type="learned_range"))
    with pytest.raises(InputError, match="takes 6 channels"):
        solver(sample(), sample(1), 0, torch.Generator())


def test_the_shift_for_a_number_of_tokens_lies_on_the_line_of_the_configuration() -> None:
    params = solvers.FlowEulerParameters(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.5)
    assert params.mu_for(256) == 0.5
    assert params.mu_for(4096) == 1.5
    with pytest.raises(InputError, match="give mu itself"):
        replace(params, base_shift=None).mu_for(256)


def test_a_solver_prints_as_a_line_of_a_tree() -> None:
    assert str(build("euler")) == "Euler(num_inference_steps=6)"
