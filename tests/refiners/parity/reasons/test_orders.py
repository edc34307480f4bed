"""What stands at another place, or holds its weight the other way, is named so, and not by half of it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.weights import fill_informative

LANE = Lane("float64")
X = torch.linspace(-2, 2, 2 * 6 * 16, dtype=LANE.dtype).sin().view(2, 6, 16)


class Columns(nn.Module):
    """A linear layer that holds its weight as columns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(16, 16)), nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, 1), self.weight).view_as(x)


class Rows(Columns):
    """The same as rows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Upstream(nn.Module):
    """A norm before an activation, biased attention, a norm before attention and not before its residual, angles."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self._fault = fault
        self.first, self.norm, self.second = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.time, self.late, self.third = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.inner, self.qk, self.out = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.zeros(6, 6))
        self.columns = Rows() if fault == "transposed" else Columns()
        self.qkv, self.gain = nn.Linear(16, 48), nn.Parameter(torch.ones(16))
        self.frequencies: Tensor
        table = 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        self.register_buffer("frequencies", table, persistent=False)

    def activated(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.norm(F.gelu(x)) if self._fault == "norm behind" else F.gelu(self.norm(x))
        return self.second(x)

    def timed(self, x: Tensor, time: Tensor) -> Tensor:
        time = self.time(time)
        return self.third(self.late(x) + time if self._fault == "time behind" else self.late(x + time))

    def attended(self, x: Tensor) -> Tensor:
        y = self.inner(x if self._fault == "residual behind" else x.flatten(0, 1))
        q, k = self.qk(y).view(2, 6, 32).chunk(2, -1)
        scores = q @ k.transpose(-1, -2)
        scores = (scores + self.bias) * 0.25 if self._fault == "scale behind" else scores * 0.25 + self.bias
        return (y if self._fault == "residual behind" else x) + self.out(scores.softmax(-1) @ x)

    def angles(self, x: Tensor) -> Tensor:
        frequencies = self.frequencies
        if self._fault == "exponents":
            frequencies = 10_000.0 ** (-torch.arange(0, 8, 2).to(x) / 16)
        angles = torch.outer(torch.arange(6).to(x), frequencies)
        return torch.cat((angles.cos(), angles.sin()), -1).repeat(1, 2)

    def mixed(self, x: Tensor) -> Tensor:
        heads = self.qkv(x)
        cut = heads.view(2, 6, 2, 3, 8).transpose(2, 3) if self._fault == "head by head" else heads.view(2, 6, 3, 2, 8)
        q, k, v = cut.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def normed(self, x: Tensor) -> Tensor:
        power = x.square().mean(-1, keepdim=True)
        if self._fault == "eps behind":
            return x / (power.sqrt() + 1e-3) * self.gain
        return x * torch.rsqrt(power + 1e-3) * self.gain

    def forward(self, x: Tensor) -> Tensor:
        x = self.timed(self.activated(x + self.angles(x)), x.flip(1))
        return self.normed(self.mixed(self.columns(self.attended(x))))


def explained(fault: str) -> Explanation:
    with held_equal(LANE):
        upstream, port = Upstream().to(LANE.dtype).eval(), Upstream(fault).to(LANE.dtype).eval()
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)

        def run(model: nn.Module) -> dict[str, Tensor]:
            return {"y": model(X.clone())}

        return explain_modules(upstream, port, partial(run, upstream), partial(run, port))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("norm behind", ("`gelu` comes behind `norm`, not before it",)),
        ("time behind", ("`add` comes before `late`, not behind it",)),
        ("scale behind", ("`add` at ", "comes behind `mul`", "not before it")),
        ("residual behind", ("`add` at ", "not what `inner` returns")),
        ("transposed", ("`weight` is transposed",)),
        ("head by head", ("`view`", "as [3, 2, 8], not as [2, 3, 8]", "one behind another, not head by head")),
        ("eps behind", ("eps is added before the root is taken", "not behind it")),
        ("exponents", ("exponents of the frequencies are times 2", "both sides have the base 10000")),
    ],
)
def test_what_stands_elsewhere_is_named(fault: str, words: tuple[str, ...]) -> None:
    (found,) = explained(fault).faults
    assert all(word in found.diagnosis for word in words), found.diagnosis


def test_without_a_fault_nothing_is_blamed() -> None:
    assert explained("").faults == []


class Capped(nn.Module):
    """Upstream: scores that are divided by a root, then kept within 5."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.out = nn.Linear(16, 32), nn.Linear(16, 16)

    def scored(self, scores: Tensor) -> Tensor:
        return 5.0 * torch.tanh(scores / 4.0 / 5.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        return self.out(self.scored(q @ k.transpose(-1, -2)).softmax(-1) @ x)


class CappedFirst(Capped):
    """The port: within 5 first, then times the root's inverse."""

    def scored(self, scores: Tensor) -> Tensor:
        return torch.tanh(scores / 5.0) * 5.0 * 0.25


def test_a_factor_that_stands_some_steps_away_as_its_inverse_is_one_move() -> None:
    with held_equal(LANE):
        upstream, port = Capped().to(LANE.dtype).eval(), CappedFirst().to(LANE.dtype).eval()
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        runs = (lambda model=model: {"y": model(X.clone())} for model in (upstream, port))
        (fault,) = explain_modules(upstream, port, *runs).faults
    assert fault.diagnosis.startswith("when `mul` at ")
    assert "comes before `tanh`, as upstream at " in fault.diagnosis
    assert fault.diagnosis.endswith("not behind it")
