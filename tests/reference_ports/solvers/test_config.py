from typing import Any

import pytest

from reference_ports import solvers
from refiners.errors import ConversionError, InputError

SD1: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SDXL: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def test_a_configuration_names_its_solver() -> None:
    assert isinstance(solvers.from_config(SD1, 5), solvers.PNDM)
    assert isinstance(solvers.from_config(SDXL, 5), solvers.Euler)


@pytest.mark.parametrize("config", [SD1, SDXL])
@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_every_solver_reads_the_published_configurations(config: dict[str, Any], name: str) -> None:
    solver = solvers.from_config(config, 6, solver=name)
    assert type(solver) is solvers.SOLVERS[name].solver
    beta_start = getattr(solver.params, "beta_start", None)
    assert beta_start == (None if name == "flow-euler" else 0.00085)
    assert all(getattr(solver.params, key) == value for key, value in solvers.SOLVERS[name].changes.items())


def test_changes_come_before_the_configuration() -> None:
    assert solvers.from_config(SD1, 5, solver="ddim", eta=0.5, steps_offset=0).params.eta == 0.5
    assert solvers.from_config(SD1, 5, solver="ddim", steps_offset=0).timesteps.tolist() == [800, 600, 400, 200, 0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"beta_schedule": "cosine"}, "beta_schedule: is 'cosine'"),
        ({"skip": 1}, "skip: is 1, the port does not know this attribute"),
        ({"skip": None}, "skip: is None, the port does not know this attribute"),
        ({"eta": 0.5}, "eta: is 0.5, the port does not know this attribute"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps: is '1000'"),
        ({"steps_offset": None}, "steps_offset: is None"),
        ({"solver_p": {"order": 2}}, "solver_p"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConversionError, match=told):
        solvers.from_config({**SD1, **changes}, 5)


def test_all_that_cannot_be_honoured_is_told_at_once() -> None:
    with pytest.raises(ConversionError, match="2 of its attributes"):
        solvers.from_config({**SD1, "skip": 1, "prediction_type": "noise"}, 5)


def test_attributes_of_other_solvers_are_left_aside() -> None:
    plain = solvers.from_config(SD1, 5)
    assert solvers.from_config({**SD1, "solver_order": 3, "use_lu_lambdas": True}, 5).params == plain.params


def test_values_that_only_other_solvers_have_are_read_as_upstream_does() -> None:
    multistep = solvers.from_config({**SD1, "solver_type": "bh2", "algorithm_type": "deis"}, 5, solver="dpm++2m")
    assert (multistep.params.solver_type, multistep.params.algorithm_type) == ("midpoint", "dpmsolver++")
    assert solvers.from_config({**SD1, "solver_type": "heun"}, 5, solver="unipc").params.solver_type == "bh2"


def test_variances_that_are_not_learned_belong_to_other_solvers() -> None:
    params = solvers.from_config({**SD1, "variance_type": "fixed_small_log"}, 5, solver="dpm++2m").params
    assert params.variance_type is None


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", ["dpm++2m", "dpm++2s", "euler", "heun", "kdpm2", "kdpm2-a", "unipc", "flow-euler"])
def test_bounds_of_noise_levels_are_obeyed_by_every_solver_that_spaces_them(name: str, spacing: str) -> None:
    bounds = {"sigma_min": 0.25, "sigma_max": 8.0, f"use_{spacing}_sigmas": True}
    solver = solvers.from_config({**SDXL, **bounds}, 4, solver=name)
    assert float(solver.sigmas.max()) == 8.0
    assert round(float(solver.sigmas[solver.sigmas > 0].min()), 3) == 0.25


@pytest.mark.parametrize("name", ["dpm++2m", "dpm++2s", "unipc"])
def test_noise_levels_that_no_straight_path_has_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(InputError, match=r"use_flow_sigmas excludes use_exponential_sigmas.*begin at 14\.61"):
        solvers.from_config({**SD1, "use_flow_sigmas": True, "use_exponential_sigmas": True}, 5, solver=name)


def test_steps_that_lead_nowhere_are_refused_where_they_have_no_number() -> None:
    third = {**SD1, "solver_order": 3, "use_lu_lambdas": True, "final_sigmas_type": "sigma_min"}
    with pytest.raises(InputError, match="Step 19 leads nowhere.*solver_order=2"):
        solvers.from_config(third, 20, solver="dpm++2m")
    assert len(solvers.from_config({**third, "solver_order": 2}, 20, solver="dpm++2m").steps) == 20


def test_noise_levels_without_a_logarithm_are_refused() -> None:
    with pytest.raises(InputError, match="use_exponential_sigmas needs σ above 0, and they run from 8 to 0"):
        solvers.from_config({**SDXL, "use_exponential_sigmas": True, "sigma_min": 0.0, "sigma_max": 8.0}, 5)


def test_continuous_timesteps_refuse_timesteps_of_the_training() -> None:
    continuous = {**SDXL, "timestep_type": "continuous", "prediction_type": "v_prediction"}
    with pytest.raises(InputError, match="timestep_type='continuous'.*give sigmas"):
        solvers.from_config(continuous, timesteps=[900, 400])
    assert solvers.from_config(continuous, sigmas=[1.0, 0.5, 0.0]).timesteps[0] == 0


def test_null_means_false_or_none_where_upstream_reads_it_so() -> None:
    params = solvers.from_config({**SDXL, "use_karras_sigmas": None, "sigma_min": None}, 5).params
    assert (params.use_karras_sigmas, params.sigma_min) == (False, None)


def test_betas_and_lists_of_a_configuration_become_tuples() -> None:
    betas = [0.1, 0.2, 0.3]
    params = solvers.from_config(
        {**SD1, "num_train_timesteps": 3, "trained_betas": betas}, 3, solver="ddim", steps_offset=0
    ).params
    assert params.trained_betas == (0.1, 0.2, 0.3)
    assert solvers.from_config({**SD1, "disable_corrector": [0, 2]}, 5, solver="unipc").params.disable_corrector == (
        0,
        2,
    )


def test_an_unknown_solver_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"no solver 'dpm\+\+4m'.*dpm\+\+2m"):
        solvers.from_config(SD1, 5, solver="dpm++4m")
    for name in ("LMSDiscreteScheduler", None, 3):
        with pytest.raises(ConversionError, match="EulerDiscreteScheduler"):
            solvers.from_config({**SD1, "_class_name": name}, 5)
    with pytest.raises(InputError, match="DDIMParameters has no s_churn"):
        solvers.from_config(SD1, 5, solver="ddim", s_churn=1.0)
