"""Leaves of one weight that return more than one another, or are given other things, are no fault by that."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refiners.parity.explain import Explanation
from tests.refiners.parity.toys import explained_pair

X = torch.linspace(-2, 2, 3 * 7 * 8, dtype=torch.float64).sin().view(3, 7, 8)
LEVEL = torch.tensor([0.3, 1.2, 2.5], dtype=torch.float64)


class Router(nn.Linear):
    """Upstream's: the scores, the shares of the two best, and which they are."""

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        scores = super().forward(input)
        return scores, *scores.softmax(-1).topk(2, dim=-1)


class Waves(nn.Linear):
    """Upstream's: waves of a level."""

    def forward(self, input: Tensor) -> Tensor:
        return (input[:, None] * self.weight[:, 0]).sin()


class Upstream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.waves, self.gate = Waves(1, 8, bias=False), Router(8, 5)
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        x = self.mix(x + self.waves(level)[:, None])
        _, shares, chosen = self.gate(x)
        return x * (shares * (chosen + 1)).sum(-1, keepdim=True)


class LevelOfPicture(nn.Linear):
    """The port's: the same waves, as long as a picture, of a level that it keeps."""

    level = LEVEL
    is_log = False

    def forward(self, input: Tensor) -> Tensor:
        level = self.level.log() if self.is_log else self.level
        return (level[:, None] * self.weight[:, 0]).sin()[:, None].expand(-1, input.shape[1], -1)


class Port(nn.Module):
    """Its gate gives the scores only; it chooses by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.level, self.gate, self.mix = LevelOfPicture(1, 8, bias=False), nn.Linear(8, 5), nn.Linear(8, 8)
        self.is_sigmoid = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x + self.level(x))
        scores = self.gate(x)
        shares, chosen = (scores.sigmoid() if self.is_sigmoid else scores.softmax(-1)).topk(2, dim=-1)
        return x * (shares * (chosen + 1)).sum(-1, keepdim=True)


KEYS = {
    "level.weight": "waves.weight",
    **{f"{name}.{part}": f"{name}.{part}" for name in ("gate", "mix") for part in ("weight", "bias")},
}


def explained(*fault: Any) -> Explanation:
    return explained_pair(Upstream(), Port(), KEYS, [X, LEVEL], [X], fault=fault or None)


def test_a_gate_that_gives_its_scores_only_is_not_blamed() -> None:
    assert explained().faults == []


@pytest.mark.parametrize(("path", "name", "words"), [("", "is_sigmoid", "softmax"), ("level", "is_log", "is_log")])
def test_the_fault_beside_such_leaves_is_the_only_one(path: str, name: str, words: str) -> None:
    (fault,) = explained(path, name, True).faults
    assert fault.finding.port == path
    assert words in fault.diagnosis
