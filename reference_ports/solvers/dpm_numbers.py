"""The numbers of DPM-Solver: what one step multiplies the sample, the predictions and fresh noise by.

Follows arXiv:2206.00927 (DPM-Solver), arXiv:2211.01095 (DPM-Solver++ and its SDE form) and diffusers 0.42.1.

A sample is x = α x₀ + σ ε, and λ = ln α - ln σ falls with time. A step of length h in λ is

    x ← X x + B₀ D₀ + B₁ D₁ + B₂ D₂ + F ε

where D₀ is a prediction, D₁ and D₂ its first differences in λ, and ε fresh noise. Upstream subtracts what is added here
with the other sign, which is the same to the last bit.
"""

from typing import Literal, NamedTuple

import torch

from reference_ports.solvers.prediction import Number, Sample

Algorithm = Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"]
"""++ for the form in the clean sample instead of the noise; sde for fresh noise in every step."""

SolverType = Literal["midpoint", "heun"]
"""How the step of second order weighs the difference of two predictions."""


class Level(NamedTuple):
    """A point on the path from noise to sample."""

    alpha: Number
    sigma: Number
    lambda_: Number


class Terms(NamedTuple):
    """What the terms of one step are multiplied by."""

    of_x: Number
    of_level: Number
    of_slope: Number
    of_bend: Number
    of_noise: Number


def level_of(sigma: Number, *, flow: bool) -> Level:
    """The point of the path at a noise level. On a straight path (`flow`) α = 1 - σ."""
    if flow:
        alpha, deviation = 1 - sigma, sigma
    else:
        alpha = 1 / ((sigma**2 + 1) ** 0.5)
        deviation = sigma * alpha
    return Level(alpha, deviation, torch.log(alpha) - torch.log(deviation))


def terms_of(algorithm: Algorithm, solver_type: SolverType, order: int, start: Level, end: Level) -> Terms:
    """The numbers of a step between two points."""
    h = end.lambda_ - start.lambda_
    none = torch.zeros_like(h)
    if algorithm == "sde-dpmsolver++":
        gain = 1 - torch.exp(-2.0 * h)
        of_x, size = end.sigma / start.sigma * torch.exp(-h), end.alpha
        slope, bend = size * (gain / (-2.0 * h) + 1.0), size * ((gain - 2.0 * h) / (2.0 * h) ** 2 - 0.5)
        return Terms(of_x, size * gain, _middle(solver_type, order, size * gain, slope), bend, end.sigma * gain.sqrt())
    if algorithm == "dpmsolver++":
        gain, size = torch.exp(-h) - 1.0, end.alpha
        slope, bend = size * (gain / h + 1.0), -(size * ((gain + h) / h**2 - 0.5))
        half = _middle(solver_type, order, -(size * gain), slope)
        return Terms(end.sigma / start.sigma, -(size * gain), half, bend, none)
    gain, size = torch.exp(h) - 1.0, end.sigma
    slope, bend = -(size * (gain / h - 1.0)), -(size * ((gain - h) / h**2 - 0.5))
    twice = 2.0 if algorithm == "sde-dpmsolver" else 1.0
    noise = size * torch.sqrt(torch.exp(2 * h) - 1.0) if algorithm == "sde-dpmsolver" else none
    half = _middle(solver_type, order, twice * -(size * gain), twice * slope)
    return Terms(end.alpha / start.alpha, twice * -(size * gain), half, bend, noise)


def _middle(solver_type: SolverType, order: int, of_level: Number, of_slope: Number) -> Number:
    return 0.5 * of_level if order == 2 and solver_type == "midpoint" else of_slope


def advanced(terms: Terms, x: Sample, *differences: Sample, noise: Sample | None = None) -> Sample:
    """The sample at the end of a step, from D₀, D₁, D₂ as far as they are given."""
    x = terms.of_x * x
    for factor, difference in zip(terms[1:], differences, strict=False):
        x = x + factor * difference
    return x if noise is None else x + terms.of_noise * noise
