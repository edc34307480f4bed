"""Functions of tensors: torch's own under one roof, and the two image operations that torch does not have."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional

from refiners.errors import InputError

no_grad = torch.no_grad
"""Inside `with no_grad():`, or a function it decorates, no gradients are recorded."""


def norm(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, ""]:
    """The Euclidean norm of all elements."""
    return cast(Any, torch.linalg).vector_norm(x)


def manual_seed(seed: int) -> None:
    """Seed torch's random generators, on all devices."""
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType] (torch leaves the seed untyped)


def pad(
    x: Shaped[Tensor, "..."], pad: Iterable[int], value: float = 0.0, mode: str = "constant"
) -> Shaped[Tensor, "..."]:
    """Pad the last axes. `pad` lists (before, after) of the last axis, then of the one before it, and so on.

    See `torch.nn.functional.pad`; `value` counts in mode "constant" only.
    """
    return functional.pad(x, list(pad), mode=mode, value=value if mode == "constant" else None)


def interpolate(
    x: Float[Tensor, "batch channels *in_pixels"],
    size: torch.Size | Sequence[int],
    mode: str = "nearest",
    antialias: bool = False,
) -> Float[Tensor, "batch channels *out_pixels"]:
    """Resize an image, or anything with pixels, to `size`. See `torch.nn.functional.interpolate`."""
    return functional.interpolate(x, size=list(size), mode=mode, antialias=antialias)


def normalize(
    tensor: Float[Tensor, "*batch channels height width"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "*batch channels height width"]:
    """Subtract a mean from each channel and divide it by a standard deviation: (x - mean) / std.

    Raises:
        InputError: (an AssertionError) the tensor is not of floats, has fewer than three axes, or a std is 0.
    """
    if not tensor.is_floating_point() or tensor.ndim < 3:
        raise InputError(
            f"normalize() takes a floating tensor (…, channels, height, width), got {summarize_tensor(tensor)}. "
            "Convert it first, for instance with .float() / 255."
        )
    means = torch.as_tensor(mean, dtype=tensor.dtype, device=tensor.device).view(-1, 1, 1)
    stds = torch.as_tensor(std, dtype=tensor.dtype, device=tensor.device).view(-1, 1, 1)
    if not all(std):
        raise InputError(f"normalize() cannot divide by a std of 0, got std={list(std)}.")
    return (tensor - means) / stds


def gaussian_kernel(size: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "size"]:
    """A Gaussian at the integers around 0, scaled to sum to 1."""
    radius = (size - 1) * 0.5
    positions = torch.linspace(-radius, radius, steps=size, dtype=dtype, device=device)
    density = torch.exp(-0.5 * (positions / sigma).pow(2))
    return density / density.sum()


def gaussian_blur(
    tensor: Shaped[Tensor, "*batch channels height width"],
    kernel_size: int | Sequence[int],
    sigma: float | Sequence[float] | None = None,
) -> Shaped[Tensor, "*batch channels height width"]:
    """Blur an image by a Gaussian, reflecting it at its borders. Equal to torchvision's function, to the last bit.

    Args:
        tensor: (channels, height, width), or with a batch before. Integers are blurred in float32 and rounded.
        kernel_size: An odd number of pixels, or two: (along the width, along the height).
        sigma: The standard deviation in pixels, or two. Unless given, 0.15 · kernel_size + 0.35.

    Raises:
        InputError: (an AssertionError) an even kernel, a sigma that is not positive, or a tensor that is no image.
    """
    sizes = [kernel_size] * 2 if isinstance(kernel_size, int) else list(kernel_size)
    sigmas = _blur_sigmas(sizes, sigma)
    if len(sizes) != 2 or any(size < 1 or size % 2 == 0 for size in sizes):
        raise InputError(f"gaussian_blur() takes one odd kernel size, or two, got kernel_size={kernel_size}.")
    if len(sigmas) != 2 or any(s <= 0 for s in sigmas):
        raise InputError(f"gaussian_blur() takes one or two positive sigmas, got sigma={sigma}.")
    if tensor.ndim not in (3, 4):
        raise InputError(f"gaussian_blur() takes (channels, height, width), or a batch, got {tuple(tensor.shape)}.")
    width, height = sizes
    dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
    kernel_x = gaussian_kernel(width, sigmas[0], dtype, tensor.device)
    kernel_y = gaussian_kernel(height, sigmas[1], dtype, tensor.device)
    channels = tensor.shape[-3]
    kernel = torch.outer(kernel_y, kernel_x).expand(channels, 1, height, width)
    x = tensor.to(dtype) if tensor.ndim == 4 else tensor.to(dtype).unsqueeze(0)
    x = functional.pad(x, [width // 2, width // 2, height // 2, height // 2], mode="reflect")
    x = functional.conv2d(x, kernel, groups=channels)
    x = x if tensor.ndim == 4 else x.squeeze(0)
    return x if tensor.is_floating_point() else x.round().to(tensor.dtype)


def _blur_sigmas(sizes: list[int], sigma: float | Sequence[float] | None) -> list[float]:
    if sigma is None:
        return [size * 0.15 + 0.35 for size in sizes]
    sigmas = [float(sigma)] if isinstance(sigma, int | float) else [float(s) for s in sigma]
    return sigmas * 2 if len(sigmas) == 1 else sigmas


def summarize_tensor(tensor: Shaped[Tensor, "..."], /) -> str:
    """One line about a tensor: shape, dtype, device, and statistics where it has values.

    Never raises: a tensor without values (on the meta device, empty, fake, or whose device failed) is described by
    what is known of it.
    """
    facts = [
        f"shape=({', '.join(map(str, tensor.shape))})",
        f"dtype={str(tensor.dtype).removeprefix('torch.')}",
        f"device={tensor.device}",
    ]
    # A tensor whose values cannot be read is the case in which this line is wanted most.
    try:
        facts += _statistics(tensor)
    except Exception as error:
        facts.append(f"values=unreadable ({type(error).__name__})")
    facts.append(f"grad={tensor.requires_grad}")
    return f"Tensor({', '.join(facts)})"


def _statistics(tensor: Tensor) -> list[str]:
    if tensor.is_meta or tensor.numel() == 0:
        return []
    values = tensor.detach()
    values = values.abs() if values.is_complex() else values
    # float64 counts exactly what bfloat16 cannot, but some accelerators do not have it.
    values = values.float() if values.device.type == "mps" else values.double()
    numbers = {
        "min": values.min(),
        "max": values.max(),
        "mean": values.mean(),
        "std": values.std(correction=0),
        "norm": values.square().sum().sqrt(),
    }
    return [f"{name}={number.item():.2f}" for name, number in numbers.items()]


_DTYPE_ALIASES = {"fp16": "float16", "fp32": "float32", "fp64": "float64", "bf16": "bfloat16"}


def str_to_dtype(dtype: str) -> torch.dtype:
    """The dtype of that name: "float32", "torch.float32", "float", "bf16", …

    Raises:
        InputError: (a ValueError) torch has no such dtype.
    """
    name = dtype.strip().lower().removeprefix("torch.")
    found = getattr(torch, _DTYPE_ALIASES.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise InputError(f'Unknown dtype "{dtype}". Use a name of torch, such as "float32", "bfloat16" or "int64".')
    return found


def device_has_bfloat16(device: torch.device | str) -> bool:
    """Whether a device computes in bfloat16 natively. (All CPUs can; GPUs of NVIDIA from compute capability 8.0 on.)"""
    device = torch.device(device)
    if device.type in ("cpu", "meta"):
        return True
    if device.type == "cuda":
        return torch.cuda.is_available() and (
            torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
        )
    try:
        torch.ones(1, dtype=torch.bfloat16, device=device).add_(1)
    except (RuntimeError, TypeError):
        return False
    return True
