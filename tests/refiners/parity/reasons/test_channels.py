"""Leaves that hold their channels at the other end than upstream's: a layer on a transpose as a convolution of 1x1."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.weights import fill_informative

X = torch.linspace(-2, 2, 2 * 9 * 12).sin().view(2, 9, 12)


class Mixer(nn.Module):
    """Upstream: tokens are mixed by linear layers on the transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(12), nn.LayerNorm(12)
        self.up, self.down = nn.Linear(9, 14), nn.Linear(14, 9)
        self.wide, self.narrow = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x).transpose(1, 2)))).transpose(1, 2)
        return x + self.narrow(F.gelu(self.wide(self.other(x))))


class Convolved(nn.Module):
    """The port: by convolutions whose channels are the tokens, between norms of its own."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self._fault = fault
        self.gains, self.biases = nn.Parameter(torch.zeros(2, 12)), nn.Parameter(torch.zeros(2, 12))
        self.up, self.down = nn.Conv1d(9, 14, 1), nn.Conv1d(14, 9, 1)
        self.wide, self.narrow = nn.Linear(12, 20), nn.Linear(20, 12)

    def norm(self, x: Tensor, place: int) -> Tensor:
        apart = x - x.mean(-1, keepdim=True)
        power = apart.square().mean(-1, keepdim=True)
        return apart * torch.rsqrt(power + 1e-5) * self.gains[place] + self.biases[place]

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x, 0)
        kind = "tanh" if self._fault == "tanh" else "none"
        x = (y if self._fault == "residual" else x) + self.down(F.gelu(self.up(y), approximate=kind))
        return x + self.narrow(F.gelu(self.wide(self.norm(x, 1))))


def explained(fault: str, lane: Lane) -> Explanation:
    with held_equal(lane):
        upstream, port = Mixer().to(lane.dtype).eval(), Convolved(fault).to(lane.dtype).eval()
        fill_informative(upstream, 0)
        held = upstream.state_dict()
        right = {key: held[key] for key in held if key.startswith(("wide", "narrow"))}
        for name in ("up", "down"):
            right |= {f"{name}.weight": held[f"{name}.weight"].unsqueeze(-1), f"{name}.bias": held[f"{name}.bias"]}
        for name, key in (("gains", "weight"), ("biases", "bias")):
            right[name] = torch.stack((held[f"norm.{key}"], held[f"other.{key}"]))
        port.load_state_dict(right, assign=True)
        runs = (lambda model=model: {"y": model(X.to(lane.dtype))} for model in (upstream, port))
        is_wide = lane.dtype == torch.float64
        return explain_modules(upstream, port, *runs, right_weights=right, by_closeness=is_wide)


@pytest.mark.parametrize("lane", ["float32", "float64"])
def test_a_port_that_mixes_tokens_by_convolutions_is_right(lane: str) -> None:
    faults = explained("", Lane(lane)).faults
    assert all(fault.diagnosis.startswith("within rounding") for fault in faults), [f.diagnosis for f in faults]


def test_an_activation_between_two_such_leaves_is_named() -> None:
    (fault,) = explained("tanh", Lane("float64")).faults
    assert fault.diagnosis == "when the activation is gelu: here it is gelu with tanh"


def test_a_residual_around_such_leaves_is_told_alone() -> None:
    (fault,) = explained("residual", Lane("float64")).faults
    assert fault.finding.port == ""
    assert "in the place of" in fault.diagnosis or "`norm`" in fault.diagnosis
