"""The residual block of diffusion models: two normalised convolutions beside a shortcut.

Follows: `ResnetBlock2D` of diffusers 0.42.1, without a time embedding; a port that has one inserts a node before the
second norm.

Differs from upstream:
- There is no division by an output scale, which is 1 in every published model of these families, and no dropout.
"""

from typing import Any, Unpack

from jaxtyping import Float
from torch import Tensor

import refiners.fluxion.layers as fl


class ContiguousInTraining(fl.Module):
    """Lays an image out channel by channel while a model is trained; convolutions of another layout round otherwise."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return x.contiguous() if self.training else x


class Shortcut(fl.Chain):
    """Brings the input of a block to the channels of its output, on contiguous memory in training, as upstream."""

    def __init__(self, in_channels: int, out_channels: int, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(ContiguousInTraining(), fl.Conv2d(in_channels, out_channels, kernel_size=1, **factory))


class Convolutions(fl.Chain):
    """Norm, activation and convolution, twice."""

    def __init__(
        self, in_channels: int, out_channels: int, num_groups: int, norm_eps: float, **factory: Unpack[fl.Factory]
    ) -> None:
        super().__init__(
            fl.GroupNorm(in_channels, num_groups, eps=norm_eps, **factory),
            fl.SiLU(),
            fl.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, **factory),
            fl.GroupNorm(out_channels, num_groups, eps=norm_eps, **factory),
            fl.SiLU(),
            fl.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, **factory),
        )


class ResidualBlock(fl.Sum):
    """Adds two convolutions to an image, or to what a 1x1 convolution makes of it where the channels change.

    Receives:
        Float[Tensor, "batch in_channels height width"]

    Returns:
        Float[Tensor, "batch out_channels height width"]
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_groups: int = 32,
        norm_eps: float = 1e-5,
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_groups = num_groups
        self.norm_eps = norm_eps
        super().__init__(
            Convolutions(in_channels, out_channels, num_groups, norm_eps, **factory),
            fl.Identity() if in_channels == out_channels else Shortcut(in_channels, out_channels, **factory),
        )

    def _fold(self, folded: Any, output: Any) -> Any:
        # The shortcut runs last and is the first term: where layouts differ, the sum takes that of its first term.
        return output if folded is None else output + folded
