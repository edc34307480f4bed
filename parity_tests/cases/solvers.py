"""Solvers: the schedulers of diffusers beside `reference_ports.solvers`, in whole sampling loops."""

from typing import Any

import torch

from parity_tests.schedulers import Config, Loop, Seeds, loop_case
from refiners.parity import Case

SD: Config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The noise of Stable Diffusion."""
LEADING: Config = {**SD, "timestep_spacing": "leading", "steps_offset": 1}
COSINE: Config = {"beta_schedule": "squaredcos_cap_v2"}
V: Config = {"prediction_type": "v_prediction"}
SAMPLE: Config = {"prediction_type": "sample"}
ZERO_SNR: Config = {"rescale_betas_zero_snr": True}
TRAILING: Config = {"timestep_spacing": "trailing"}
KARRAS: Config = {"use_karras_sigmas": True}
TO_SIGMA_MIN: Config = {"final_sigmas_type": "sigma_min"}

OWN_BETAS = [0.001 + 0.00002 * i for i in range(1000)]

CASES: list[Case] = []


def add(scheduler: str, name: str, summary: str, *configs: Config, seeds: Seeds = 7, **loop: Any) -> None:
    """One more case: a scheduler with attributes of its configuration."""
    merged = {key: value for config in configs for key, value in config.items()}
    CASES.append(loop_case(name, summary, Loop(scheduler=f"{scheduler}Scheduler", config=merged, **loop), seeds))


DDIM_SD: Config = {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
add("DDIM", "ddim-sd", "DDIM as Stable Diffusion has it", DDIM_SD)
add("DDIM", "ddim-eta", "fresh noise, a clipped sample", TRAILING, options={"eta": 0.7}, stochastic=True)
add(
    "DDIM",
    "ddim-v",
    "velocities, no signal at the noisiest timestep",
    SD,
    V,
    ZERO_SNR,
    TRAILING,
    {"clip_sample": False},
)
THRESHOLDING = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
add("DDIM", "ddim-thresholding", "dynamic thresholding", COSINE, THRESHOLDING, {"timestep_spacing": "linspace"}, SAMPLE)
CLIPPED_NOISE = {"use_clipped_model_output": True, "eta": 1.0}
NARROW = {"clip_sample_range": 0.5, "trained_betas": OWN_BETAS}
add("DDIM", "ddim-clipped-noise", "noise of the clipped sample", NARROW, options=CLIPPED_NOISE, stochastic=True)
add("DDIM", "ddim-later", "a later first step", DDIM_SD, first=2)
add("DDIM", "ddim-last", "the last step alone, at timestep 0", SD, first=4)

add("DDPM", "ddpm", "the variance of the posterior", stochastic=True)
add("DDPM", "ddpm-log", "its logarithm", COSINE, {"variance_type": "fixed_small_log"}, V, stochastic=True, seeds=(1, 2))
LARGE = {"variance_type": "fixed_large", "timestep_spacing": "linspace", "clip_sample": False}
add(
    "DDPM",
    "ddpm-large",
    "β as variance, betas of a sigmoid",
    {"beta_schedule": "sigmoid"},
    LARGE,
    SAMPLE,
    stochastic=True,
)
RANGE = {"variance_type": "learned_range", "beta_schedule": "laplace", **TRAILING, **THRESHOLDING}
add("DDPM", "ddpm-range", "a variance between two bounds", RANGE, learned=True, stochastic=True)
OWN_TIMESTEPS = {"timesteps": [900, 400, 399, 20, 0]}
LEARNED = {"variance_type": "learned", **ZERO_SNR}
add(
    "DDPM",
    "ddpm-own",
    "timesteps of one's own",
    LEARNED,
    learned=True,
    stochastic=True,
    steps=None,
    schedule=OWN_TIMESTEPS,
)

PNDM_SD: Config = {**SD, "skip_prk_steps": True, "steps_offset": 1}
add("PNDM", "pndm-sd", "PNDM as Stable Diffusion has it", PNDM_SD)
add("PNDM", "pndm-prk", "Runge-Kutta steps first", V, TRAILING, {"set_alpha_to_one": True}, steps=7)
add("PNDM", "pndm-later", "a later first step", PNDM_SD, {"timestep_spacing": "linspace"}, first=2, steps=8)

DPM = "DPMSolverMultistep"
SDE: Config = {"algorithm_type": "sde-dpmsolver++"}
add(DPM, "dpm-2m", "DPM-Solver++ 2M", SD)
add(
    DPM,
    "dpm-2m-karras",
    "noise levels of Karras, a last step of first order",
    SD,
    KARRAS,
    {"euler_at_final": True},
    TO_SIGMA_MIN,
)
HEUN: Config = {"solver_type": "heun"}
add(
    DPM, "dpm-2m-heun", "the other second order", LEADING, HEUN, V, ZERO_SNR, TO_SIGMA_MIN, {"lower_order_final": False}
)
THIRD: Config = {"solver_order": 3}
add(DPM, "dpm-3m", "third order", SD, THIRD, TRAILING, {**THRESHOLDING, **SAMPLE}, steps=6)
add(DPM, "dpm-3m-long", "steps enough to end in full order", THIRD, TO_SIGMA_MIN, steps=16)
add(DPM, "dpm-2m-sde", "fresh noise", SD, SDE, {"use_exponential_sigmas": True}, stochastic=True)
add(
    DPM,
    "dpm-2m-sde-heun",
    "fresh noise in the other second order",
    SDE,
    HEUN,
    COSINE,
    {"lambda_min_clipped": -5.1},
    stochastic=True,
    seeds=(3, 4),
)
add(
    DPM,
    "dpm-3m-sde",
    "fresh noise in third order",
    SDE,
    THIRD,
    {"use_lu_lambdas": True},
    TO_SIGMA_MIN,
    stochastic=True,
    steps=6,
)
PLAIN: Config = {"algorithm_type": "dpmsolver", **TO_SIGMA_MIN}
add(
    DPM,
    "dpm-noise",
    "DPM-Solver on the noise",
    PLAIN,
    SD,
    {"variance_type": "learned"},
    {"use_beta_sigmas": True},
    learned=True,
)
add(DPM, "dpm-noise-heun", "its other second order", PLAIN, HEUN, V, THRESHOLDING)
add(DPM, "dpm-noise-3", "its third order", PLAIN, THIRD, SAMPLE, steps=6)
PLAIN_SDE: Config = {"algorithm_type": "sde-dpmsolver", **TO_SIGMA_MIN}
add(DPM, "dpm-noise-sde", "fresh noise beside the predicted", PLAIN_SDE, stochastic=True)
add(DPM, "dpm-noise-sde-heun", "in the other second order", PLAIN_SDE, HEUN, COSINE, KARRAS, stochastic=True)
FLOW: Config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
add(DPM, "dpm-flow", "a straight path", FLOW)
DYNAMIC: Config = {"use_dynamic_shifting": True}
add(DPM, "dpm-flow-later", "a straight path with a shift for the size", FLOW, DYNAMIC, options={"mu": 0.7}, first=1)
add(DPM, "dpm-own", "timesteps of one's own", SD, steps=None, schedule={"timesteps": [900, 500, 77, 3]})
add(DPM, "dpm-later", "a later first step", SD, THIRD, COSINE, {"use_lu_lambdas": True}, first=2, steps=7)

SINGLE = "DPMSolverSinglestep"
add(SINGLE, "dpm-2s", "single steps of second order", SD)
add(SINGLE, "dpm-2s-heun", "the other second order", HEUN, V, KARRAS, TO_SIGMA_MIN, steps=4)
add(SINGLE, "dpm-3s", "single steps of third order", SD, THIRD, {"lower_order_final": True}, SAMPLE, steps=6)
add(SINGLE, "dpm-3s-heun", "the other third order", THIRD, HEUN, TO_SIGMA_MIN, THRESHOLDING, steps=6)
add(SINGLE, "dpm-2s-sde", "fresh noise", SDE, {"use_exponential_sigmas": True}, stochastic=True)
add(SINGLE, "dpm-3s-sde-heun", "fresh noise in third order", SDE, THIRD, HEUN, TO_SIGMA_MIN, stochastic=True, steps=6)
add(
    SINGLE,
    "dpm-3s-sde",
    "in the other one, clipped",
    SDE,
    THIRD,
    TO_SIGMA_MIN,
    COSINE,
    {"lambda_min_clipped": -5.1},
    stochastic=True,
    steps=6,
)
add(SINGLE, "dpm-single-noise", "single steps on the noise", PLAIN, THIRD, V, {"use_beta_sigmas": True}, steps=6)
add(SINGLE, "dpm-single-noise-heun", "in the other third order", PLAIN, THIRD, HEUN, SAMPLE, steps=6)
add(
    SINGLE,
    "dpm-single-noise-2",
    "in second order",
    PLAIN,
    {"variance_type": "learned_range"},
    HEUN,
    steps=4,
    learned=True,
)
add(SINGLE, "dpm-single-flow", "a straight path", FLOW, DYNAMIC, options={"mu": 0.7}, steps=4)
add(SINGLE, "dpm-single-later", "a later first step", SD, THIRD, first=2, steps=7)

EULER = "EulerDiscrete"
CHURN = {"s_churn": 3.0, "s_tmin": 0.5, "s_tmax": 10.0, "s_noise": 1.003}
add(EULER, "euler-sdxl", "Euler as Stable Diffusion XL has it", LEADING)
add(
    EULER,
    "euler-karras-churn",
    "noise levels of Karras, noise added on the way",
    SD,
    KARRAS,
    options=CHURN,
    stochastic=True,
)
add(
    EULER,
    "euler-v",
    "velocities at continuous timesteps",
    V,
    ZERO_SNR,
    TRAILING,
    {"timestep_type": "continuous"},
    steps=6,
)
BOUNDS = {"sigma_min": 0.1, "sigma_max": 12.0}
add(
    EULER,
    "euler-exponential",
    "noise levels within bounds",
    {"use_exponential_sigmas": True, **BOUNDS},
    TO_SIGMA_MIN,
    SAMPLE,
)
add(
    EULER,
    "euler-log-linear",
    "ln σ evenly spaced",
    {"interpolation_type": "log_linear"},
    options={**CHURN, "s_churn": 0.5},
    stochastic=True,
    seeds=(5, 6),
)
add(EULER, "euler-beta", "σ at quantiles of a beta distribution", COSINE, {"use_beta_sigmas": True})
add(
    EULER,
    "euler-own-timesteps",
    "timesteps of one's own",
    SD,
    V,
    steps=None,
    schedule={"timesteps": [999.0, 400.5, 3.0]},
)
add(
    EULER, "euler-own-sigmas", "σ of one's own", SD, steps=None, schedule={"sigmas": [14.615, 3.861, 0.963, 0.152, 0.0]}
)
add(EULER, "euler-later", "a later first step", SD, first=2)

ANCESTRAL = "EulerAncestralDiscrete"
add(ANCESTRAL, "euler-a", "Euler with fresh noise", LEADING, stochastic=True)
add(ANCESTRAL, "euler-a-v", "velocities", V, ZERO_SNR, TRAILING, stochastic=True, steps=6)

HEUN_SD: Config = {**SD, "timestep_spacing": "leading"}
add("HeunDiscrete", "heun", "Heun", HEUN_SD)
add("HeunDiscrete", "heun-v", "velocities, clipped", V, KARRAS, {"clip_sample": True, "clip_sample_range": 0.8})
add("HeunDiscrete", "heun-exp", "betas that fall exponentially", {"beta_schedule": "exp"}, SAMPLE, TRAILING)
add("HeunDiscrete", "heun-own", "timesteps of one's own", SD, steps=None, schedule={"timesteps": [999, 400, 3]})
add("HeunDiscrete", "heun-later", "a later first step", SD, first=2)

add("KDPM2Discrete", "kdpm2", "KDPM2", SD, {"timestep_spacing": "leading", "steps_offset": 1})
add("KDPM2Discrete", "kdpm2-v", "velocities", V, KARRAS)
add("KDPM2Discrete", "kdpm2-later", "a later first step", COSINE, {"use_exponential_sigmas": True}, first=2)
add("KDPM2AncestralDiscrete", "kdpm2-a", "KDPM2 with fresh noise", SD, TRAILING, stochastic=True)
add("KDPM2AncestralDiscrete", "kdpm2-a-v", "velocities", V, KARRAS, stochastic=True, first=2)

add("LCM", "lcm", "latent consistency sampling", SD, stochastic=True, steps=4)
LCM_OTHER = {"original_inference_steps": 40, "timestep_scaling": 8.0, "clip_sample": True}
add("LCM", "lcm-v", "velocities, clipped", V, ZERO_SNR, LCM_OTHER, stochastic=True, steps=4, options={"strength": 0.6})
add(
    "LCM",
    "lcm-own",
    "timesteps of one's own",
    SAMPLE,
    THRESHOLDING,
    stochastic=True,
    steps=None,
    schedule={"timesteps": [999, 499, 19]},
)
add("LCM", "lcm-later", "a later first step", SD, stochastic=True, steps=4, first=1)
add("TCD", "tcd", "trajectory consistency sampling", SD, stochastic=True, steps=4, options={"eta": 0.3})
add("TCD", "tcd-path", "along the path, velocities", V, stochastic=True, steps=4, options={"eta": 0.0, "strength": 0.6})
add("TCD", "tcd-jump", "to the end and back", SAMPLE, stochastic=True, steps=4, options={"eta": 1.0})

UNIPC = "UniPCMultistep"
add(UNIPC, "unipc", "UniPC", SD)
add(
    UNIPC,
    "unipc-3",
    "third order, B(h) = h",
    LEADING,
    THIRD,
    {"solver_type": "bh1"},
    TO_SIGMA_MIN,
    V,
    ZERO_SNR,
    steps=7,
)
add(
    UNIPC,
    "unipc-3-bh2",
    "third order to the end",
    THIRD,
    TO_SIGMA_MIN,
    {"lower_order_final": False, "disable_corrector": [1]},
    {**TRAILING, **THRESHOLDING},
    steps=6,
)
add(UNIPC, "unipc-1", "first order", {"solver_order": 1}, KARRAS, BOUNDS, SAMPLE)
add(UNIPC, "unipc-noise", "on the noise", {"predict_x0": False}, TO_SIGMA_MIN, {"use_exponential_sigmas": True})
add(
    UNIPC,
    "unipc-noise-v",
    "on the noise, from velocities",
    {"predict_x0": False},
    TO_SIGMA_MIN,
    V,
    THIRD,
    COSINE,
    {"use_beta_sigmas": True},
    steps=6,
)
add(UNIPC, "unipc-noise-sample", "on the noise, from samples", {"predict_x0": False}, TO_SIGMA_MIN, SAMPLE, first=1)
add(UNIPC, "unipc-flow", "a straight path from its very beginning", FLOW, {"flow_shift": 1.0})
add(
    UNIPC,
    "unipc-flow-mu",
    "a shift for the size, a last σ",
    FLOW,
    DYNAMIC,
    {"shift_terminal": 0.1},
    TO_SIGMA_MIN,
    options={"mu": 0.7},
    first=1,
)
add(UNIPC, "unipc-flow-linear", "the other shift", FLOW, DYNAMIC, {"time_shift_type": "linear"}, options={"mu": 0.7})
add(UNIPC, "unipc-flow-karras", "σ of Karras along a straight path", FLOW, KARRAS, TO_SIGMA_MIN)

MATCHING = "FlowMatchEulerDiscrete"
add(MATCHING, "flow-euler", "straight paths, shifted twice", {"shift": 3.0})
add(
    MATCHING,
    "flow-euler-mu",
    "a shift for the size, a last σ",
    DYNAMIC,
    {"shift_terminal": 0.1},
    options={"mu": 0.7},
    first=2,
)
add(
    MATCHING,
    "flow-euler-linear",
    "the other shift, drawn anew",
    DYNAMIC,
    {"time_shift_type": "linear", "stochastic_sampling": True},
    options={"mu": 0.7},
    stochastic=True,
)
add(MATCHING, "flow-euler-inverted", "from sample to noise", {"shift": 1.5, "invert_sigmas": True}, KARRAS)
add(
    MATCHING,
    "flow-euler-own-sigmas",
    "σ of one's own",
    {"shift": 1.5},
    steps=None,
    schedule={"sigmas": [1.0, 0.7, 0.2]},
)
add(
    MATCHING,
    "flow-euler-own-timesteps",
    "timesteps of one's own",
    {"shift": 1.5},
    steps=None,
    schedule={"timesteps": [1000.0, 700.0, 200.0]},
)
add(MATCHING, "flow-euler-spaced", "σ spaced by themselves", {"use_exponential_sigmas": True})

# A denoiser that computes in another dtype than the sample has.
FLOAT32: dict[str, Any] = {"prediction": torch.float32}
add(UNIPC, "unipc-mixed", "predictions in float32, cut off at a threshold", SD, THRESHOLDING, **FLOAT32)
add(DPM, "dpm-2m-mixed", "predictions in float32", SD, SDE, **FLOAT32, stochastic=True)
add(SINGLE, "dpm-2s-mixed", "predictions in float32", SD, **FLOAT32)
add(EULER, "euler-mixed", "predictions in float32", SD, **FLOAT32)
add(ANCESTRAL, "euler-a-mixed", "predictions in float32", SD, **FLOAT32, stochastic=True)
add(
    "DDPM",
    "ddpm-mixed",
    "predictions in float32",
    SD,
    {"variance_type": "learned_range"},
    **FLOAT32,
    learned=True,
    stochastic=True,
)
add("LCM", "lcm-mixed", "predictions in float32", SD, **FLOAT32, stochastic=True, steps=4)
add(MATCHING, "flow-euler-mixed", "predictions in float32", {"stochastic_sampling": True}, **FLOAT32, stochastic=True)
