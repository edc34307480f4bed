"""PIL images and tensors, back and forth.

A tensor of images has the shape (batch, channels, height, width) and values in [0, 1]; one channel is PIL's mode L
(grey), three are RGB, four are RGBA. Pillow is an optional dependency: it is imported when the first image comes out.
"""

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from refiners.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
else:
    Image = object  # so that an annotation needs no Pillow

_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
_MODES = {channels: mode for mode, channels in _CHANNELS.items()}


def image_to_tensor(
    image: Image, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "1 channels height width"]:
    """The pixels of an image, from 0 … 255 to [0, 1], divided in float32 (float64 for that dtype) and then cast.

    Args:
        image: Of mode L, RGB or RGBA.
        device: Where the tensor shall be; torch's default unless given.
        dtype: A floating one; torch's default unless given.

    Raises:
        InputError: (an AssertionError) the image has another mode.
    """
    channels = _CHANNELS.get(image.mode)
    if channels is None:
        raise InputError(
            f"image_to_tensor() takes images of mode {', '.join(_CHANNELS)}, got mode {image.mode} "
            f'({image.width}×{image.height} pixels). Convert it first: image.convert("RGB").'
        )
    dtype = torch.get_default_dtype() if dtype is None else dtype
    device = torch.get_default_device() if device is None else device
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(1, image.height, image.width, channels).permute(0, 3, 1, 2)  # 1 channels height width
    pixels = pixels.to(device=device).to(dtype=torch.promote_types(dtype, torch.float32)) / 255
    return pixels.to(dtype=dtype).contiguous()


def images_to_tensor(
    images: Sequence[Image], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "batch channels height width"]:
    """The pixels of several images of one size and mode. See `image_to_tensor`."""
    kinds = {(image.mode, image.size) for image in images}
    if len(kinds) != 1:
        raise InputError(
            f"images_to_tensor() takes one or more images of one mode and size, got {len(images)} images of "
            f"{sorted(kinds)}. Convert and resize them first."
        )
    return torch.cat([image_to_tensor(image, device=device, dtype=dtype) for image in images])


def tensor_to_images(tensor: Float[Tensor, "batch channels height width"]) -> list[Image]:
    """An image of each element of the batch. Values are clamped to [0, 1] and rounded to the nearest of 0 … 255.

    Raises:
        InputError: (an AssertionError) the tensor has other axes, is not floating, or holds NaN.
    """
    if tensor.ndim != 4 or tensor.shape[1] not in _MODES or not tensor.is_floating_point():
        raise InputError(
            f"tensor_to_images() takes a floating tensor (batch, 1 or 3 or 4, height, width), got {tensor.dtype} of "
            f"shape {tuple(tensor.shape)}."
        )
    if tensor.isnan().any():
        raise InputError(f"tensor_to_images() got NaN in a tensor of shape {tuple(tensor.shape)}.")
    pixels = tensor.detach().to(dtype=torch.promote_types(tensor.dtype, torch.float32))
    pixels = (pixels.clamp(0, 1) * 255).round().to(device="cpu", dtype=torch.uint8)
    pixels = pixels.permute(0, 2, 3, 1).contiguous()  # batch height width channels
    return [_to_image(element, _MODES[tensor.shape[1]]) for element in pixels]


def tensor_to_image(tensor: Float[Tensor, "1 channels height width"]) -> Image:
    """The image of a batch of one. See `tensor_to_images`."""
    if tensor.ndim != 4 or tensor.shape[0] != 1:
        raise InputError(
            f"tensor_to_image() takes one image, (1, channels, height, width), got shape {tuple(tensor.shape)}. "
            "For several use tensor_to_images()."
        )
    return tensor_to_images(tensor)[0]


def _to_image(pixels: Tensor, mode: str) -> Image:
    try:
        from PIL import Image as pil
    except ImportError as error:
        raise ImportError(
            'Images need Pillow, which is not installed. Install it with: pip install "refiners[images]"'
        ) from error
    height, width, _ = pixels.shape
    # Read straight from memory, since torch's way to Python bytes needs numpy.
    data = ctypes.string_at(pixels.data_ptr(), pixels.numel())
    return pil.frombytes(mode, (width, height), data)
