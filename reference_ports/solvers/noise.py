"""How much noise the training adds at each timestep.

A training step t mixes in a share β_t of noise; what is left of the clean sample after t steps is ᾱ_t = Π (1 - β).
Follows arXiv:2006.11239, arXiv:2102.09672 (cosine) and arXiv:2305.08891 (zero terminal SNR), as the schedulers of
diffusers 0.42.1 compute them. Everything is float32 on the CPU, whatever torch's default dtype and device are.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reference_ports.solvers.parameters import BetaParameters, ZeroTerminalSNRParameters
from refiners.errors import InputError

FLOAT32: Mapping[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Where and in what the numbers of a schedule are computed."""

Betas = Float[Tensor, "timesteps"]

SMALLEST_ALPHA = 2**-24
"""Stands for ᾱ = 0 where a solver divides by it: the smallest number of float16."""


def _laplace(time: float) -> float:
    lambda_ = -0.5 * math.copysign(1, 0.5 - time) * math.log(1 - 2 * math.fabs(0.5 - time) + 1e-6)
    snr = math.exp(lambda_)
    return math.sqrt(snr / (1 + snr))


def _cosine(time: float) -> float:
    return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2


def _exponential(time: float) -> float:
    return math.exp(time * -12.0)


def _falling(alpha_bar: Callable[[float], float], count: int) -> Betas:
    """Betas whose ᾱ follows a function of time, which runs from 0 to 1."""
    steps = ((i / count, (i + 1) / count) for i in range(count))
    return torch.tensor([min(1 - alpha_bar(end) / alpha_bar(start), 0.999) for start, end in steps], **FLOAT32)


def betas_of(parameters: BetaParameters) -> Betas:
    """The betas of the training."""
    start, end, count = parameters.beta_start, parameters.beta_end, parameters.num_train_timesteps
    if parameters.trained_betas is not None:
        if len(parameters.trained_betas) != count:
            raise InputError(
                f"trained_betas holds {len(parameters.trained_betas)} numbers, num_train_timesteps is {count}. "
                "Give one beta per timestep."
            )
        return torch.tensor(parameters.trained_betas, **FLOAT32)
    schedules: dict[str, Callable[[], Betas]] = {
        "linear": lambda: torch.linspace(start, end, count, **FLOAT32),
        "scaled_linear": lambda: torch.linspace(start**0.5, end**0.5, count, **FLOAT32) ** 2,
        "squaredcos_cap_v2": lambda: _falling(_cosine, count),
        "laplace": lambda: _falling(_laplace, count),
        "exp": lambda: _falling(_exponential, count),
        "sigmoid": lambda: torch.sigmoid(torch.linspace(-6, 6, count, **FLOAT32)) * (end - start) + start,
    }
    return schedules[parameters.beta_schedule]()


def with_zero_terminal_snr(betas: Betas) -> Betas:
    """Betas moved so that nothing of the sample is left at the last timestep (algorithm 1 of arXiv:2305.08891)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0], root[-1]
    alphas_cumprod = ((root - last) * (first / (first - last))) ** 2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


def alphas_cumprod_of(parameters: BetaParameters, *, never_zero: bool = False) -> Betas:
    """ᾱ at every timestep of the training, from almost 1 down to almost 0.

    Receives:
        never_zero: whether the last one, which zero terminal SNR makes 0, is `SMALLEST_ALPHA` instead.
    """
    betas = betas_of(parameters)
    if not (isinstance(parameters, ZeroTerminalSNRParameters) and parameters.rescale_betas_zero_snr):
        return torch.cumprod(1.0 - betas, dim=0)
    alphas_cumprod = torch.cumprod(1.0 - with_zero_terminal_snr(betas), dim=0)
    if never_zero:
        alphas_cumprod[-1] = SMALLEST_ALPHA
    return alphas_cumprod


def sigmas_of(alphas_cumprod: Betas) -> np.ndarray:
    """σ = √((1 - ᾱ) / ᾱ) at every timestep: the noise beside a sample of its full size (arXiv:2206.00364)."""
    return (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).numpy()


def each(function: Callable[[Tensor], Tensor], values: Float[Tensor, "steps"]) -> Float[Tensor, "steps"]:
    """A function of every number by itself. Over many at once exp and log take other paths, and give other bits."""
    return torch.stack([function(value) for value in values])
