"""Where a solver evaluates the denoiser: timesteps of the training, or noise levels spaced by themselves.

Follows table 2 of arXiv:2305.08891 for timesteps; arXiv:2206.00364 (Karras), arXiv:2407.12173 (beta) and
arXiv:2211.01095 (Lu) for noise levels, as the schedulers of diffusers 0.42.1 compute them: in NumPy's float64, with
NumPy's functions, for torch's differ from them in the last bit.
"""

import math

import numpy as np

from reference_ports.solvers.parameters import SigmaSpacingParameters, TimestepSpacing
from refiners.errors import InputError

Grid = np.ndarray
"""Numbers along time, from the noisiest on."""


def spaced_timesteps(
    spacing: TimestepSpacing, num_train: int, count: int, *, offset: int = 0, last: int | None = None, extra: int = 0
) -> Grid:
    """Timesteps in float64, from the noisiest on. Those of `linspace` are not rounded yet.

    Receives:
        num_train: timesteps of the training.
        count: how many are wanted. `trailing` may give one more where `count` does not divide `num_train`.
        offset: added to the timesteps of `leading`.
        last: the timesteps end below it; `num_train` unless given.
        extra: how many more the grid has at its clean end, which are left out.
    """
    last = num_train if last is None else last
    if spacing == "linspace":
        return np.linspace(0, last - 1, count + extra)[::-1][:count]
    if spacing == "leading":
        return (np.arange(count + extra) * (last // (count + extra)))[::-1][:count].astype(np.float64) + offset
    return np.arange(last, 0, -num_train / count).round() - 1


def karras(largest: float, smallest: float, count: int) -> Grid:
    """σ whose seventh roots are evenly spaced (equation 5 of arXiv:2206.00364)."""
    rho = 7.0
    start, end = largest ** (1 / rho), smallest ** (1 / rho)
    return (start + np.linspace(0, 1, count) * (end - start)) ** rho


def exponential(largest: float, smallest: float, count: int) -> Grid:
    """σ whose logarithms are evenly spaced.

    Raises:
        InputError: one of the bounds has no logarithm.
    """
    if smallest <= 0 or largest <= 0:
        raise InputError(f"use_exponential_sigmas needs σ above 0, and they run from {largest:g} to {smallest:g}.")
    return np.exp(np.linspace(math.log(largest), math.log(smallest), count))


def beta(largest: float, smallest: float, count: int) -> Grid:
    """σ at the quantiles of a beta distribution (arXiv:2407.12173). Needs scipy."""
    from scipy.stats import beta as distribution  # pyright: ignore[reportMissingTypeStubs]: scipy has none

    quantiles = 1 - np.linspace(0, 1, count)
    shares = [float(distribution.ppf(quantile, 0.6, 0.6)) for quantile in quantiles]  # pyright: ignore[reportUnknownMemberType]: no stubs
    return np.array([smallest + share * (largest - smallest) for share in shares])


def lu(largest: float, smallest: float, count: int) -> Grid:
    """σ whose half log-SNRs are evenly spaced, as the paper on DPM-Solver++ has them. Takes and gives logarithms."""
    return largest + np.linspace(0, 1, count) * (smallest - largest)


def respaced(parameters: SigmaSpacingParameters, largest: float, smallest: float, count: int) -> Grid | None:
    """The noise levels that the parameters ask for, or None where they follow the timesteps.

    Receives:
        largest, smallest: their bounds, unless the parameters have their own.
    """
    largest = largest if parameters.sigma_max is None else parameters.sigma_max
    smallest = smallest if parameters.sigma_min is None else parameters.sigma_min
    if parameters.use_karras_sigmas:
        return karras(largest, smallest, count)
    if parameters.use_exponential_sigmas:
        return exponential(largest, smallest, count)
    if parameters.use_beta_sigmas:
        return beta(largest, smallest, count)
    return None


def timestep_of(sigma: np.floating, log_sigmas: Grid, integer: type[np.number] = np.int64) -> np.ndarray:
    """The timestep, with a fraction, at which the training has that much noise.

    Receives:
        sigma: a scalar of NumPy: its dtype decides that of the logarithms.
        log_sigmas: ln σ at every timestep.
        integer: the dtype of the two timesteps that the result lies between, which decides that of the result.
    """
    log_sigma = np.log(np.maximum(sigma, 1e-10))
    low = integer(np.cumsum(log_sigma - log_sigmas >= 0).argmax().clip(max=len(log_sigmas) - 2))
    high = low + integer(1)
    above, below = log_sigmas[int(low)], log_sigmas[int(high)]
    share = np.clip((above - log_sigma) / (above - below), 0, 1)
    return (1 - share) * low + share * high


def timesteps_of(sigmas: Grid, log_sigmas: Grid) -> Grid:
    """The timesteps of several noise levels."""
    return np.array([timestep_of(sigma, log_sigmas) for sigma in sigmas])


def shifted_in_time(kind: str, mu: float, sigmas: Grid) -> Grid:
    """σ of a straight path moved towards noise by a shift that depends on the size of the sample (arXiv:2403.03206)."""
    shift = math.exp(mu) if kind == "exponential" else mu
    return shift / (shift + (1 / sigmas - 1) ** 1.0)


def stretched(sigmas: Grid, last: float) -> Grid:
    """σ of a straight path stretched so that they end where they should."""
    kept = 1 - sigmas
    return 1 - kept / (kept[-1] / (1 - last))
