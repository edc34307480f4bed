"""Solvers beside diffusers where a case is too much, or not enough: drawn configurations, training, files, compilation.

`parity_tests.cases.solvers` has the loops that were chosen. Here configurations are drawn, the same ones each time, so
that combinations nobody thought of are met too.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from parity_tests.cases.solvers import CASES
from parity_tests.schedulers import (
    CHANNELS,
    Denoiser,
    Loop,
    PortLoop,
    UpstreamLoop,
    new_scheduler,
    scheduler_of,
    solver_of,
)
from reference_ports import solvers
from refiners.errors import InputError
from refiners.parity import CaseRunner, Lane, Verdict
from refiners.parity.bits import same_bits

LANES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DRAWN = 12
"""Configurations drawn for each scheduler."""

Choices = Mapping[str, Sequence[Any]]

BETAS: Choices = {"beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"], "beta_end": [0.012, 0.02]}
SPACING: Choices = {"timestep_spacing": ["leading", "trailing", "linspace"], "steps_offset": [0, 1]}
CLIPPING: Choices = {"clip_sample": [True, False], "thresholding": [False, True], "sample_max_value": [1.5]}
KINDS: Choices = {"prediction_type": ["epsilon", "sample", "v_prediction"]}
TWO_KINDS: Choices = {"prediction_type": ["epsilon", "v_prediction"]}
FOUR_KINDS: Choices = {"prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"]}
ZERO_SNR: Choices = {"rescale_betas_zero_snr": [False, True]}
SIGMAS: Choices = {"spacing of σ": ["", "", "karras", "exponential", "beta"]}
FINAL: Choices = {"final_sigmas_type": ["zero", "sigma_min"]}
ORDERS: Choices = {"solver_order": [1, 2, 3], "lower_order_final": [True, False], "thresholding": [False, False, True]}
LAMBDAS: Choices = {
    **BETAS,
    **FOUR_KINDS,
    **SIGMAS,
    **FINAL,
    **ORDERS,
    "use_flow_sigmas": [False, True],
    "flow_shift": [3.0],
}
DPM: Choices = {
    **LAMBDAS,
    "algorithm_type": ["dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "sde-dpmsolver", "dpmsolver"],
    "solver_type": ["midpoint", "heun"],
    "lambda_min_clipped": [-float("inf"), -5.1],
}
DISTILLED: Choices = {**BETAS, **KINDS, **CLIPPING, **ZERO_SNR, "original_inference_steps": [50, 40]}
VARIANCES: Choices = {"variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"]}

SCHEDULERS: dict[str, Choices] = {
    "DDIM": {**BETAS, **SPACING, **CLIPPING, **KINDS, **ZERO_SNR, "set_alpha_to_one": [True, False]},
    "DDPM": {**BETAS, **SPACING, **CLIPPING, **KINDS, **ZERO_SNR, **VARIANCES},
    "PNDM": {**BETAS, **SPACING, **TWO_KINDS, "skip_prk_steps": [True, False], "set_alpha_to_one": [True, False]},
    "DPMSolverMultistep": {
        **DPM,
        **SPACING,
        **ZERO_SNR,
        "euler_at_final": [True, False],
        "use_lu_lambdas": [False, True],
    },
    "DPMSolverSinglestep": DPM,
    "EulerDiscrete": {
        **BETAS,
        **SPACING,
        **KINDS,
        **ZERO_SNR,
        **SIGMAS,
        **FINAL,
        "interpolation_type": ["linear", "log_linear"],
        "timestep_type": ["discrete", "continuous"],
    },
    "EulerAncestralDiscrete": {**BETAS, **SPACING, **TWO_KINDS, **ZERO_SNR},
    "HeunDiscrete": {**BETAS, **SPACING, **KINDS, **SIGMAS, "clip_sample": [True, False]},
    "KDPM2Discrete": {**BETAS, **SPACING, **TWO_KINDS, **SIGMAS},
    "KDPM2AncestralDiscrete": {**BETAS, **SPACING, **TWO_KINDS, **SIGMAS},
    "LCM": DISTILLED,
    "TCD": DISTILLED,
    "UniPCMultistep": {
        **LAMBDAS,
        **SPACING,
        **ZERO_SNR,
        "predict_x0": [True, True, False],
        "solver_type": ["bh1", "bh2"],
        "disable_corrector": [[], [0], [1, 2]],
        "sigma_min": [None, 0.1],
    },
    "FlowMatchEulerDiscrete": {
        **SIGMAS,
        "shift": [1.0, 3.0],
        "invert_sigmas": [False, True],
        "shift_terminal": [None, 0.1],
        "stochastic_sampling": [False, True],
    },
}
OPTIONS: dict[str, Choices] = {
    "DDIM": {"eta": [0.0, 0.7, 1.0], "use_clipped_model_output": [False, True]},
    "EulerDiscrete": {"s_churn": [0.0, 2.0], "s_tmin": [0.5], "s_tmax": [10.0], "s_noise": [1.003]},
    "TCD": {"eta": [0.0, 0.3, 1.0]},
}
WITHOUT_GENERATOR = ("PNDM", "HeunDiscrete", "KDPM2Discrete", "UniPCMultistep")


def drawn(choices: Choices, numbers: random.Random) -> dict[str, Any]:
    return {name: numbers.choice(values) for name, values in choices.items()}


def loop_of(scheduler: str, numbers: random.Random) -> Loop:
    """A loop of a scheduler, drawn from its choices and mended where upstream takes no such combination."""
    config = drawn(SCHEDULERS[scheduler], numbers)
    spacing = config.pop("spacing of σ", "")
    config |= {f"use_{spacing}_sigmas": True} if spacing else {}
    if config.get("timestep_spacing") != "leading":
        config.pop("steps_offset", None)
    algorithm = config.get("algorithm_type", "")
    if scheduler == "DPMSolverSinglestep" and algorithm == "sde-dpmsolver":
        config["algorithm_type"] = algorithm = "dpmsolver"
    integrates_noise = algorithm in ("dpmsolver", "sde-dpmsolver") or not config.get("predict_x0", True)
    if integrates_noise:
        config["final_sigmas_type"] = "sigma_min"
        config["thresholding"] = config["thresholding"] and scheduler == "DPMSolverMultistep"
        if config["prediction_type"] == "flow_prediction":
            config["prediction_type"] = "epsilon"
    if algorithm == "sde-dpmsolver":
        config["solver_order"] = min(2, config["solver_order"])
    if scheduler == "UniPCMultistep" and config["final_sigmas_type"] == "zero":
        config["lower_order_final"] = True
    if config.get("use_flow_sigmas"):  # other σ are no points of a straight path: upstream computes NaN
        config["use_flow_sigmas"] = config["prediction_type"] == "flow_prediction" and not spacing
        config["use_lu_lambdas"] = False
    steps = numbers.choice([4, 5, 7, 16])
    order = solvers.CLASSES[f"{scheduler}Scheduler"].order
    return Loop(
        scheduler=f"{scheduler}Scheduler",
        config=config,
        steps=steps,
        options=drawn(OPTIONS.get(scheduler, {}), numbers),
        first=order * numbers.choice([0, 0, 1, 2]),
        stochastic=scheduler not in WITHOUT_GENERATOR,
        learned=config.get("variance_type") == "learned_range",
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_drawn_configurations_are_equal_bit_for_bit(scheduler: str) -> None:
    numbers = random.Random(f"solvers {scheduler}")
    for _ in range(DRAWN):
        loop = loop_of(scheduler, numbers)
        upstream, port = UpstreamLoop(loop, scheduler_of(loop)), PortLoop(loop)
        port.load_state_dict(upstream.state_dict())
        for dtype in LANES:
            generator = torch.Generator().manual_seed(0)
            noise, clean = (torch.randn(2, CHANNELS, 4, 5, generator=generator).to(dtype) for _ in range(2))
            inputs = (noise, 7, clean if loop.first else None)
            with torch.no_grad():
                theirs, ours = upstream.to(dtype)(*inputs), port.to(dtype)(*inputs)
            unequal = [name for name, tensor in theirs.items() if not same_bits(tensor, ours[name])]
            assert unequal == [], (loop, dtype)


FOREIGN: Mapping[str, Any] = {
    **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False},
    **{"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0, "timestep_type": "continuous"},
    **{"variance_type": "fixed_small", "solver_type": "bh2", "lower_order_final": True},
}
"""Attributes of several classes in one file. Upstream's schedulers obey the bounds of σ that they do not declare."""


@pytest.mark.parametrize("scheduler", solvers.CLASSES)
def test_a_file_of_another_class_is_read_as_upstream_reads_it(scheduler: str) -> None:
    stochastic = scheduler.removesuffix("Scheduler") not in WITHOUT_GENERATOR
    loop = Loop(scheduler=scheduler, config=FOREIGN, stochastic=stochastic)
    upstream, port = UpstreamLoop(loop, scheduler_of(loop)), PortLoop(loop)
    port.load_state_dict(upstream.state_dict())
    noise = torch.randn(2, CHANNELS, 4, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = upstream(noise, 7), port(noise, 7)
    assert [name for name, tensor in theirs.items() if not same_bits(tensor, ours[name])] == []


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    clean, noise = (torch.randn(4, CHANNELS, 4, 5, generator=generator) for _ in range(2))
    return clean, noise, torch.tensor([999, 0, 400, 87])


@pytest.mark.parametrize("dtype", LANES)
@pytest.mark.parametrize("scheduler", ["DDIM", "DDPM", "PNDM", "LCM", "TCD"])
def test_noise_and_velocities_of_a_training_step_are_equal(scheduler: str, dtype: torch.dtype) -> None:
    upstream = new_scheduler(f"{scheduler}Scheduler")
    solver: Any = solvers.from_config({"_class_name": f"{scheduler}Scheduler"}, 5)
    clean, noise, timesteps = batch()
    clean, noise = clean.to(dtype), noise.to(dtype)
    assert same_bits(upstream.add_noise(clean, noise, timesteps), solver.add_noise_at(clean, noise, timesteps))
    if hasattr(upstream, "get_velocity"):
        assert same_bits(upstream.get_velocity(clean, noise, timesteps), solver.velocity_at(clean, noise, timesteps))


@pytest.mark.parametrize("dtype", LANES)
@pytest.mark.parametrize(
    "scheduler", ["EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep"]
)
def test_noise_at_timesteps_of_the_schedule_is_equal(scheduler: str, dtype: torch.dtype) -> None:
    upstream = scheduler_of(Loop(scheduler=f"{scheduler}Scheduler", config={}, steps=1000), begin=False)
    solver: Any = solvers.from_config({"_class_name": f"{scheduler}Scheduler"}, 1000)
    clean, noise, _ = batch()
    timesteps = upstream.timesteps[[0, 3, 500, 998]]
    clean, noise = clean.to(dtype), noise.to(dtype)
    assert same_bits(upstream.add_noise(clean, noise, timesteps), solver.add_noise_at(clean, noise, timesteps))


def test_noise_along_a_straight_path_is_equal() -> None:
    loop = Loop(scheduler="FlowMatchEulerDiscreteScheduler", config={"shift": 3.0}, steps=9)
    upstream = scheduler_of(loop, begin=False)
    solver = solvers.FlowEuler(9, solvers.FlowEulerParameters(shift=3.0))
    clean, noise, _ = batch()
    timesteps = upstream.timesteps[[0, 3, 5, 8]]
    assert same_bits(upstream.scale_noise(clean, timesteps, noise), solver.add_noise_at(clean, noise, timesteps))


@pytest.mark.parametrize("scheduler", solvers.CLASSES)
def test_what_upstream_saves_is_read(scheduler: str) -> None:
    upstream = new_scheduler(scheduler)
    kind = solvers.CLASSES[scheduler].parameters_type
    assert solvers.parameters_from_config(kind, upstream.config) == kind()
    assert solvers.parameters_from_config(kind, dict(upstream.config) | {"_use_default_values": []}) == kind()


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete"])
def test_a_step_is_one_graph(name: str) -> None:
    solver = solver_of(Loop(scheduler=f"{name}Scheduler", config={}, steps=4))
    x, denoiser = batch()[0], Denoiser()
    prediction = denoiser(x, solver.timesteps[1]).detach()
    compiled = torch.compile(partial(solver.step, step=1), fullgraph=True, backend="eager")
    assert same_bits(compiled(x, prediction), solver.step(x, prediction, 1))
    torch.compiler.reset()


# Planted faults


def spoil(loop: Loop, fault: str) -> Any:
    """A port with a mistake that people make."""

    class Spoilt(PortLoop):
        def __init__(self) -> None:
            super().__init__(loop)
            FAULTS[fault](self.solver)

    return Spoilt


def set_number(name: str, step: int = 1) -> Any:
    def change(solver: Any) -> None:
        numbers = solver._numbers[step]
        solver._numbers[step] = numbers._replace(**{name: getattr(numbers, name) * 1.0001})

    return change


def set_term(name: str, step: int) -> Any:
    def change(solver: Any) -> None:
        plan = solver._plans[step]
        terms = plan.terms._replace(**{name: getattr(plan.terms, name) * 1.0001})
        solver._plans[step] = plan._replace(terms=terms)

    return change


def forget(field: str, value: Any) -> Any:
    """The state loses a field after every step."""

    def change(solver: Any) -> None:
        original = solver.step

        def step(*args: Any, **kwargs: Any) -> Tensor:
            output = original(*args, **kwargs)
            object.__setattr__(solver.state, field, value(getattr(solver.state, field)))
            return output

        solver.step = step

    return change


def draw_more(solver: Any) -> None:
    original = solver.step

    def step(x: Tensor, prediction: Tensor, step: int, generator: Any = None) -> Tensor:
        output = original(x, prediction, step, generator)
        torch.randn(1, generator=generator)
        return output

    solver.step = step


def later_timestep(solver: Any) -> None:
    solver.timesteps = solver.timesteps.clone()
    solver.timesteps[1] -= 1


FAULTS: dict[str, Any] = {
    **{name: set_number(name) for name in ("alpha", "sigma", "next_alpha", "direction", "fresh", "of_sample", "of_x")},
    **{name: set_number(name) for name in ("churned", "change", "skip", "out", "deviation", "low", "high", "divisor")},
    **{name: set_number(name) for name in ("of_noise", "middle_alpha", "middle_sigma", "kept", "next_sigma")},
    "terms of x": set_term("of_x", 3),
    "terms of level": set_term("of_level", 3),
    "terms of slope": set_term("of_slope", 3),
    "terms of bend": set_term("of_bend", 3),
    "terms of noise": set_term("of_noise", 3),
    "outputs exchanged": forget("outputs", lambda outputs: outputs[::-1]),
    "predictions exchanged": forget("predictions", lambda predictions: predictions[::-1]),
    "sample kept too long": forget("sample", lambda sample: None if sample is None else sample + 0.01),
    "slope lost": forget("slope", lambda slope: None if slope is None else slope * 0),
    "one draw more": draw_more,
    "another timestep": later_timestep,
}
WHERE: Mapping[str, Sequence[str]] = {
    "ddim-sd": ("alpha", "sigma", "next_alpha", "direction", "another timestep"),
    "ddim-eta": ("fresh", "one draw more"),
    "ddpm": ("alpha", "sigma", "of_sample", "of_x", "deviation", "one draw more"),
    "ddpm-range": ("low", "high"),
    "pndm-sd": ("of_x", "of_noise", "divisor", "predictions exchanged", "sample kept too long"),
    "pndm-prk": ("alpha", "sigma", "predictions exchanged", "sample kept too long"),
    "dpm-2m": ("terms of x", "terms of level", "terms of slope", "outputs exchanged"),
    "dpm-3m": ("terms of bend", "outputs exchanged"),
    "dpm-2m-sde": ("terms of noise", "one draw more"),
    "dpm-2s": ("terms of slope", "outputs exchanged", "sample kept too long"),
    "dpm-3s": ("terms of level", "outputs exchanged", "sample kept too long"),
    "euler-sdxl": ("churned", "change", "another timestep"),
    "euler-v": ("skip", "out"),
    "euler-a": ("fresh", "change", "one draw more"),
    "heun": ("sigma", "change", "sample kept too long", "slope lost"),
    "kdpm2": ("sigma", "change", "sample kept too long"),
    "kdpm2-a": ("fresh",),
    "lcm": ("alpha", "sigma", "skip", "out", "next_alpha", "next_sigma", "one draw more"),
    "tcd": ("alpha", "sigma", "middle_alpha", "middle_sigma", "kept", "fresh"),
    "unipc": ("outputs exchanged", "sample kept too long"),
    "flow-euler": ("another timestep",),
}


@pytest.mark.parametrize(("case", "fault"), [(case, fault) for case, faults in WHERE.items() for fault in faults])
def test_a_planted_fault_turns_its_case_red(case: str, fault: str) -> None:
    (own,) = [one for one in CASES if one.id == f"solvers/{case}"]
    loop = own.port().loop
    spoilt = replace(own, port=spoil(loop, fault), gradients=False)
    assert CaseRunner(spoilt).run(Lane("float64")).verdict is not Verdict.BITWISE  # anything else needs a line


def test_what_upstream_takes_and_fails_at_is_refused() -> None:
    for kind, values in (
        (
            solvers.DPMMultistepParameters,
            {"algorithm_type": "sde-dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"},
        ),
        (
            solvers.DPMSingleStepParameters,
            {"algorithm_type": "dpmsolver", "thresholding": True, "final_sigmas_type": "sigma_min"},
        ),
    ):
        with pytest.raises(InputError):
            kind(**values)
    with pytest.raises(InputError, match="lower_order_final=True"):
        solvers.UniPC(6, solvers.UniPCParameters(solver_order=3, lower_order_final=False))
