"""Two implementations of one layer, in styles of their own: a right one is not blamed, and a wrong one is named."""

from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.weights import fill_informative

LANE = Lane("float64")
IDS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 3, 0]])
PIXELS = torch.linspace(-2, 2, 2 * 8 * 3 * 5, dtype=LANE.dtype).sin().view(2, 8, 3, 5)
STATES = torch.linspace(-3, 3, 2 * 6 * 16, dtype=LANE.dtype).sin().view(2, 6, 16)


class ScaledTable(nn.Embedding):
    """Scales what it looks up by itself."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 4.0


class Words(nn.Module):
    """Upstream: the table scales."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = ScaledTable(7, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(ids))


class WordsScaledBehind(nn.Module):
    """The port: the next line does."""

    def __init__(self, factor: float = 4.0) -> None:
        super().__init__()
        self.factor = factor
        self.lookup, self.last = nn.Embedding(7, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.lookup(ids) * self.factor)


class Pixels(nn.Module):
    """Upstream: a convolution of 1x1, then a norm on rows of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 16, 1), nn.LayerNorm(16)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.norm(self.conv(pixels).flatten(2).transpose(1, 2))


class Rows(nn.Module):
    """The port: a linear layer on rows of pixels."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.linear, self.layer_norm = nn.Linear(8, 16), nn.LayerNorm(16, eps=eps)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layer_norm(self.linear(pixels.permute(0, 2, 3, 1).flatten(1, 2)))


class Grouped(nn.Module):
    """Upstream: queries share keys in groups; positions are the middle of a table; what follows is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.gain = nn.Parameter(torch.ones(16))
        self.mod = nn.Linear(16, 48)
        self.table: Tensor
        self.register_buffer("table", torch.linspace(-1, 1, 10 * 16).cos().view(10, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table[2:8]
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        shift, scale, gate = self.mod(x[:, 0])[:, None].chunk(3, -1)
        return torch.cat((x[:, :1], (y * (1 + scale) + shift) * gate * self.gain), 1)


class Fused(nn.Module):
    """The port: one projection for all three."""

    fault: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 32)
        self.gain = nn.Parameter(torch.ones(16))
        self.mod = nn.Linear(16, 48)
        self.table: Tensor
        self.register_buffer("table", torch.zeros(10, 16))

    def forward(self, x: Tensor) -> Tensor:
        first = 0 if self.fault == "crop" else 2
        x = x + self.table[first : first + 6]
        q, k, v = self.qkv(x).split((16, 8, 8), -1)
        q, k, v = (t.reshape(2, 6, -1, 4).permute(0, 2, 1, 3) for t in (q, k, v))
        if self.fault == "tile":
            k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
        else:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 6, 16)
        shift, scale, gate = self.mod(x[:, 0])[:, None].chunk(3, -1)
        if self.fault == "pieces":
            gate, shift, scale = shift, scale, gate
        y = (y * (1 + scale) + shift) * gate * (1.0 if self.fault == "gain" else self.gain)
        parts = (y, x[:, :1]) if self.fault == "order" else (x[:, :1], y)
        return torch.cat(parts, 1)


def explained(upstream: nn.Module, port: nn.Module, given: Tensor, renamed: dict[str, tuple[str, ...]]) -> Explanation:
    with held_equal(LANE):
        upstream, port = upstream.to(LANE.dtype).eval(), port.to(LANE.dtype).eval()
        fill_informative(upstream, 0)
        held, shapes = upstream.state_dict(), {key: tensor.shape for key, tensor in port.state_dict().items()}
        right = {key: torch.cat([held[name] for name in names]) for key, names in renamed.items() if len(names) > 1}
        right |= {key: held[names[0]].reshape(shapes[key]) for key, names in renamed.items() if len(names) == 1}
        port.load_state_dict(right, assign=True)

        def run(model: nn.Module) -> dict[str, Tensor]:
            with torch.no_grad():
                return {"y": model(given.clone())}

        return explain_modules(
            upstream, port, partial(run, upstream), partial(run, port), right_weights=right, by_closeness=True
        )


def both(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    return {f"{theirs}.{name}": (f"{ours}.{name}",) for name in ("weight", "bias")}


def explained_words(factor: float) -> Explanation:
    names = {"lookup.weight": ("table.weight",), **both("out", "last")}
    return explained(Words(), WordsScaledBehind(factor), IDS, names)


def explained_rows(eps: float) -> Explanation:
    return explained(Pixels(), Rows(eps), PIXELS, {**both("conv", "linear"), **both("norm", "layer_norm")})


def explained_fused(fault: str) -> Explanation:
    port = type("Fused", (Fused,), {"fault": fault})()
    names = {f"qkv.{name}": tuple(f"{part}.{name}" for part in "qkv") for name in ("weight", "bias")}
    names |= {"gain": ("gain",), "table": ("table",), **both("mod", "mod")}
    return explained(Grouped(), port, STATES, names)


def test_what_a_leaf_of_upstream_does_and_the_port_does_behind_it_is_no_fault() -> None:
    assert not explained_words(4.0).faults


def test_what_is_done_behind_a_leaf_is_named_where_it_is_done() -> None:
    (fault,) = explained_words(0.25).faults
    assert fault.finding.port == ""
    assert "4" in fault.diagnosis
    assert "0.25" in fault.diagnosis


def test_a_linear_layer_for_a_convolution_of_one_pixel_is_no_fault() -> None:
    assert not explained_rows(1e-5).faults


def test_a_fault_behind_a_linear_layer_for_a_convolution_is_the_only_one() -> None:
    (fault,) = explained_rows(1e-3).faults
    assert fault.finding.port == "layer_norm"
    assert fault.diagnosis == "when `eps` is 1e-05"


def test_one_projection_for_three_is_no_fault() -> None:
    assert all("rounding" in fault.diagnosis for fault in explained_fused("").faults)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("crop", ("`start` is 2, not 0", "`end` is 8, not 6")),
        ("tile", ("repeat_interleave", "0 0 1 1")),
        ("pieces", ("pieces of `split`", "[3, 1, 2]")),
        ("gain", ("mul", "as upstream does")),
        ("order", ("exchanged",)),
    ],
)
def test_a_fault_behind_one_projection_for_three_is_named(fault: str, words: tuple[str, ...]) -> None:
    told = [found.diagnosis for found in explained_fused(fault).faults]
    assert len(told) == 1, told
    assert all(word in told[0] for word in words), told
