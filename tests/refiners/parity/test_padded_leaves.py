"""A convolution that pads, beside one in front of which the port pads by itself."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refiners.parity.explain import Explanation
from tests.refiners.parity.toys import explained_pair

X = torch.linspace(-2, 2, 2 * 9 * 8, dtype=torch.float64).sin().view(2, 9, 8)


class Upstream(nn.Module):
    """Two blocks: a gate, and a convolution along time."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.taps = nn.ModuleList(nn.Conv1d(8, 8, 5, padding=2, groups=8) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def gated(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * gate.sigmoid()

    def convolved(self, x: Tensor, taps: nn.Module) -> Tensor:
        return taps(x.mT).mT

    def forward(self, x: Tensor) -> Tensor:
        for wide, taps, down in zip(self.wide, self.taps, self.down, strict=True):
            x = x + down(F.silu(self.convolved(self.gated(wide(x)), taps)))
        return x


class Port(Upstream):
    """The same: the sides are padded before the convolution."""

    sides = (2, 2)
    is_crossed = False

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.ModuleList(nn.Conv1d(8, 8, 5, groups=8) for _ in range(2))

    def gated(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return gate * value.sigmoid() if self.is_crossed else super().gated(x)

    def convolved(self, x: Tensor, taps: nn.Module) -> Tensor:
        return taps(F.pad(x.mT, self.sides)).mT


KEYS = {key: key for key in Upstream().state_dict()}


def explained(**faults: object) -> Explanation:
    port = Port()
    for name, value in faults.items():
        setattr(port, name, value)
    return explained_pair(Upstream(), port, KEYS, [X])


def test_a_port_that_pads_before_a_convolution_is_right() -> None:
    assert not explained().faults


def test_a_mistake_elsewhere_is_told_alone() -> None:
    found = explained(is_crossed=True)
    assert found.faults
    assert all("exchanged" in fault.diagnosis for fault in found.faults)


@pytest.mark.parametrize("sides", [(4, 0), (0, 4)])
def test_sides_that_are_padded_otherwise_are_told(sides: tuple[int, int]) -> None:
    found = explained(sides=sides)
    assert found.faults
    assert all("pad" in fault.diagnosis for fault in found.faults), [fault.diagnosis for fault in found.faults]
