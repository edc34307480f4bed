"""Pictures to the pixels that autoencoders read, and back: PIL images and tensors.

Pixels are tensors (batch, channels, height, width) between -1 and 1, whose sides are multiples of what the autoencoder
halves them by. Those of PIL images lie in memory pixel by pixel, not channel by channel: another order of the same
numbers, in which convolutions round otherwise, so that it has to be upstream's.

Follows: `diffusers.image_processor.VaeImageProcessor` 0.42.1.

Differs from upstream:
- There are no numpy arrays, and lists of batches are refused.
- A picture of whose mode the numbers are no levels (a palette, one bit, CMYK) is refused; a mask may have any mode.
- A tensor with values below 0 is taken for pixels that are between -1 and 1 already, without a warning.
- A mask of several channels is refused.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard, cast

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from refiners.errors import InputError
from refiners.fluxion.utils import tensor_to_images

Picture = Image.Image | Tensor | Sequence[Image.Image] | Sequence[Tensor]
"""A picture, or several: PIL images, or tensors (channels, height, width) with values from 0 to 1."""

_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}


def picture_to_pixels(
    picture: Picture,
    height: int | None = None,
    width: int | None = None,
    multiple: int = 8,
    latent_channels: int = 4,
) -> Float[Tensor, "batch channels height width"]:
    """The pixels of pictures, resized: PIL images by Lanczos' filter, tensors to the nearest pixels.

    Args:
        picture: One or several of the same channels. The first one's size is that of all, unless one is given.
            A tensor of as many channels as latents have is returned as it is.
        height: The height to resize to.
        width: The width to resize to.
        multiple: Both are lowered to multiples of it.
        latent_channels: How many channels latents have.

    Returns:
        pixels between -1 and 1, float32 if they come from images

    Raises:
        InputError: (a ValueError) there is no picture, they do not fit one another, or an image has another mode.

    Example:
        >>> picture_to_pixels(Image.new("RGB", (50, 30), "white"), multiple=8).shape
        torch.Size([1, 3, 24, 48])
    """
    if _are_images(several := _several(picture)):
        pixels = _levels(_resize_images(several, height, width, multiple))
    else:
        pixels = _batch(cast(list[Tensor], several))
        if pixels.shape[1] == latent_channels:
            return pixels
        pixels = _resize_tensor(pixels, height, width, multiple)
        if pixels.min() < 0:
            return pixels
    return 2.0 * pixels - 1.0


def mask_to_tensor(
    mask: Picture, height: int | None = None, width: int | None = None, multiple: int = 8
) -> Float[Tensor, "batch 1 height width"]:
    """What is to be painted anew, as ones: where a mask is at least half white once it is resized and grey.

    Args:
        mask: One or several. A tensor may also be (height, width) or (batch, height, width).
        height: The height to resize to.
        width: The width to resize to.
        multiple: Both are lowered to multiples of it.

    Raises:
        InputError: (a ValueError) there is no mask, they do not fit one another, or a tensor has several channels.

    Example:
        >>> mask_to_tensor(Image.new("L", (16, 8), 200)).unique()
        tensor([1.])
    """
    if _are_images(several := _several(mask)):
        shares = _levels([image.convert("L") for image in _resize_images(several, height, width, multiple)])
    else:
        tensors = cast(list[Tensor], several)
        if len(tensors) == 1 and tensors[0].ndim == 3 and not isinstance(mask, Sequence):
            tensors = [tensors[0].unsqueeze(1)]
        shares = _batch([tensor[None] if tensor.ndim == 2 else tensor for tensor in tensors])
        if shares.shape[1] != 1:
            raise InputError(
                f"A mask has one channel; this one has the shape {tuple(shares.shape)}. Give one of its channels, or "
                "an image, which is made grey."
            )
        shares = _resize_tensor(shares, height, width, multiple)
    return (shares >= 0.5).to(shares.dtype)


def pixels_to_unit(
    pixels: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch channels height width"]:
    """Pixels between -1 and 1 as levels from 0 to 1. What lies beyond is cut off."""
    return (pixels * 0.5 + 0.5).clamp(0, 1)


def pixels_to_images(pixels: Float[Tensor, "batch channels height width"]) -> list[Image.Image]:
    """Pixels between -1 and 1 as PIL images, grey for one channel.

    Raises:
        InputError: (an AssertionError) the tensor has other axes, is not floating, or holds NaN.
    """
    return tensor_to_images(pixels_to_unit(pixels).float())


def _several(picture: Picture) -> list[Any]:
    pictures: list[Any] = list(picture) if isinstance(picture, Sequence) else [picture]
    if pictures and any(all(isinstance(one, kind) for one in pictures) for kind in (Image.Image, Tensor)):
        return pictures
    names = ", ".join(sorted({type(one).__name__ for one in pictures})) or "nothing"
    raise InputError(f"A picture is a PIL image or a tensor, or a list of one of the two; got {names}.")


def _are_images(pictures: list[Any]) -> TypeGuard[list[Image.Image]]:
    return isinstance(pictures[0], Image.Image)


def _size(given: tuple[int | None, int | None], own: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Height and width, lowered to multiples."""
    height, width = (size if wanted is None else wanted for wanted, size in zip(given, own, strict=True))
    if height < multiple or width < multiple:
        raise InputError(
            f"A picture of {height} x {width} pixels (height x width) is less than {multiple} on a side, which the "
            "model cannot halve as often as it must. Give a larger height and width."
        )
    return height - height % multiple, width - width % multiple


def _resize_images(
    images: list[Image.Image], height: int | None, width: int | None, multiple: int
) -> list[Image.Image]:
    height, width = _size((height, width), (images[0].height, images[0].width), multiple)
    return [image.resize((width, height), resample=Image.Resampling.LANCZOS) for image in images]


def _levels(images: list[Image.Image]) -> Float[Tensor, "batch channels height width"]:
    modes = {image.mode for image in images}
    if len(modes) != 1 or not modes <= _CHANNELS.keys():
        raise InputError(
            f"Pictures are of one mode, {', '.join(_CHANNELS)}; got {', '.join(sorted(modes))}. Convert them first: "
            'image.convert("RGB").'
        )
    shape = (len(images), images[0].height, images[0].width, _CHANNELS[modes.pop()])
    data = b"".join(image.tobytes() for image in images)
    levels = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape).to(torch.float32) / 255.0
    # Of one channel, pixel by pixel is channel by channel, and has to be called so.
    return levels.view(shape[0], 1, *shape[1:3]) if shape[3] == 1 else levels.permute(0, 3, 1, 2)


def _batch(tensors: list[Tensor]) -> Float[Tensor, "batch channels height width"]:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    batch = tensors[0] if len(tensors) == 1 and tensors[0].ndim == 4 else None
    if batch is None and len(shapes) == 1 and tensors[0].ndim == 3:
        batch = torch.stack(tensors)
    if batch is None:
        raise InputError(
            "Pictures are a tensor (batch, channels, height, width), or one or several of one size (channels, height, "
            f"width); got {', '.join(map(str, sorted(shapes)))}."
        )
    return batch


def _resize_tensor(
    pixels: Tensor, height: int | None, width: int | None, multiple: int
) -> Float[Tensor, "batch channels height width"]:
    own = (pixels.shape[2], pixels.shape[3])
    return functional.interpolate(pixels, size=_size((height, width), own, multiple))
