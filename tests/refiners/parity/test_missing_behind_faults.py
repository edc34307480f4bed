"""A layer that is missing is told also where an earlier fault has changed all that the residuals carry on."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.refiners.parity.toys import explained_pair

X = torch.linspace(-2, 2, 3 * 8, dtype=torch.float64).sin().view(3, 8)


class Layer(nn.Module):
    """A residual; the sign of what it adds may be wrong, and it may pass on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.sign, self.is_missing = 1, False

    def forward(self, x: Tensor) -> Tensor:
        if self.is_missing:
            return x
        y = self.down(F.gelu(self.up(self.norm(x))))
        return x + y if self.sign > 0 else x - y


class Tower(nn.Module):
    """Four layers and a norm."""

    def __init__(self, wrong: int | None = None, missing: int | None = None) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleList(Layer() for _ in range(4)), nn.LayerNorm(8)
        for number, layer in enumerate(self.layers):
            layer.sign, layer.is_missing = -1 if number == wrong else 1, number == missing

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


KEYS = {key: key for key in Tower().state_dict()}


@pytest.mark.parametrize("missing", [2, 3])
def test_a_layer_that_is_missing_behind_a_wrong_residual_is_told(missing: int) -> None:
    wrong, lost = explained_pair(Tower(), Tower(wrong=0, missing=missing), KEYS, [X]).faults
    assert (wrong.finding.port, lost.finding.port) == ("layers.0", f"layers.{missing}")
    assert lost.diagnosis == f"when it runs upstream's `layers.{missing}` (Layer), which is missing here"


def test_a_wrong_residual_alone_is_told_once() -> None:
    (fault,) = explained_pair(Tower(), Tower(wrong=0), KEYS, [X]).faults
    assert fault.finding.port == "layers.0"
