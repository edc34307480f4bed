"""Classic mistakes of porting as pairs of small modules that hold the same weights: upstream's way, and the port's.

Both sides are plain `nn.Module`s written apart from each other, as two implementations of one layer are. A port is told
by a keyword how to be wrong, and hides it: no attribute has a telling name.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rope(nn.Module):
    """Queries and keys turned by their places, as in most language models."""

    def __init__(self, layout: str = "halves", base: float = 10_000.0, offset: int = 0) -> None:
        super().__init__()
        self._layout, self._base, self._offset = layout, base, offset
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (p(x).view(2, 6, 2, 8).transpose(1, 2) for p in (self.q, self.k))
        return self.turn(q) @ self.turn(k).transpose(-1, -2)

    def turn(self, x: Tensor) -> Tensor:
        frequencies = self._base ** (-torch.arange(0, 8, 2).to(x) / 8)
        angles = torch.outer(torch.arange(6).to(x) + self._offset, frequencies)
        if self._layout == "halves":
            cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin
        cos, sin = angles.repeat_interleave(2, -1).cos(), angles.repeat_interleave(2, -1).sin()
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos + turned * sin


class Timestep(nn.Module):
    """Sinusoids of a timestep, and a layer on top."""

    def __init__(self, flip: bool = True, shift: float = 0.0, period: float = 10_000.0, scale: float = 1.0) -> None:
        super().__init__()
        self._flip, self._shift, self._period, self._scale = flip, shift, period, scale
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        exponent = -math.log(self._period) * torch.arange(8).to(x) / (8 - self._shift)
        angles = self._scale * (x[:, :1] * 100) * torch.exp(exponent)
        pieces = (angles.cos(), angles.sin()) if self._flip else (angles.sin(), angles.cos())
        return self.linear(torch.cat(pieces, -1))


class Modulated(nn.Module):
    """A norm whose scale and shift come from elsewhere, and a gate behind a layer."""

    def __init__(self, order: tuple[int, int, int] = (0, 1, 2), one: float = 1.0) -> None:
        super().__init__()
        self._order, self._one = order, one
        self.to_all, self.norm, self.linear = nn.Linear(16, 48), nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.to_all(F.silu(x.mean(1, keepdim=True))).chunk(3, -1)
        shift, scale, gate = (pieces[i] for i in self._order)
        return x + gate * self.linear(self.norm(x) * (self._one + scale) + shift)


class Gated(nn.Module):
    """A feed-forward whose gate is one half of a projection."""

    def __init__(self, gate_first: bool = False, approximate: str = "none") -> None:
        super().__init__()
        self._gate_first, self._approximate = gate_first, approximate
        self.up, self.down = nn.Linear(16, 48), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, -1)
        value, gate = (gate, value) if self._gate_first else (value, gate)
        return self.down(value * F.gelu(gate, approximate=self._approximate))


class Attends(nn.Module):
    """Attention with a mask."""

    def __init__(self, swap: bool = False, shift: int = 0, scale: float | None = None, sign: float = 1.0) -> None:
        super().__init__()
        self._swap, self._shift, self._scale, self._sign = swap, shift, scale, sign
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(2, 6, 2, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        mask = self._sign * torch.full((6, 6), -100.0, dtype=x.dtype).triu(1 + self._shift)
        q, k = (k, q) if self._swap else (q, k)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self._scale)
        return self.o(attended.transpose(1, 2).reshape(2, 6, 16))


class Window(nn.Module):
    """Attention to three places: a token's own and the two before it."""

    def __init__(self, back: bool = False) -> None:
        super().__init__()
        self._back = back
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        near = self.by_distance() if self._back else self.by_place(torch.arange(6)[:, None], torch.arange(6))
        return (q @ k.transpose(-1, -2)).masked_fill(~near, -1e4).softmax(-1) @ v

    def by_place(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.ones((), dtype=torch.bool) & (key > query - 3) & (key <= query)

    def by_distance(self) -> Tensor:
        back = torch.arange(6)[:, None] - torch.arange(6)
        return (back >= 0) & (back <= 3)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, order: str = "pre", residual: int = 1) -> None:
        super().__init__()
        self._order, self._residual = order, residual
        self.norm_1, self.norm_2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self._order == "post":
            x = self.norm_1(x + self.first(x))
        else:
            y = self.first(self.norm_1(x))
            for _ in range(self._residual):
                y = x + y
            x = y
        return x + self.second(F.silu(self.norm_2(x)))


class Images(nn.Module):
    """Convolutions, a group norm and resizing."""

    def __init__(
        self,
        groups: int = 4,
        eps: float = 1e-6,
        padding: str = "zeros",
        resize: dict[str, Any] | None = None,
        skip_first: bool = False,
        pad: tuple[int, ...] = (0, 1, 0, 1),
    ) -> None:
        super().__init__()
        self._resize = resize if resize is not None else {"mode": "bilinear", "align_corners": False}
        self._skip_first, self._pad = skip_first, pad
        self.first = nn.Conv2d(3, 16, 3, padding=1, padding_mode=padding)
        self.norm = nn.GroupNorm(groups, 16, eps=eps)
        self.down = nn.Conv2d(16, 16, 3, stride=2)
        self.last = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kept = F.silu(self.norm(self.first(x)))
        low = self.down(F.pad(kept, self._pad))
        high = F.interpolate(low, size=kept.shape[-2:], **self._resize)
        return self.last(torch.cat((kept, high) if self._skip_first else (high, kept), 1))


class Embedded(nn.Module):
    """Tokens with learned places."""

    def __init__(self, offset: int = 0, factor: float = 1.0) -> None:
        super().__init__()
        self._offset, self._factor = offset, factor
        self.tokens, self.places, self.norm = nn.Embedding(9, 16), nn.Embedding(10, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[..., 0].abs() * 4).long().clamp(max=8)
        return self.norm(self._factor * self.tokens(ids) + self.places(torch.arange(6) + self._offset))


TOKENS, PIXELS = (2, 6, 16), (2, 3, 8, 8)

Row = tuple[Callable[..., nn.Module], dict[str, Any], tuple[int, ...], str, tuple[str, ...]]

# name: kind, how the port is told to be wrong, shape of the input, path to blame, words of the diagnosis
FAULTS: dict[str, Row] = {
    "rope-base": (Rope, {"base": 500_000.0}, TOKENS, "", ("the base of the frequencies is 10000", "500000")),
    "rope-layout": (Rope, {"layout": "pairs"}, TOKENS, "", ("half-split",)),
    "rope-offset": (Rope, {"offset": 1}, TOKENS, "", ("without `add", ", 1)")),
    "sin-cos": (Timestep, {"flip": False}, (2, 1), "", ("`cat`", "exchanged")),
    "frequency-shift": (Timestep, {"shift": 1.0}, (2, 1), "", ("8.0, not 7.0",)),
    "period": (Timestep, {"period": 1_000.0}, (2, 1), "", ("-ln(10000)", "-ln(1000)")),
    "timestep-scale": (Timestep, {"scale": 1000.0}, (2, 1), "", ("without `mul", "1000.0")),
    "scale-shift": (Modulated, {"order": (1, 0, 2)}, TOKENS, "", ("pieces 1 and 2", "exchanged")),
    "shift-gate": (Modulated, {"order": (2, 1, 0)}, TOKENS, "", ("pieces 1 and 3", "exchanged")),
    "scale-without-one": (Modulated, {"one": 0.0}, TOKENS, "", ("`add(", "comes before `mul(")),
    "gate-value": (Gated, {"gate_first": True}, TOKENS, "", ("two pieces", "exchanged")),
    "gelu-tanh": (Gated, {"approximate": "tanh"}, TOKENS, "", ("`approximate` is 'none', not 'tanh'",)),
    "query-key": (Attends, {"swap": True}, TOKENS, "", ("`query` and `key` are exchanged",)),
    "mask-off-by-one": (Attends, {"shift": 1}, TOKENS, "", ("`diagonal` is 1, not 2",)),
    "window-too-wide": (Window, {"back": True}, TOKENS, "", ("`lt` is in the place of `le`", "off by one")),
    "mask-sign": (Attends, {"sign": -1.0}, TOKENS, "", ("without `mul", "-1.0")),
    "attention-scale": (Attends, {"scale": 1.0}, TOKENS, "", ("`scale` is None, not 1.0",)),
    "norm-order": (
        Block,
        {"order": "post"},
        TOKENS,
        "first",
        ("receives what `norm_1` returns", "what the model is given"),
    ),
    "residual-missing": (Block, {"residual": 0}, TOKENS, "", ("a missing residual",)),
    "residual-doubled": (Block, {"residual": 2}, TOKENS, "", ("a residual too much",)),
    "groups": (Images, {"groups": 8}, PIXELS, "norm", ("num_groups", "4")),
    "group-norm-eps": (Images, {"eps": 1e-5}, PIXELS, "norm", ("eps", "1e-06")),
    "padding-mode": (Images, {"padding": "reflect"}, PIXELS, "first", ("padding_mode", "zeros")),
    "padding-sides": (Images, {"pad": (1, 0, 1, 0)}, PIXELS, "", ("pad",)),
    "interpolation-mode": (Images, {"resize": {"mode": "bicubic"}}, PIXELS, "", ("bilinear",)),
    "align-corners": (Images, {"resize": {"mode": "bilinear", "align_corners": True}}, PIXELS, "", ("align_corners",)),
    "antialias": (
        Images,
        {"resize": {"mode": "bilinear", "antialias": True}},
        PIXELS,
        "",
        ("antialias=False",),
    ),
    "nearest": (Images, {"resize": {"mode": "nearest"}}, PIXELS, "", ("bilinear",)),
    "skip-order": (Images, {"skip_first": True}, PIXELS, "", ("exchanged",)),
    "position-offset": (Embedded, {"offset": 2}, TOKENS, "", ("without `add", ", 2)")),
    "embedding-scale": (Embedded, {"factor": 4.0}, TOKENS, "", ("without `mul", "4.0")),
}


def both(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """Upstream and its faulty port with random weights of its own, and their input."""
    kind, fault, shape, *_ = FAULTS[name]
    generator = torch.Generator().manual_seed(0)
    upstream, port = kind().to(dtype).eval(), kind(**fault).to(dtype).eval()
    for parameter in upstream.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    port.load_state_dict(upstream.state_dict(), assign=True)
    return upstream, port, torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
