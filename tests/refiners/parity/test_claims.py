"""What is said of a leaf or a module is all that is wrong with it, and nothing is said of what only follows."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refiners.parity.explain import explain_modules
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.reasons.causes import ONLY_ROUNDING
from refiners.parity.weights import fill_informative
from tests.refiners.parity.toys import explained_pair

X = torch.linspace(-2, 2, 2 * 5 * 12, dtype=torch.float64).sin().view(2, 5, 12)
TEXT = torch.linspace(-1, 3, 2 * 3 * 12, dtype=torch.float64).cos().view(2, 3, 12)


class Rms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain


class Attention(nn.Module):
    """Attention whose queries and keys are normalised across all heads, by modules."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.norm_q, self.norm_k = Rms(), Rms()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(text)), self.v(text)
        q, k, v = (y.unflatten(-1, (3, 4)).transpose(1, 2) for y in (q, k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class WrittenOut(nn.Module):
    """The same, whose norms are written out: across all heads, for each head, or not at all."""

    def __init__(self, norm: str = "all", *, is_blind: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.gain_q, self.gain_k = nn.Parameter(torch.ones(12)), nn.Parameter(torch.ones(12))
        self.norm, self.is_blind = norm, is_blind

    def normed(self, y: Tensor, gain: Tensor) -> Tensor:
        if self.norm == "none":
            return y
        heads = y if self.norm == "all" else torch.unflatten(y, -1, (3, 4))
        return (heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + 1e-6)).reshape(y.shape) * gain

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        text = x if self.is_blind else text
        q, k, v = self.normed(self.q(x), self.gain_q), self.normed(self.k(text), self.gain_k), self.v(text)
        q, k, v = (y.unflatten(-1, (3, 4)).transpose(1, 2) for y in (q, k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


SHARED = [f"{name}.{kind}" for name in "qkvo" for kind in ("weight", "bias")]
KEYS = {**{key: key for key in SHARED}, "gain_q": "norm_q.gain", "gain_k": "norm_k.gain"}


def test_a_norm_that_is_done_otherwise_is_not_said_to_be_missing() -> None:
    (fault,) = explained_pair(Attention(), WrittenOut("heads"), KEYS, [X, TEXT]).faults
    assert "missing" not in fault.diagnosis
    assert "the mean is of 12 values, not of 4" in fault.diagnosis


def test_norms_that_are_missing_are_said_to_be() -> None:
    (fault,) = explained_pair(Attention(), WrittenOut("none"), KEYS, [X, TEXT]).faults
    assert "missing" in fault.diagnosis


def test_what_follows_from_an_input_of_another_size_is_not_told_as_well() -> None:
    found = explained_pair(Attention(), WrittenOut(is_blind=True), KEYS, [X, TEXT]).faults
    assert [fault.finding.port for fault in found] == ["k", "v"]
    assert all("[2, 3, 12]" in fault.diagnosis and "[2, 5, 12]" in fault.diagnosis for fault in found)


class Told(nn.Module):
    """A norm, and what it returns is scaled and shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 12)
        self.film = nn.Linear(12, 24)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        scale, shift = self.film(text[:, :1]).chunk(2, dim=-1)
        x = self.first(x)
        return self.last(F.silu(self.told(x, 1 + scale, shift)))

    def told(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x) * scale + shift


class ToldBefore(Told):
    """The same before the norm."""

    def told(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x * scale + shift)


def test_what_is_done_on_the_wrong_side_of_a_norm_is_one_move() -> None:
    keys = {key: key for key in Told().state_dict()}
    (fault,) = explained_pair(Told(), ToldBefore(), keys, [X, TEXT]).faults
    assert fault.diagnosis == "when `mul`, `add` come behind `norm`, not before it, as upstream's do"


class Reader(nn.Module):
    """A layer that reads a text through an activation."""

    def __init__(self, *, is_wrong: bool = False) -> None:
        super().__init__()
        self.own, self.text = nn.Linear(12, 12), nn.Linear(12, 12)
        self.kind = (F.silu, torch.clone)[is_wrong]

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        told = self.text(self.kind(text)).mean(1, keepdim=True)
        return x + F.gelu(self.own(x)) * told


class Readers(nn.Module):
    """Two layers that are given one text."""

    def __init__(self, *, is_wrong: bool = False) -> None:
        super().__init__()
        self.text, self.layers = nn.Linear(12, 12), nn.ModuleList(Reader(is_wrong=is_wrong) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        text = self.text(text)
        for layer in self.layers:
            x = layer(x, text)
        return x


def test_what_each_layer_lacks_is_missing_in_the_layers() -> None:
    keys = {key: key for key in Readers().state_dict()}
    found = explained_pair(Readers(), Readers(is_wrong=True), keys, [X, TEXT]).faults
    assert [fault.finding.port for fault in found] == ["layers.0", "layers.1"]
    assert all("silu" in fault.diagnosis for fault in found)


class Kernel(nn.Linear):
    """A linear layer that adds up in halves."""

    def forward(self, input: Tensor) -> Tensor:
        (a, b), (v, w) = input.chunk(2, -1), self.weight.chunk(2, -1)
        return a @ v.mT + b @ w.mT + self.bias


def test_a_leaf_that_is_written_otherwise_is_said_to_round() -> None:
    lane = Lane("float32")
    with held_equal(lane):
        upstream, port = nn.Sequential(nn.Linear(12, 12)).eval(), nn.Sequential(Kernel(12, 12)).eval()
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        x = X.to(lane.dtype)
        (fault,) = explain_modules(upstream, port, lambda: {"y": upstream(x)}, lambda: {"y": port(x)}).faults
    assert fault.diagnosis == ONLY_ROUNDING
