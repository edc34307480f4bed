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
