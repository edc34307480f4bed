"""What Stable Diffusion XL is told of the size of its training pictures, as plain numbers.

Follows: Podell et al., "SDXL" (arXiv:2307.01952), section 2.2.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Size = tuple[int, int]
"""Height and width, in pixels."""


@dataclass(frozen=True, kw_only=True)
class SizeCondition:
    """The picture that the base model shall think it was trained on."""

    original_size: Size
    """Before it was resized; small ones were blurred."""
    target_size: Size
    """After it was resized and cropped."""
    crop: Size = (0, 0)
    """What was cut off above and on the left; (0, 0) centres what is shown."""

    @property
    def numbers(self) -> tuple[float, ...]:
        """As the denoiser reads them."""
        return (*self.original_size, *self.crop, *self.target_size)


@dataclass(frozen=True, kw_only=True)
class AestheticCondition:
    """The picture that the refiner shall think it was trained on."""

    original_size: Size
    crop: Size = (0, 0)
    aesthetic_score: float = 6.0
    """How much people liked it, 1 … 10."""

    @property
    def numbers(self) -> tuple[float, ...]:
        """As the denoiser reads them."""
        return (*self.original_size, *self.crop, self.aesthetic_score)


def time_ids(
    condition: SizeCondition | AestheticCondition,
    num_rows: int,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch numbers"]:
    """The numbers of a condition, a row for each latent."""
    return torch.tensor([condition.numbers], dtype=dtype, device=device).repeat(num_rows, 1)
