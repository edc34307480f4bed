"""The stages of a UNet: down to a small image and up again, with skips that join both sides at each size.

What a stage on the way down computes is pushed by `StoreSkip` onto the list `unet.residuals` of the Context; on the way
up `ConcatenateSkip` pops it. The size of an enlarged image is that of the skip that comes next, so odd sizes come back
as they were.

Follows: `unet_2d_blocks` of diffusers 0.42.1: `(CrossAttn)DownBlock2D`, `UNetMidBlock2D(CrossAttn)`,
`(CrossAttn)UpBlock2D`, `Downsample2D`, `Upsample2D`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from reference_ports.blocks.residual_block import Convolutions, ResidualBlock
from reference_ports.unet.transformer import CrossAttention2d, TransformerBlock
from refiners.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The numbers of one size of the image, on one side of the U."""

    channels: int
    depths: tuple[int | None, ...]
    """For each residual block, how many transformer blocks come after it; None for no transformer at all."""
    num_heads: int = 8
    text_dim: int = 768
    attention: type[CrossAttention2d] = CrossAttention2d
    block: type[TransformerBlock] = TransformerBlock


class BlockNumbers(fl.Factory):
    """The numbers that all residual blocks of a UNet share."""

    timestep_dim: int
    num_groups: int
    norm_eps: float


class TimestepProjection(fl.Linear):
    """What the time means to the channels of one block."""


class ForEveryPixel(fl.Module):
    """Makes one number for each channel one that is added to every pixel of it.

    Receives:
        Float[Tensor, "batch channels"]

    Returns:
        Float[Tensor, "batch channels 1 1"]
    """

    def forward(self, x: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels 1 1"]:
        return x[:, :, None, None]


class TimestepShift(fl.Residual):
    """Adds to each channel what the time, by the context `range_adapter`, means to it.

    Receives:
        Float[Tensor, "batch channels height width"]

    Returns:
        Float[Tensor, "batch channels height width"]
    """

    def __init__(self, timestep_dim: int, channels: int, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(
            fl.UseContext("range_adapter", "timestep_embedding"),
            fl.SiLU(),
            TimestepProjection(timestep_dim, channels, **factory),
            ForEveryPixel(),
        )


class TimedResidualBlock(ResidualBlock):
    """A residual block that knows the time, which enters after its first convolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        timestep_dim: int,
        num_groups: int = 32,
        norm_eps: float = 1e-5,
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.timestep_dim = timestep_dim
        super().__init__(in_channels, out_channels, num_groups, norm_eps, **factory)
        self.ensure_find(Convolutions).insert_after_type(
            fl.Conv2d, TimestepShift(timestep_dim, out_channels, **factory)
        )


def push_skip(skips: list[Tensor], x: Tensor) -> None:
    """Push an image."""
    skips.append(x)


class StoreSkip(fl.SetContext):
    """Pushes the image onto the skips, and passes it on."""

    def __init__(self) -> None:
        super().__init__("unet", "residuals", callback=push_skip)


class ConcatenateSkip(fl.UseContext):
    """Pops the last skip, and puts its channels behind those of the image.

    Receives:
        x: Float[Tensor, "batch channels height width"]

    Returns:
        Float[Tensor, "batch channels+skip_channels height width"]

    Raises:
        InputError: there is no skip left.
    """

    def __init__(self) -> None:
        super().__init__("unet", "residuals")

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch _ height width"]:  # pyright: ignore[reportIncompatibleMethodOverride]  # one that reads its input as well
        skips: list[Tensor] = super().forward()
        if not skips:
            raise InputError(
                f"{self.get_path()}: no skip is left. Each ConcatenateSkip needs one StoreSkip that ran before it in "
                "the same forward."
            )
        return torch.cat((x, skips.pop()), dim=1)


class EnlargeToSkip(fl.UseContext):
    """Enlarges the image to the size of the skip that comes next, each pixel repeated.

    Receives:
        x: Float[Tensor, "batch channels height width"]

    Returns:
        Float[Tensor, "batch channels skip_height skip_width"]
    """

    def __init__(self) -> None:
        super().__init__("unet", "residuals")

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels _h _w"]:  # pyright: ignore[reportIncompatibleMethodOverride]  # one that reads its input as well
        skips: list[Tensor] = super().forward()
        return nn.functional.interpolate(x, size=skips[-1].shape[2:], mode="nearest")


class Downsample(fl.Conv2d):
    """Halves the height and the width."""

    def __init__(self, channels: int, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(channels, channels, kernel_size=3, stride=2, padding=1, **factory)


class Upsample(fl.Chain):
    """Doubles the height and the width, and smooths the result."""

    def __init__(self, channels: int, **factory: Unpack[fl.Factory]) -> None:
        self.channels = channels
        super().__init__(
            EnlargeToSkip(),
            fl.Conv2d(channels, channels, kernel_size=3, padding=1, **factory),
        )


def _layer(stage: Stage, depth: int | None, in_channels: int, **numbers: Unpack[BlockNumbers]) -> list[fl.Module]:
    """A residual block, and a transformer where the stage has one."""
    factory = fl.Factory(device=numbers.get("device"), dtype=numbers.get("dtype"))
    residual = TimedResidualBlock(in_channels, stage.channels, **numbers)
    if depth is None:
        return [residual]
    groups = numbers["num_groups"]
    return [
        residual,
        stage.attention(stage.channels, stage.text_dim, stage.num_heads, depth, groups, block=stage.block, **factory),
    ]


class DownBlock(fl.Chain):
    """One size on the way down: residual blocks, transformers where the stage has some, and a skip after each.

    Receives:
        Float[Tensor, "batch in_channels height width"]

    Returns:
        Float[Tensor, "batch channels height width"], halved in size if it ends with a `Downsample`
    """

    def __init__(self, stage: Stage, in_channels: int, has_downsample: bool, **numbers: Unpack[BlockNumbers]) -> None:
        self.in_channels = in_channels
        self.channels = stage.channels
        factory = fl.Factory(device=numbers.get("device"), dtype=numbers.get("dtype"))
        layers: list[fl.Module] = []
        for i, depth in enumerate(stage.depths):
            layers += [*_layer(stage, depth, stage.channels if i else in_channels, **numbers), StoreSkip()]
        if has_downsample:
            layers += [Downsample(stage.channels, **factory), StoreSkip()]
        super().__init__(*layers)


class MiddleBlock(fl.Chain):
    """The smallest size: a residual block, then a transformer and a residual block for each further depth."""

    def __init__(self, stage: Stage, **numbers: Unpack[BlockNumbers]) -> None:
        self.channels = stage.channels
        layers: list[fl.Module] = []
        for depth in stage.depths:
            layers += _layer(stage, depth, stage.channels, **numbers)
        super().__init__(*layers)


class UpBlock(fl.Chain):
    """One size on the way up: a skip before each residual block.

    Receives:
        Float[Tensor, "batch in_channels height width"]

    Returns:
        Float[Tensor, "batch channels height width"], doubled in size if it ends with an `Upsample`
    """

    def __init__(
        self,
        stage: Stage,
        in_channels: int,
        skip_channels: Sequence[int],
        has_upsample: bool,
        **numbers: Unpack[BlockNumbers],
    ) -> None:
        self.in_channels = in_channels
        self.channels = stage.channels
        factory = fl.Factory(device=numbers.get("device"), dtype=numbers.get("dtype"))
        layers: list[fl.Module] = []
        for i, (depth, skip) in enumerate(zip(stage.depths, skip_channels, strict=True)):
            before = (stage.channels if i else in_channels) + skip
            layers += [ConcatenateSkip(), *_layer(stage, depth, before, **numbers)]
        if has_upsample:
            layers.append(Upsample(stage.channels, **factory))
        super().__init__(*layers)


def skip_channels(down: Sequence[Stage]) -> list[int]:
    """The channels of the skips that these stages store, the first first."""
    channels = [down[0].channels]
    for stage in down:
        channels += [stage.channels] * (len(stage.depths) + (stage is not down[-1]))
    return channels


def mirror(down: Iterable[Stage]) -> tuple[Stage, ...]:
    """The way up that belongs to a way down: the same stages from the last to the first, each one layer longer."""
    return tuple(replace(stage, depths=(*stage.depths, stage.depths[-1])) for stage in reversed(tuple(down)))


def down_blocks(down: Sequence[Stage], **numbers: Unpack[BlockNumbers]) -> list[DownBlock]:
    """The blocks of a way down."""
    channels = [down[0].channels, *(stage.channels for stage in down)]
    return [
        DownBlock(stage, before, has_downsample=i < len(down) - 1, **numbers)
        for i, (stage, before) in enumerate(zip(down, channels, strict=False))
    ]


def up_blocks(up: Sequence[Stage], skips: list[int], channels: int, **numbers: Unpack[BlockNumbers]) -> list[UpBlock]:
    """The blocks of a way up, which take these skips, the last first, and an image of these channels."""
    blocks: list[UpBlock] = []
    skips = list(skips)
    for i, stage in enumerate(up):
        popped = [skips.pop() for _ in stage.depths]
        blocks.append(UpBlock(stage, channels, popped, has_upsample=i < len(up) - 1, **numbers))
        channels = stage.channels
    return blocks
