"""Utilities around tensors: arithmetic on images, PIL images, files, names.

They know nothing of layers, so that layers may use them.
"""

from refiners.fluxion.utils.files import load_from_safetensors, load_tensors, save_to_safetensors
from refiners.fluxion.utils.images import image_to_tensor, images_to_tensor, tensor_to_image, tensor_to_images
from refiners.fluxion.utils.tensors import (
    device_has_bfloat16,
    gaussian_blur,
    interpolate,
    manual_seed,
    no_grad,
    norm,
    normalize,
    pad,
    str_to_dtype,
    summarize_tensor,
)

__all__ = [
    "device_has_bfloat16",
    "gaussian_blur",
    "image_to_tensor",
    "images_to_tensor",
    "interpolate",
    "load_from_safetensors",
    "load_tensors",
    "manual_seed",
    "no_grad",
    "norm",
    "normalize",
    "pad",
    "save_to_safetensors",
    "str_to_dtype",
    "summarize_tensor",
    "tensor_to_image",
    "tensor_to_images",
]
