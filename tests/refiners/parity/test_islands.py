"""Islands of float32: another order of operations in one is rounding, and everything else in one is a fault."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiners.parity import CaseRunner, Lane, Verdict
from refiners.parity.islands import widened
from refiners.parity.measured.islands_measured import (
    REWRITES,
    Islands,
    NormByRoot,
    RopeByLogarithm,
    Setting,
    SoftmaxByHand,
    closeness_alone,
    measure,
)
from refiners.parity.torch_state import seed_torch

SETTING = Setting(16, 2)


@pytest.mark.parametrize("way", REWRITES)
def test_another_order_of_operations_inside_an_island_is_no_false_alarm(way: str) -> None:
    assert [result.reason for result in measure(SETTING, way) if result.verdict is Verdict.DIFFERENT] == []


def test_without_the_wider_truth_it_would_be_one() -> None:
    assert closeness_alone(SETTING, "norm by root") is Verdict.DIFFERENT


class OtherEps(NormByRoot):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.eps = 1e-5


class NoUpcast(NormByRoot):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + self.eps))


class OverTheWrongAxis(SoftmaxByHand):
    def forward(self, x: Tensor) -> Tensor:
        wide = torch.exp(x.to(torch.float32))
        return (wide / wide.sum(-2, keepdim=True)).to(x.dtype)


class AScaleTooMuch(SoftmaxByHand):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 1.0001)


class ThroughBfloat16(SoftmaxByHand):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.bfloat16).to(x.dtype))


class OtherBase(RopeByLogarithm):
    def angles(self, x: Tensor) -> Tensor:
        return super().angles(x) * 1.00001


FAULTS: list[tuple[str, Callable[..., nn.Module]]] = [
    ("norm", OtherEps),
    ("norm", NoUpcast),
    ("softmax", OverTheWrongAxis),
    ("softmax", AScaleTooMuch),
    ("softmax", ThroughBfloat16),
    ("rope", OtherBase),
]


@pytest.mark.parametrize(("part", "fault"), FAULTS)
def test_a_fault_inside_an_island_is_different(part: str, fault: Callable[..., nn.Module]) -> None:
    others = {**REWRITES["all"], part: fault}
    case = replace(SETTING.case("all"), port=lambda: Islands(16, **others))
    assert CaseRunner(case).run(Lane("float64")).verdict is Verdict.DIFFERENT


class ALinearInFloat32(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.to(torch.float32), self.weight.to(torch.float32)).to(input.dtype)


def test_an_island_that_only_the_port_has_is_different() -> None:
    def port() -> nn.Module:
        model = Islands(16, **REWRITES["all"])
        model.out = ALinearInFloat32(16, 16, bias=False)
        return model

    result = CaseRunner(replace(SETTING.case("all"), port=port)).run(Lane("float64"))
    assert result.verdict is Verdict.DIFFERENT
    assert any("computed in other dtypes" in reason for reason in result.reasons)


def test_inside_widened_whatever_asks_for_float32_gets_float64() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with widened():
        made = F.softmax(x, dim=-1, dtype=torch.float32)
        table = torch.arange(3, dtype=torch.float32)
        constant = torch.tensor(0.1, dtype=torch.float32)
        torch.autograd.backward([made.sum()])
    assert {made.dtype, x.to(torch.float64).dtype, table.dtype, constant.dtype} == {torch.float64}
    assert constant.item() == 0.1
    assert x.grad is not None
    assert x.grad.dtype is torch.float64


def test_inside_widened_random_numbers_are_those_of_float32() -> None:
    seed_torch(0)
    plain = torch.randn(5, dtype=torch.float32)
    seed_torch(0)
    with widened():
        wide = torch.randn(5, dtype=torch.float32)
    assert wide.dtype is torch.float64
    assert torch.equal(wide.to(torch.float32), plain)


def test_the_reason_says_what_was_done() -> None:
    result = next(iter(measure(SETTING, "all")))
    assert result.verdict is Verdict.ROUNDING
    assert "computed in float64 on both sides" in result.reason
