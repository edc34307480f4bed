"""Large pictures and large batches in little memory: adapters that run a side of an autoencoder piece by piece.

A side is its encoder or its decoder. `SlicingAdapter` gives it one item of the batch at a time. A tiling adapter gives
it overlapping tiles, whose borders it blends; that changes the result a little, since a tile does not see the others.
With both, slicing stands outside.

Follows: `enable_slicing` and `enable_tiling` of `AutoencoderKL` and `AutoencoderTiny` of diffusers 0.42.1.

Differs from upstream:
- The channels of a blended result are those of its tiles (upstream's `AutoencoderTiny` takes 4 latent channels and 3
  colours for granted, and fails on others).
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

import refiners.fluxion.layers as fl


class SlicingAdapter(fl.Chain, fl.Adapter[fl.Chain]):
    """Runs its target on one item of the batch at a time."""

    def __init__(self, target: fl.Chain) -> None:
        with self.setup_adapter(target):
            super().__init__(target)

    def forward(self, *args: Tensor) -> Tensor:
        (x,) = args
        if x.shape[0] == 1:
            return super().forward(x)
        run = super().forward
        return torch.cat([run(x[i : i + 1]) for i in range(x.shape[0])])


class TilingAdapter(fl.Chain, fl.Adapter[fl.Chain]):
    """Runs its target on overlapping square tiles. A tile is blended with the one above and the one on its left.

    What is no larger than a tile is run whole.

    Receives:
        x: Float[Tensor, "batch channels height width"]

    Returns:
        Float[Tensor, "batch out_channels out_height out_width"]
    """

    def __init__(self, target: fl.Chain, tile_size: int, out_tile_size: int, overlap: float = 0.25) -> None:
        self.tile_size = tile_size
        self.out_tile_size = out_tile_size
        self.overlap = overlap
        with self.setup_adapter(target):
            super().__init__(target)

    def forward(self, *args: Tensor) -> Tensor:
        (x,) = args
        if max(x.shape[-2:]) <= self.tile_size:
            return super().forward(x)
        run = super().forward
        size, step = self.tile_size, int(self.tile_size * (1 - self.overlap))
        rows = [
            [run(x[:, :, i : i + size, j : j + size]) for j in range(0, x.shape[3], step)]
            for i in range(0, x.shape[2], step)
        ]
        return self._join(rows)

    def _join(self, rows: list[list[Tensor]]) -> Tensor:
        extent = int(self.out_tile_size * self.overlap)
        kept = self.out_tile_size - extent
        joined: list[Tensor] = []
        for i, row in enumerate(rows):
            tiles: list[Tensor] = []
            for j, tile in enumerate(row):
                # In place: the tiles below and on the right blend with what has been blended.
                if i > 0:
                    blend_rows(rows[i - 1][j], tile, extent)
                if j > 0:
                    blend_columns(row[j - 1], tile, extent)
                # Here and not after the row: gradients add up in the reverse order of the operations.
                tiles.append(tile[:, :, :kept, :kept])
            joined.append(torch.cat(tiles, dim=3))
        return torch.cat(joined, dim=2)


def blend_rows(above: Tensor, tile: Tensor, extent: int) -> None:
    """Fade the last rows of a tile into the first rows of the tile below, which is changed in place."""
    extent = min(above.shape[2], tile.shape[2], extent)
    for y in range(extent):
        share = y / extent
        tile[:, :, y, :] = above[:, :, y - extent, :] * (1 - share) + tile[:, :, y, :] * share


def blend_columns(left: Tensor, tile: Tensor, extent: int) -> None:
    """Fade the last columns of a tile into the first columns of the next, which is changed in place."""
    extent = min(left.shape[3], tile.shape[3], extent)
    for x in range(extent):
        share = x / extent
        tile[:, :, :, x] = left[:, :, :, x - extent] * (1 - share) + tile[:, :, :, x] * share


class RampTilingAdapter(TilingAdapter):
    """Runs its target on overlapping square tiles, always. A tile fades in over what is there, by a linear ramp.

    The result has torch's default dtype, as upstream's.

    Args:
        target: The encoder or the decoder.
        tile_size: The side of a tile.
        scale: How many pixels of the result one pixel of the input makes, and how many it takes: (8, 1) for a decoder
            that enlarges 8 times, (1, 8) for its encoder.
        overlap: The share of a tile that its neighbour sees too.
    """

    def __init__(self, target: fl.Chain, tile_size: int, scale: tuple[int, int], overlap: float = 0.125) -> None:
        self.scale = scale
        super().__init__(target, tile_size, tile_size * scale[0] // scale[1], overlap)

    def forward(self, *args: Tensor) -> Tensor:
        (x,) = args
        run, ramps, result = fl.Chain.forward, self._ramps(x.device), None
        for i, j in self._corners(x):
            tile = run(self, x[..., i : i + self.tile_size, j : j + self.tile_size])
            if result is None:
                height, width = (self._scaled(size) for size in x.shape[-2:])
                result = torch.zeros(x.shape[0], tile.shape[1], height, width, device=x.device)
            rows, columns = (slice(self._scaled(k), self._scaled(k + self.tile_size)) for k in (i, j))
            place = result[..., rows, columns]
            # At the border of the picture there is nothing to fade in over.
            down, across = (torch.ones_like(ramp) if k == 0 else ramp for k, ramp in zip((i, j), ramps, strict=True))
            weight = (down * across)[..., : tile.shape[-2], : tile.shape[-1]]
            place.copy_(weight * tile + (1 - weight) * place)
        assert result is not None
        return result

    def _corners(self, x: Tensor) -> Iterator[tuple[int, int]]:
        step = self.tile_size - int(self.tile_size * self.overlap)
        for i in range(0, x.shape[-2], step):
            for j in range(0, x.shape[-1], step):
                yield i, j

    def _scaled(self, size: int) -> int:
        return size * self.scale[0] // self.scale[1]

    def _ramps(self, device: torch.device) -> Float[Tensor, "2 size size"]:
        """How much each pixel of a tile counts: it rises from 0 to 1 over the overlap, downwards and across."""
        rising = torch.arange(float(self.out_tile_size)) / (self._scaled(int(self.tile_size * self.overlap)) - 1)
        return torch.stack(torch.meshgrid([rising] * 2, indexing="ij")).clamp(0, 1).to(device)
