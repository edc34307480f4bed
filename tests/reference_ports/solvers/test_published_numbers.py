"""The numbers that diffusers' own tests expect of whole loops: facts that came from neither side here.

Their loops run a formula in the place of a denoiser, x · t / (t + 1), from a fixed sample. Given are the sum and the
mean of the absolute values at the end, as printed there.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from reference_ports.solvers import from_config

LINEAR = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
LONG = {**LINEAR, "num_train_timesteps": 1100}
HIGH = {**LINEAR, "beta_start": 0.01}
DISTILLED = {**LINEAR, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
KARRAS = {"use_karras_sigmas": True}
TO_SIGMA_MIN = {**LINEAR, "final_sigmas_type": "sigma_min"}
MULTISTEP = {**TO_SIGMA_MIN, "lower_order_final": False}
THRESHOLDING = {"thresholding": True, "dynamic_thresholding_ratio": 0.87, "sample_max_value": 0.5}
LU = {"use_lu_lambdas": True}

Config = dict[str, Any]
NUMBERS: list[tuple[str, Config, int, float | None, float | None]] = [
    ("DDIM", LINEAR, 10, 172.0067, 0.223967),
    ("DDIM", {**LINEAR, **V}, 10, 52.5302, 0.0684),
    ("DDIM", {**HIGH, "set_alpha_to_one": True}, 10, 149.8295, 0.1951),
    ("DDIM", {**HIGH, "set_alpha_to_one": False}, 10, 149.0784, 0.1941),
    ("DDPM", LINEAR, 1000, None, 0.3372),
    ("DDPM", {**LINEAR, **V}, 1000, None, 0.2631),
    ("PNDM", LINEAR, 10, 198.1318, 0.2580),
    ("PNDM", {**LINEAR, **V}, 10, 67.3986, 0.0878),
    ("EulerDiscrete", LONG, 10, 10.0807, 0.0131),
    ("EulerAncestralDiscrete", LONG, 10, None, 0.1983),
    ("EulerAncestralDiscrete", {**LONG, **V}, 10, 108.4439, 0.1412),
    ("HeunDiscrete", LONG, 10, 0.1233, 0.0002),
    ("KDPM2Discrete", LONG, 10, 20.4125, 0.0266),
    ("DPMSolverMultistep", MULTISTEP, 10, None, 0.3301),
    ("DPMSolverMultistep", {**MULTISTEP, **V}, 10, None, 0.2251),
    ("DPMSolverMultistep", {**MULTISTEP, **V, **LU}, 10, None, 0.1554),
    ("DPMSolverMultistep", {**MULTISTEP, **THRESHOLDING}, 10, None, 1.1364),
    ("DPMSolverSinglestep", TO_SIGMA_MIN, 10, None, 0.2791),
    ("DPMSolverSinglestep", {**TO_SIGMA_MIN, **KARRAS}, 10, None, 0.2248),
    ("DPMSolverSinglestep", {**TO_SIGMA_MIN, **V}, 10, None, 0.1453),
    ("DPMSolverSinglestep", {**TO_SIGMA_MIN, **V, **KARRAS}, 10, None, 0.0649),
    ("UniPCMultistep", TO_SIGMA_MIN, 10, None, 0.2464),
    ("UniPCMultistep", {**TO_SIGMA_MIN, **KARRAS}, 10, None, 0.2925),
    ("UniPCMultistep", {**TO_SIGMA_MIN, **V}, 10, None, 0.1014),
    ("LCM", DISTILLED, 1, 18.7097, 0.0244),
    ("LCM", DISTILLED, 10, 197.7616, None),
]


def fixed_sample() -> Tensor:
    """Their sample: 0, 1/768, 2/768, … with the batch as the innermost axis."""
    return (torch.arange(4 * 3 * 8 * 8).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)


def run_loop(scheduler: str, config: Config, steps: int) -> Tensor:
    """Their loop, which goes on with the scaled sample where a solver scales it."""
    solver = from_config({"_class_name": f"{scheduler}Scheduler", **config}, steps)
    generator = torch.Generator().manual_seed(0)
    x = fixed_sample() * solver.initial_noise_scale
    for step in solver.steps:
        x = solver.scale_model_input(x, step)
        timestep = solver.timesteps[step]
        x = solver(x, x * timestep / (timestep + 1), step, generator)
    return x.abs()


def shown(value: float, published: float) -> float:
    """The value with as many digits as were published."""
    return round(value, len(str(published).partition(".")[2]))


@pytest.mark.parametrize(("scheduler", "config", "steps", "total", "mean"), NUMBERS)
def test_a_whole_loop_ends_in_the_published_numbers(
    scheduler: str, config: Config, steps: int, total: float | None, mean: float | None
) -> None:
    x = run_loop(scheduler, config, steps)
    assert mean is None or shown(x.mean().item(), mean) == mean
    assert total is None or shown(x.sum().item(), total) == total


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {**SD, "timestep_spacing": "leading", "steps_offset": 1}
TIMESTEPS: list[tuple[str, Config, list[float]]] = [
    ("DDIM", {**SD, "steps_offset": 1}, [801, 601, 401, 201, 1]),
    ("DDPM", SD, [800, 600, 400, 200, 0]),
    ("PNDM", {**SD, "steps_offset": 1, "skip_prk_steps": True}, [801, 601, 601, 401, 201, 1]),
    ("DPMSolverMultistep", SD, [999, 799, 599, 400, 200]),
    ("DPMSolverMultistep", {**SD, **KARRAS}, [999, 786, 427, 59, 0]),
    ("DPMSolverSinglestep", SD, [999, 799, 599, 400, 200]),
    ("EulerDiscrete", LEADING, [801, 601, 401, 201, 1]),
    ("EulerAncestralDiscrete", LEADING, [801, 601, 401, 201, 1]),
    ("HeunDiscrete", SD, [999, 749.25, 749.25, 499.5, 499.5, 249.75, 249.75, 0, 0]),
    ("LCM", SD, [999, 799, 599, 399, 199]),
    ("TCD", SD, [999, 799, 599, 399, 199]),
    ("UniPCMultistep", SD, [999, 799, 599, 400, 200]),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}, [1000, 900.36, 751.12, 502.99, 8.93]),
]


@pytest.mark.parametrize(("scheduler", "config", "expected"), TIMESTEPS)
def test_the_timesteps_of_five_steps_are_the_known_ones(scheduler: str, config: Config, expected: list[float]) -> None:
    timesteps = from_config({"_class_name": f"{scheduler}Scheduler", **config}, 5).timesteps
    assert [round(float(timestep), 2) for timestep in timesteps] == expected
    whole = scheduler in {"DDIM", "DDPM", "PNDM", "LCM", "TCD", "UniPCMultistep"} or scheduler.startswith("DPM")
    assert timesteps.dtype == (torch.int64 if whole else torch.float32)
