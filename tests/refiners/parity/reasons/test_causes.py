"""Faults of ports that are written as functions: what the operations of both sides, run again, say about them."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.fingerprint import Values
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.reasons.candidates import base_of, changed
from refiners.parity.reasons.causes import ONLY_ROUNDING
from refiners.parity.reasons.replay import Program, is_close, scalars, with_scalar
from refiners.parity.reasons.trial import Trial
from refiners.parity.trace import record
from refiners.parity.weights import fill_informative


class Attention(nn.Module):
    """Rotary attention and a gated feed-forward as one function."""

    fault = ""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def rotate(self, x: Tensor) -> Tensor:
        base = 500_000.0 if self.fault == "base" else 10_000.0
        angles = torch.outer(torch.arange(x.shape[2]).to(x.dtype), base ** (-torch.arange(0, 8, 2).to(x.dtype) / 8))
        angles = torch.cat((angles, angles), dim=-1)
        first, second = x.chunk(2, dim=-1)
        turned = (second, -first) if self.fault == "sign" else (-second, first)
        return x * angles.cos() + torch.cat(turned, dim=-1) * angles.sin()

    def heads(self, x: Tensor) -> Tensor:
        if self.fault == "heads":
            return x.view(2, 5, 8, 2).permute(0, 3, 1, 2)
        return x.view(2, 5, 2, 8).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fault in ("scale", "axis", "another style"):  # written out, as it is nowhere else
            scores = q @ k.transpose(-1, -2) * (1.0 if self.fault == "scale" else 8**-0.5)
            scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -1e9)
            return scores.softmax(-2 if self.fault == "axis" else -1) @ v
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        q, k = self.rotate(q), k if self.fault == "not rotated" else self.rotate(k)
        x = x + self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))
        gate, up = self.gate(x), self.up(x)
        if self.fault == "gate":
            gate, up = up, gate
        activation: Callable[[Tensor], Tensor] = F.relu if self.fault == "relu" else F.silu
        return x + self.down(activation(gate) * up)


def run(model: Attention, x: Tensor) -> dict[str, Tensor]:
    return {"y": model(x.clone())}


def explained(fault: str) -> Explanation:
    lane = Lane("float64")
    with held_equal(lane):
        upstream, port = Attention().to(lane.dtype).eval(), Attention().to(lane.dtype).eval()
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        port.fault = fault
        x = torch.linspace(-2, 2, 2 * 5 * 16, dtype=lane.dtype).sin().view(2, 5, 16)
        return explain_modules(upstream, port, partial(run, upstream, x), partial(run, port, x))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("base", "the base of the frequencies is 10000: here it is 500000"),
        ("sign", "neg"),
        ("heads", "[2, 5, 2, 8]"),
        ("scale", "`scale` is 1.0"),
        ("axis", "`dim` is -1, not -2"),
        ("not rotated", "goes through upstream's"),
        ("gate", "what `gate` returns"),
        ("relu", "silu"),
    ],
)
def test_a_fault_of_a_port_without_modules_is_named(fault: str, words: str) -> None:
    found = explained(fault)
    assert found.faults
    assert words in " ".join(one.diagnosis for one in found.faults), str(found)


def test_without_a_fault_nothing_is_blamed() -> None:
    assert explained("").faults == []


def test_a_right_port_in_another_style_has_no_cause() -> None:
    told = {one.diagnosis for one in explained("another style").faults}
    assert told <= {"", ONLY_ROUNDING}


class Squared(nn.Module):
    """A product that another number gives as well, as long as all weights are 3."""

    def __init__(self, *, doubled: bool = False) -> None:
        super().__init__()
        self.w, self.doubled = nn.Parameter(torch.full((8,), 3.0)), doubled

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.w * (2.0 if self.doubled else self.w)) / 3.0


def test_what_fits_the_weights_of_one_run_only_is_no_cause() -> None:
    with held_equal(Lane("float64")):
        upstream, port = Squared().double(), Squared(doubled=True).double()
        port.w = upstream.w
        values, x = Values(), torch.linspace(-2, 2, 8, dtype=torch.float64)
        number = values.number_of_weight(upstream.w)
        traces = [record(side, lambda side=side: {"y": side(x)}, values)[0] for side in (port, upstream)]
        given = {values.number_of(x): x, number: upstream.w.detach()}
        programs = [
            Program(trace, trace.operations, trace.outputs["y"], given, parameters=frozenset([number]))
            for trace in traces
        ]
        trial = Trial(*programs)
        tried = list(changed(programs[0], {3.0}))
        fits = [
            one for one in tried if is_close(programs[0].run(one.making(*programs))[programs[0].root], right(trial))
        ]
        assert [one for one in fits if "`other` is 3.0, not 2.0" in one.text]
        assert not any(trial.holds(one.making) for one in fits)


def right(trial: Trial) -> Tensor:
    return trial.upstream.values[trial.upstream.root]


def test_the_base_of_frequencies_is_read_from_their_values() -> None:
    assert base_of(10_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)) == 10_000
    assert base_of(torch.exp(-math.log(5e5) * torch.arange(8, dtype=torch.float64) / 8)) == 5e5
    assert base_of(torch.tensor([1.0, 0.5, 0.4])) is None
    assert base_of(torch.arange(4.0)) is None


def test_a_scalar_among_arguments_is_found_and_replaced() -> None:
    template = ((1, [2, 3.5]), {"flag": True})
    assert dict(scalars(template)) == {(0, 0): 1, (0, 1, 0): 2, (0, 1, 1): 3.5, (1, "flag"): True}
    assert with_scalar(template, (0, 1, 1), 4.0) == ((1, [2, 4.0]), {"flag": True})
    assert with_scalar(template, (1, "scale"), 0.5) == ((1, [2, 3.5]), {"flag": True, "scale": 0.5})
