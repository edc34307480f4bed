"""The operators for convolutional networks, formulas and tables: each finds its place, and each fault is told."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.parity import Case, Lane
from refiners.parity.mutants.mutate import Outcome, Trial, bench
from tests.refiners.parity.toys import make_case

FLOAT64 = Lane("float64")
EQUIVALENT = {"swap-order::GatedHalf::with Lambda", "cast::::to, missing"}
"""Zeros behind a picture are zeros when they are gated; what is float64 already needs no cast to it."""


class GatedHalf(fl.Module):
    """The first half of the channels, gated by the second."""

    def forward(self, x: Tensor) -> Tensor:
        given, gate = x.chunk(2, dim=1)
        return given * torch.sigmoid(gate)


class Pyramid(fl.Chain):
    """A picture, halved and doubled again, beside its skip and under a time."""

    def __init__(self) -> None:
        super().__init__(
            fl.Conv2d(3, 16, 3, padding=1),
            fl.SetContext("pyramid", "skip"),
            GatedHalf(),
            fl.Lambda(fl_pad),
            fl.Conv2d(8, 8, 3, stride=2),
            fl.Sum(fl.Identity(), fl.UseContext("pyramid", "time")),
            fl.GroupNorm(8, 4),
            fl.SiLU(),
            fl.Parallel(fl.Identity(), fl.Lambda(lambda x: x.shape[2:].__class__([8, 10]))),
            fl.Interpolate(),
            fl.Concatenate(fl.Identity(), fl.UseContext("pyramid", "skip"), dim=1),
            fl.Conv2d(24, 3, 3, padding=1),
        )

    def init_context(self) -> dict[str, dict[str, Any]]:
        return {"pyramid": {"skip": None, "time": None}}


def fl_pad(x: Tensor) -> Tensor:
    return nn.functional.pad(x, (0, 1, 0, 1))


class UpstreamPyramid(Pyramid):
    """The same; a case does not compare a model with itself."""


def run_pyramid(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    assert isinstance(model, Pyramid)
    model.set_context("pyramid", {"time": inputs["time"]})
    return {"y": model(inputs["x"])}


def pyramid_case() -> Case:
    return make_case(
        id="toy/pyramid",
        upstream=UpstreamPyramid,
        port=Pyramid,
        inputs=lambda generator: {
            "x": torch.randn(2, 3, 8, 10, generator=generator),
            "time": torch.randn(2, 8, 1, 1, generator=generator),
        },
        run_upstream=run_pyramid,
        run_port=run_pyramid,
    )


class Numbers(NamedTuple):
    """Of one step."""

    sigma: float
    change: float


@dataclass(frozen=True)
class Parameters:
    """Of a method."""

    noise: float = 0.3
    clips: bool = False
    unread: int = 3


class Steps(fl.Module):
    """A solver: a table of noise, the numbers of each step, and what it remembers of the step before."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmas = torch.linspace(2, 0.5, 4, dtype=torch.float64)
        self.numbers = [Numbers(1.5, -0.5), Numbers(1.1, -0.3), Numbers(0.6, -0.2)]
        self.settings = Parameters()
        self.last: Tensor | None = None

    def forward(self, x: Tensor, prediction: Tensor, step: int) -> Tensor:
        own, numbers = self.settings, self.numbers[step]
        share = 1 / (self.sigmas[step].to(x.dtype) ** 2 + 1)
        slope = (x - torch.sqrt(share) * prediction) / numbers.sigma
        if step:
            assert self.last is not None
            slope = 1.5 * slope - 0.5 * self.last
        self.last = slope.detach() if slope.requires_grad else slope
        x = x + slope * numbers.change + own.noise * torch.sin(prediction)
        return x.clamp(-0.5, 0.5) if own.clips else x


class UpstreamSteps(Steps):
    """The same."""


def run_steps(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    x = inputs["x"]
    for step in range(3):
        x = model(x, torch.tanh(x + inputs["shift"]), step)
    return {"x": x}


def steps_case() -> Case:
    return make_case(
        id="toy/steps",
        upstream=UpstreamSteps,
        port=Steps,
        inputs=lambda generator: {
            "x": torch.randn(2, 5, generator=generator),
            "shift": torch.randn(2, 5, generator=generator),
        },
        run_upstream=run_steps,
        run_port=run_steps,
    )


def trials(case: Case) -> dict[str, Trial]:
    with bench(case, FLOAT64) as built:
        found = {mutant.fault: built.try_out(mutant) for mutant in built.mutants()}
        built.require_equal()
    return found


@pytest.fixture(scope="module")
def faults_of_the_pyramid() -> dict[str, Trial]:
    return trials(pyramid_case())


@pytest.fixture(scope="module")
def faults_of_the_steps() -> dict[str, Trial]:
    return trials(steps_case())


@pytest.mark.parametrize(
    "fault",
    [
        "geometry::Conv2d_1::conv2d, all padding before",
        "geometry::Conv2d_1::conv2d, padding mode reflect",
        "geometry::Conv2d_1::conv2d, dilation 2",
        "geometry::Conv2d_1::conv2d, kernel upside down",
        "geometry::Conv2d_2::conv2d, begins one pixel later",
        "group-count::GroupNorm::group_norm, 4 to 2",
        "group-count::GroupNorm::group_norm, every n-th channel",
        "padding::Lambda::pad, on the other side",
        "pieces::GatedHalf::chunk, reversed",
        "pieces::GatedHalf::chunk, every n-th",
        "resize::Interpolate::interpolate, one pixel further",
        "interpolation::Interpolate::interpolate, nearest to bilinear",
        "stored-value::SetContext::zeros",
        "stored-value::SetContext::detached",
        "used-value::Sum.UseContext::of the first item",
        "join-order::Concatenate::reversed",
    ],
)
def test_a_fault_of_a_convolutional_network_is_planted_and_told(
    fault: str, faults_of_the_pyramid: dict[str, Trial]
) -> None:
    assert faults_of_the_pyramid[fault].outcome is Outcome.KILLED


@pytest.mark.parametrize(
    "fault",
    [
        "table::::sigmas, one further",
        "table::::numbers, one before",
        "table::::numbers, sigma 1 % larger",
        "table::::numbers, change 0",
        "table::::numbers, sigma and change exchanged",
        "parameter::::settings.noise to 0.303",
        "parameter::::settings.clips to True",
        "complement::::sqrt, of 1 - x",
        "function::::sin, as cos",
        "function::::sub, as add",
        "constant::::mul 2, 1.5 to 1.515",
        "operands::::sub, exchanged",
    ],
)
def test_a_fault_of_a_solver_is_planted_and_told(fault: str, faults_of_the_steps: dict[str, Trial]) -> None:
    assert fault in faults_of_the_steps, sorted(faults_of_the_steps)
    assert faults_of_the_steps[fault].outcome is Outcome.KILLED


def test_nothing_survives_but_what_changes_nothing(
    faults_of_the_pyramid: dict[str, Trial], faults_of_the_steps: dict[str, Trial]
) -> None:
    found = {**faults_of_the_pyramid, **faults_of_the_steps}
    assert {fault for fault, trial in found.items() if trial.outcome is not Outcome.KILLED} == EQUIVALENT


def test_a_field_that_no_forward_reads_is_not_spoilt(faults_of_the_steps: dict[str, Trial]) -> None:
    assert not [fault for fault in faults_of_the_steps if "unread" in fault]


def test_what_only_a_later_step_calls_is_spoilt_as_well(faults_of_the_steps: dict[str, Trial]) -> None:
    assert any("0.5 to 0.505" in fault for fault in faults_of_the_steps)
