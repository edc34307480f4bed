"""Changes of image size, down and up again.

A U-shaped network halves an image several times and doubles it again. An odd size halves to the same number as the
even size below it, so doubling does not bring it back. `Downsample` therefore pushes the size it sees onto a stack in
the Context, `sampling.shapes`, and `Upsample` pops it. The network that holds both declares that stack:

    def init_context(self) -> Contexts:
        return {"sampling": {"shapes": []}}
"""

from typing import Unpack

from jaxtyping import Float
from torch import Size, Tensor

from refiners.fluxion.layers.basics import Identity
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.combinators import Parallel
from refiners.fluxion.layers.context_access import SetContext, UseContext
from refiners.fluxion.layers.conv import Conv2d
from refiners.fluxion.layers.factory import Factory
from refiners.fluxion.layers.functions import Lambda
from refiners.fluxion.layers.module import Module
from refiners.fluxion.utils import interpolate, pad


class Interpolate(Module):
    """Resizes an image, or anything with pixels, to the size it is given. See `torch.nn.functional.interpolate`.

    Receives:
        x: `Float[Tensor, "batch channels *in_pixels"]`
        shape: the size of each axis of pixels

    Returns:
        `Float[Tensor, "batch channels *shape"]`
    """

    def __init__(self, mode: str = "nearest", antialias: bool = False) -> None:
        super().__init__()
        self.mode = mode
        self.antialias = antialias

    def forward(
        self, x: Float[Tensor, "batch channels *in_pixels"], shape: Size | tuple[int, ...]
    ) -> Float[Tensor, "batch channels *out_pixels"]:
        return interpolate(x, shape, mode=self.mode, antialias=self.antialias)


def push_shape(shapes: list[Size], x: Tensor) -> None:
    """Push the size of an image onto a stack."""
    shapes.append(x.shape[2:])


def pop_shape(shapes: list[Size]) -> Size:
    """Pop the size that was pushed last."""
    return shapes.pop()


def pad_bottom_right(x: Tensor) -> Tensor:
    """One row of zeros below and one column to the right: what a stride of 2 without padding lacks."""
    return pad(x, (0, 1, 0, 1))


class Downsample(Chain):
    """Shrinks an image by a strided convolution of kernel 3.

    With `padding=0` the image is first padded by one pixel below and on the right only. With `register_shape` the
    size of the input is pushed onto `sampling.shapes`, for the `Upsample` that undoes it.

    Receives:
        x: `Float[Tensor, "batch channels height width"]`

    Returns:
        `Float[Tensor, "batch channels height/scale_factor width/scale_factor"]`
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        padding: int = 0,
        register_shape: bool = True,
        **factory: Unpack[Factory],
    ) -> None:
        self.channels = channels
        self.in_channels = channels
        self.out_channels = channels
        self.scale_factor = scale_factor
        self.padding = padding
        layers: list[Module] = [
            Conv2d(channels, channels, kernel_size=3, stride=scale_factor, padding=padding, **factory)
        ]
        if padding == 0:
            layers.insert(0, Lambda(pad_bottom_right))
        if register_shape:
            layers.insert(0, SetContext(context="sampling", key="shapes", callback=push_shape))
        super().__init__(*layers)


class Upsample(Chain):
    """Enlarges an image to the nearest pixels, then smooths it by a convolution of kernel 3.

    The size is `upsample_factor` times the input's, or without a factor the one that `Downsample` pushed last.

    Receives:
        x: `Float[Tensor, "batch channels height width"]`

    Returns:
        `Float[Tensor, "batch channels out_height out_width"]`
    """

    def __init__(self, channels: int, upsample_factor: int | None = None, **factory: Unpack[Factory]) -> None:
        self.channels = channels
        self.upsample_factor = upsample_factor
        size: Module
        if upsample_factor is None:
            size = UseContext(context="sampling", key="shapes").compose(pop_shape)
        else:
            size = Lambda(self._multiply_shape)
        super().__init__(
            Parallel(Identity(), size),
            Interpolate(),
            Conv2d(channels, channels, kernel_size=3, padding=1, **factory),
        )

    def _multiply_shape(self, x: Tensor) -> Size:
        factor = 1 if self.upsample_factor is None else self.upsample_factor
        return Size([size * factor for size in x.shape[2:]])
