"""An operation that reads something else than upstream's: named by what it reads and what it should read."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.reasons.causes import ONLY_ROUNDING
from refiners.parity.weights import fill_informative
from tests.refiners.parity.toys import explained_pair

LANE = Lane("float64")
X = torch.linspace(-2, 2, 2 * 6 * 16, dtype=LANE.dtype).sin().view(2, 6, 16)


class Upstream(nn.Module):
    """A block whose norms have no weights, and the middle of a table of places."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.zeros(9, 8, 16))
        self.table: Tensor
        angles = torch.outer(torch.arange(6, dtype=LANE.dtype), torch.linspace(1, 0.01, 8, dtype=LANE.dtype))
        self.register_buffer("table", torch.cat((angles.sin(), angles.cos()), -1))
        self.mix, self.up, self.down, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.grid[torch.arange(3, 5)[:, None], torch.arange(2, 5)].flatten(0, 1) + self.table
        middle = x + self.mix(F.layer_norm(x, (16,)))
        x = x + self.down(F.gelu(self.up(F.layer_norm(middle, (16,)))))
        y = F.layer_norm(x, (16,))
        return self.out(F.scaled_dot_product_attention(y, self.k(y), self.v(y)))


class Port(nn.Module):
    """The same with one projection for keys and values."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self._fault = fault
        self.places = nn.Parameter(torch.zeros(9, 8, 16))
        self.rows: Tensor
        self.register_buffer("rows", torch.zeros(6, 16))
        self.a, self.b, self.c, self.d, self.kv = (nn.Linear(16, 16 if n < 4 else 32) for n in range(5))

    def forward(self, x: Tensor) -> Tensor:
        first = 2 if self._fault == "window" else 3
        rows = self.rows.roll(8, -1) if self._fault == "table" else self.rows
        x = x + self.places[first : first + 2, first - 1 : first + 2].reshape(6, 16) + rows
        y = x + self.a(F.layer_norm(x, (16,)))
        x = (y if self._fault == "residual" else x) + self.c(F.gelu(self.b(F.layer_norm(y, (16,)))))
        y = F.layer_norm(x, (16,))
        k, v = self.kv(y).chunk(2, -1)
        return self.d(F.scaled_dot_product_attention(y, k, v))


def explained(fault: str) -> Explanation:
    with held_equal(LANE):
        upstream, port = Upstream().to(LANE.dtype).eval(), Port(fault).to(LANE.dtype).eval()
        fill_informative(upstream, 0)
        held = upstream.state_dict()
        names = {"a": "mix", "b": "up", "c": "down", "d": "out"}
        parts = ("weight", "bias")
        right = {f"{ours}.{part}": held[f"{theirs}.{part}"] for ours, theirs in names.items() for part in parts}
        right |= {f"kv.{part}": torch.cat((held[f"k.{part}"], held[f"v.{part}"])) for part in parts}
        port.load_state_dict({**right, "places": held["grid"], "rows": held["table"]}, assign=True)

        def run(model: nn.Module) -> dict[str, Tensor]:
            return {"y": model(X.clone())}

        return explain_modules(upstream, port, partial(run, upstream), partial(run, port), right_weights=right)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("residual", ("`add` at", "takes what `add` at", "not what `add` at")),
        ("window", ("`start` is 3, not 2 (axis 0)", "`start` is 2, not 1 (axis 1)")),
    ],
)
def test_what_is_read_instead_is_named(fault: str, words: tuple[str, ...]) -> None:
    (found,) = [fault for fault in explained(fault).faults if fault.diagnosis]
    assert all(word in found.diagnosis for word in words), found.diagnosis


class Table(nn.Module):
    """Places from a table that is made ready."""

    def __init__(self, *, is_swapped: bool) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(6, dtype=LANE.dtype), torch.linspace(1, 0.01, 8, dtype=LANE.dtype))
        pieces = (angles.cos(), angles.sin()) if is_swapped else (angles.sin(), angles.cos())
        self.linear, self.out, self.table = nn.Linear(16, 16), nn.Linear(16, 16), torch.cat(pieces, -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.linear(x) + self.table)


def test_a_table_in_another_order_is_named() -> None:
    with held_equal(LANE):
        upstream, port = (Table(is_swapped=swapped).to(LANE.dtype).eval() for swapped in (False, True))
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        (fault,) = explain_modules(upstream, port, lambda: {"y": upstream(X)}, lambda: {"y": port(X)}).faults
    assert "the two halves of the last axis are exchanged" in fault.diagnosis


def test_without_a_fault_nothing_is_blamed() -> None:
    assert {fault.diagnosis for fault in explained("").faults} <= {ONLY_ROUNDING}


class Twice(nn.Module):
    """One line that runs for two layers; the last layer reads what it made for the first, or for the second."""

    def __init__(self, *, reads_second: bool) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.first, self.second, self.reads_second = nn.SiLU(), nn.SiLU(), reads_second

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(self.one(x)), self.second(self.two(x.flip(1)))
        return self.last(b if self.reads_second else a) + a + b


def test_a_line_that_runs_twice_is_told_apart_by_its_modules() -> None:
    with held_equal(LANE):
        upstream, port = (Twice(reads_second=second).to(LANE.dtype).eval() for second in (False, True))
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        (fault,) = explain_modules(upstream, port, lambda: {"y": upstream(X)}, lambda: {"y": port(X)}).faults
    assert "what `first` returns" in fault.diagnosis
    assert "what `second` returns" in fault.diagnosis


class Fading(nn.Module):
    """Upstream: what is further back counts for less, in each head by a factor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def logs(self, x: Tensor) -> Tensor:
        return (1 - 2.0 ** (-3 - torch.arange(4, dtype=x.dtype))).log()[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(6)
        fading = torch.exp((steps[:, None] - steps).to(x.dtype) * self.logs(x)).tril()
        heads = self.up(x).unflatten(-1, (4, 2)).transpose(1, 2)
        return self.down((fading @ heads).transpose(1, 2).flatten(2))


class Written(Fading):
    """The port: the factors are numbers in a list, and one head further."""

    def logs(self, x: Tensor) -> Tensor:
        return torch.tensor([math.log(1 - 2.0 ** -(4 + head)) for head in range(4)], dtype=x.dtype).view(-1, 1, 1)


def test_numbers_in_a_list_that_are_others_are_shown_beside_upstreams() -> None:
    inputs = [torch.linspace(-2, 2, 2 * 6 * 8, dtype=torch.float64).sin().view(2, 6, 8)]
    (found,) = explained_pair(Fading(), Written(), {key: key for key in Fading().state_dict()}, inputs).faults
    assert "when log(rsub(pow(rsub(…, -3), 2.0), 1))" in found.diagnosis
    assert "is in the place of the numbers [-0.0645, -0.0317, -0.0157, -0.0078]" in found.diagnosis


class Recurrent(nn.Module):
    """Upstream: a mean of all that was before, which fades; the exponents are kept small by the largest of them."""

    _is_late = False

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)
        self.out = nn.Linear(6, 8, bias=False)
        self.fading, self.bonus = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        keys, values, rate = self.key(x), self.value(x), -self.fading.exp()
        top = bottom = torch.zeros_like(keys[:, 0])
        peak, made = torch.full_like(top, -1e38), list[Tensor]()
        for key, value in zip(keys.unbind(1), values.unbind(1), strict=True):
            faded, now = peak + rate, key + self.bonus
            level = torch.maximum(faded if self._is_late else peak, now)
            old, new = ((faded if self._is_late else peak) - level).exp(), (now - level).exp()
            made.append((old * top + new * value) / (old * bottom + new))
            level = torch.maximum(faded, key)
            old, new = (faded - level).exp(), (key - level).exp()
            top, bottom, peak = old * top + new * value, old * bottom + new, level
        return self.out(torch.stack(made, dim=1))


def test_a_state_that_has_faded_once_too_often_is_named_by_what_should_be_read() -> None:
    keys = {key: key for key in Recurrent().state_dict()}
    x = 3 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (found,) = explained_pair(Recurrent(), Recurrent(), keys, [x], fault=("", "_is_late", True)).faults
    assert "takes the first tensor that `add` at" in found.diagnosis
    assert "is given, not what that returns" in found.diagnosis


class Gates(nn.Module):
    """Upstream: each of four levels has a gate."""

    _is_reversed = False

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.out = nn.Linear(8, 4), nn.Linear(8, 8)
        self.levels = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        gates, total = self.gates(x), torch.zeros_like(x)
        for place, level in enumerate(self.levels):
            x, start = level(x), 3 - place if self._is_reversed else place
            total = total + x * gates[..., start : start + 1]
        return self.out(total)


def test_pieces_that_are_taken_from_the_last_to_the_first_are_named() -> None:
    x = torch.linspace(-2, 2, 2 * 6 * 8, dtype=torch.float64).sin().view(2, 6, 8)
    keys = {key: key for key in Gates().state_dict()}
    (found,) = explained_pair(Gates(), Gates(), keys, [x], fault=("", "_is_reversed", True)).faults
    assert "the 4 pieces that `slice` at" in found.diagnosis
    assert "are taken from the last to the first" in found.diagnosis
