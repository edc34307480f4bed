"""Where upstream leaves half precision for a moment."""

from collections.abc import Callable

import torch
from torch import Tensor


def in_full_precision(compute: Callable[[Tensor, Tensor], Tensor], down: Tensor, up: Tensor) -> Tensor:
    """Compute from two weights, in float32 if they are of half precision and on the CPU; the result is of their dtype.

    peft does so wherever it merges LoRAs, since matrix products in half precision are slow on many CPUs.
    """
    dtype = down.dtype
    if down.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        return compute(down.float(), up.float()).to(dtype)
    return compute(down, up)
