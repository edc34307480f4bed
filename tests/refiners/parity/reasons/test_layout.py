"""Axes that are joined in the other order, and a padding on the other side, before more is done with them."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.reasons.layout import joined_axis
from refiners.parity.weights import fill_informative
from tests.refiners.parity.toys import explained_pair

PLACES = torch.linspace(-1, 1, 3 * 2 * 7).sin().view(3, 2, 7)


class Upstream(nn.Module):
    """Values under the waves of two coordinates, six and six, behind two channels that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 14), nn.Linear(14, 8)

    def angles(self, places: Tensor) -> Tensor:
        speeds = torch.arange(1, 7).to(places.dtype)
        return (speeds * places.mT.unsqueeze(-1)).transpose(-1, -2).flatten(2)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        angles = self.angles(places)
        ones, zeros = torch.ones_like(angles[..., :2]), torch.zeros_like(angles[..., :2])
        cos, sin = torch.cat((ones, angles.cos()), dim=-1), torch.cat((zeros, angles.sin()), dim=-1)
        x = self.up(x)
        return self.down(x * cos + x.flip(-1) * sin)


class Port(Upstream):
    """The same with paddings, and one mistake."""

    fault = ""

    def angles(self, places: Tensor) -> Tensor:
        speeds = torch.arange(1, 7).to(places.dtype)
        angles = speeds * places.mT.unsqueeze(-1)
        return angles.flatten(2) if self.fault == "axes" else angles.transpose(-1, -2).flatten(2)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        angles = self.angles(places)
        pad = (0, 2) if self.fault == "pad" else (2, 0)
        cos, sin = F.pad(angles.cos(), pad, value=1.0), F.pad(angles.sin(), pad, value=0.0)
        x = self.up(x)
        return self.down(x * cos + x.flip(-1) * sin)


class Neighbours(Upstream):
    """Pairs of neighbours are turned: each angle stands twice."""

    def angles(self, places: Tensor) -> Tensor:
        return torch.outer(torch.arange(7.0), 10.0 ** -torch.arange(7.0)).to(places.dtype)

    def doubled(self, table: Tensor) -> Tensor:
        return table[:, :7].repeat_interleave(2, dim=-1)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        angles = self.angles(places)
        cos, sin = (self.doubled(wave(torch.cat((angles, angles), dim=-1))) for wave in (torch.cos, torch.sin))
        x = self.up(x)
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return self.down(x * cos + turned * sin)


class AllInTurn(Neighbours):
    """The port: all angles stand once more behind the first ones."""

    def doubled(self, table: Tensor) -> Tensor:
        return table


def test_angles_that_do_not_stand_beside_themselves_are_named() -> None:
    inputs = torch.linspace(-2, 2, 3 * 7 * 8, dtype=torch.float64).sin().view(3, 7, 8), PLACES
    (found,) = explained_pair(Neighbours(), AllInTurn(), {key: key for key in Upstream().state_dict()}, inputs).faults
    assert "in the tables of cosines and sines, [7, 14]" in found.diagnosis
    assert "each angle twice, as 0 0 1 1" in found.diagnosis


def explained(fault: str, dtype: str) -> Explanation:
    lane = Lane(dtype)
    with held_equal(lane):
        upstream, port = Upstream().to(lane.dtype).eval(), Port().to(lane.dtype).eval()
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        port.fault = fault
        x = torch.linspace(-2, 2, 3 * 7 * 8, dtype=lane.dtype).sin().view(3, 7, 8)
        places = PLACES.to(lane.dtype)
        runs = (lambda model=model: {"y": model(x.clone(), places.clone())} for model in (upstream, port))
        return explain_modules(upstream, port, *runs)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("axes", "axes 2 and 3 of the shape [3, 7, 2, 6] are exchanged before they are joined"),
        ("pad", "[2, 0], not [0"),
    ],
)
def test_what_is_laid_out_otherwise_is_named(fault: str, words: str, dtype: str) -> None:
    (found,) = explained(fault, dtype).faults
    assert words in found.diagnosis


def test_without_a_fault_nothing_is_blamed() -> None:
    assert explained("", "float32").faults == []


@pytest.mark.parametrize(
    ("before", "after", "axis"),
    [((2, 3, 4), (2, 12), 1), ((2, 3, 4), (6, 4), 0), ((2, 1, 4), (2, 4), None), ((2, 3, 4), (24,), None)],
)
def test_two_axes_that_are_joined_are_found(before: Sequence[int], after: Sequence[int], axis: int | None) -> None:
    assert joined_axis(before, after) == axis
