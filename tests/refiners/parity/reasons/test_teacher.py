"""What the leaves of a port are taught: in their own layout, and not again what was found wrong before."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.weights import fill_informative

LANE = Lane("float32")


class ChannelNorm(nn.Module):
    """A norm over the last axis, or over the channels of a picture, with the moves inside."""

    def __init__(self, *, is_inside: bool, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.is_inside, self.eps = nn.Parameter(torch.ones(8)), is_inside, eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1) if self.is_inside else x
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return x.movedim(-1, 1) if self.is_inside else x


class Picture(nn.Module):
    """A linear layer on pixels between two norms."""

    def __init__(self, *, is_inside: bool, eps: float = 1e-6) -> None:
        super().__init__()
        self.one, self.two = (ChannelNorm(is_inside=is_inside, eps=eps) for _ in range(2))
        self.mix = nn.Linear(8, 8)

    def normed(self, norm: ChannelNorm, x: Tensor) -> Tensor:
        return norm(x) if norm.is_inside else norm(x.movedim(1, -1)).movedim(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.one, x)
        return self.normed(self.two, self.mix(x.movedim(1, -1)).movedim(-1, 1))


class Layer(nn.Module):
    """A residual block whose sum no leaf returns."""

    def __init__(self, *, is_wrong: bool) -> None:
        super().__init__()
        self.up, self.down, self.is_wrong = nn.Linear(8, 12), nn.Linear(12, 8), is_wrong

    def forward(self, x: Tensor) -> Tensor:
        branch = self.down(self.up(x).relu())
        return x + (branch.relu() if self.is_wrong else branch)


class Layers(nn.Module):
    """Four blocks, of which some are wrong."""

    def __init__(self, *wrong: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(is_wrong=number in wrong) for number in range(4))
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def explained(upstream: nn.Module, port: nn.Module, x: Tensor) -> Explanation:
    with held_equal(LANE):
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)

        def run(model: nn.Module) -> dict[str, Tensor]:
            return {"y": model(x.clone())}

        return explain_modules(upstream, port, partial(run, upstream.eval()), partial(run, port.eval()))


@pytest.mark.parametrize("shape", [(2, 8, 4, 6), (2, 8, 8, 8), (2, 8, 8)])
def test_a_norm_that_moves_axes_by_itself_is_not_blamed(shape: tuple[int, ...]) -> None:
    x = torch.linspace(-3, 3, torch.Size(shape).numel()).sin().view(shape)
    assert explained(Picture(is_inside=False), Picture(is_inside=True), x).faults == []


@pytest.mark.parametrize("shape", [(2, 8, 4, 6), (2, 8, 8, 8)])
def test_its_fault_is_named(shape: tuple[int, ...]) -> None:
    x = torch.linspace(-3, 3, torch.Size(shape).numel()).sin().view(shape)
    faults = explained(Picture(is_inside=False), Picture(is_inside=True, eps=1e-3), x).faults
    assert [fault.finding.port for fault in faults] == ["one", "two"]
    assert all("1e-06" in fault.diagnosis for fault in faults), faults


@pytest.mark.parametrize("wrong", [(0,), (1, 3), (0, 1, 2, 3)])
def test_a_sum_that_carries_an_earlier_fault_on_is_not_blamed(wrong: tuple[int, ...]) -> None:
    x = torch.linspace(-3, 3, 48).sin().view(6, 8)
    faults = explained(Layers(), Layers(*wrong), x).faults
    assert [fault.finding.port for fault in faults] == [f"layers.{number}" for number in wrong]
    assert all(fault.diagnosis.startswith("without `relu(") for fault in faults), faults
