"""What is added on the wrong side of a multiplication, where both sides hold values in other layouts or kernels."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.refiners.parity.toys import explained_pair

X = torch.linspace(-2, 2, 2 * 4 * 5 * 8, dtype=torch.float64).sin().view(2, 4, 5, 8)


class Upstream(nn.Module):
    """Attention with a bias; then a layer whose sum with the residual is scaled by a condition, channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(5, 5))
        self.wide, self.told, self.last = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), attn_mask=self.bias))
        y = self.wide(y).permute(0, 3, 1, 2) + y.permute(0, 3, 1, 2)
        scale, shift = self.told(x[:, 0, 0])[:, :, None, None].chunk(2, dim=1)
        return self.last((y * (1 + scale) + shift).flatten(2).permute(0, 2, 1))


class Port(Upstream):
    """The same with channels last, and attention by hand."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.o(self.scores(self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))
        scale, shift = self.told(x[:, 0, 0])[:, None, None].chunk(2, dim=-1)
        return self.last(self.summed(self.wide(y), y, 1 + scale, shift).flatten(1, 2))

    def scores(self, x: Tensor) -> Tensor:
        return x * 8**-0.5 + self.bias

    def summed(self, branch: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (branch + y) * scale + shift


class ScaledBias(Port):
    """The bias is scaled with the scores."""

    def scores(self, x: Tensor) -> Tensor:
        return (x + self.bias) * 8**-0.5


class LateResidual(Port):
    """The residual comes behind the condition."""

    def summed(self, branch: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return branch * scale + shift + y


KEYS = {key: key for key in Upstream().state_dict()}


@pytest.mark.parametrize(
    ("port", "words"), [(ScaledBias, "is added behind `mul` at "), (LateResidual, "is added before `mul` at ")]
)
def test_what_is_added_on_the_wrong_side_is_named(port: type[Port], words: str) -> None:
    (fault,) = explained_pair(Upstream(), port(), KEYS, [X]).faults
    assert words in fault.diagnosis


def test_a_port_in_another_layout_has_nothing_but_rounding() -> None:
    assert all("rounding" in fault.diagnosis for fault in explained_pair(Upstream(), Port(), KEYS, [X]).faults)
