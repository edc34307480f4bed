"""Four small models of the kinds that ports are made of, on which `refiners.parity.rounding` is measured."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiners.parity.weights import generator_for

Outputs = Mapping[str, Tensor]


class Block(nn.Module):
    """A pre-norm transformer block, with heads of 8 numbers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        layers = (self.query, self.key, self.value)
        query, key, value = (layer(y).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in layers)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    """Two blocks over words, and a head on the first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(50, dim), nn.Embedding(64, dim)
        self.block_1, self.block_2, self.head = Block(dim), Block(dim), nn.Linear(dim, 3)

    def forward(self, ids: Tensor) -> Outputs:
        x = self.embedding(ids) + self.position(torch.arange(ids.shape[1]))
        x = self.block_2(self.block_1(x))
        return {"hidden": x, "logits": self.head(x[:, 0])}

    @staticmethod
    def draw(dim: int, seed: int) -> Tensor:
        """A batch of ids."""
        return torch.randint(0, 50, (3, 7 + seed % 23), generator=generator_for(seed, "ids"))


class Convolutions(nn.Module):
    """A residual block of a U-Net, between a halving and a doubling of the picture."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, stride=2, padding=1)
        self.norm_1, self.norm_2 = nn.GroupNorm(4, dim), nn.GroupNorm(4, dim)
        self.conv_1, self.conv_2 = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1)
        self.up, self.shift = nn.Conv2d(2 * dim, 4, 1), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Outputs:
        skip = self.stem(x)
        x = self.down(skip)
        shift = self.shift(x.mean((-1, -2)))[:, :, None, None]
        x = x + self.conv_2(F.silu(self.norm_2(self.conv_1(F.silu(self.norm_1(x))) + shift)))
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return {"picture": self.up(torch.cat((x, skip), dim=1))}

    @staticmethod
    def draw(dim: int, seed: int) -> Tensor:
        """A batch of pictures."""
        return torch.randn(2, 3, 8 + 2 * (seed % 5), 12, generator=generator_for(seed, "x"), dtype=torch.float64)


class CrossAttention(nn.Module):
    """Places that look at words under a mask of scores, and a gated feed-forward."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.query = nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False)
        self.key, self.value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.out, self.gated, self.last = nn.Linear(dim, dim), nn.Linear(dim, 6 * dim), nn.Linear(3 * dim, dim)

    def forward(self, x: Tensor) -> Outputs:
        words, places = x[:, :5], x[:, 5:]
        heads = [
            layer(y).unflatten(-1, (-1, 8)).transpose(1, 2)
            for layer, y in ((self.query, self.norm(places)), (self.key, words), (self.value, words))
        ]
        mask = words.mean(-1)[:, None, None, :].expand(-1, heads[0].shape[1], places.shape[1], -1)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=mask)
        places = places + self.out(mixed.transpose(1, 2).flatten(-2))
        given, gate = self.gated(places).chunk(2, dim=-1)
        return {"places": places + self.last(given * F.gelu(gate))}

    @staticmethod
    def draw(dim: int, seed: int) -> Tensor:
        """A batch of words, then places."""
        return torch.randn(3, 12 + seed % 7, dim, generator=generator_for(seed, "x"), dtype=torch.float64)


class Pictures(nn.Module):
    """Attention between the pixels of a picture that convolutions encode and decode, as in an autoencoder."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.encode, self.norm = nn.Conv2d(3, dim, 3, stride=2, padding=1), nn.GroupNorm(8, dim, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.decode = nn.Conv2d(dim, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Outputs:
        x = self.encode(x)
        rows = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = (layer(rows).unsqueeze(1) for layer in (self.query, self.key, self.value))
        mixed = self.out(F.scaled_dot_product_attention(query, key, value).squeeze(1))
        x = x + mixed.transpose(1, 2).unflatten(-1, x.shape[2:])
        return {"picture": self.decode(F.silu(x)), "latents": x}

    @staticmethod
    def draw(dim: int, seed: int) -> Tensor:
        """A batch of pictures."""
        return torch.randn(2, 3, 10, 8 + 2 * (seed % 4), generator=generator_for(seed, "x"), dtype=torch.float64)


Subject = type[Transformer] | type[Convolutions] | type[CrossAttention] | type[Pictures]
SUBJECTS: Sequence[Subject] = (Transformer, Convolutions, CrossAttention, Pictures)
SIZES = (16, 32, 64)
