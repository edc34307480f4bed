"""Normal numbers from generators, drawn in the order in which upstream draws them.

A batch may have one generator, or one for each item. With one for each, an item is drawn by itself, so that it does not
depend on its neighbours. A generator of the CPU draws there, and the numbers are moved: they are the same on every
device.

Follows: `diffusers.utils.torch_utils.randn_tensor` 0.42.1.

Differs from upstream:
- A list of generators whose length is not that of the batch is an error.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from refiners.errors import InputError

Generators = Generator | Sequence[Generator] | None
"""The source of random numbers: one, one for each item of the batch, or torch's own."""


def draw_normal(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch *shape"]:
    """Standard normal numbers of a shape whose first axis is the batch.

    Raises:
        InputError: there are more or fewer generators than items in the batch.
        RuntimeError: (torch's) a generator of another device than the CPU shall draw for another one than its own.
    """
    if generator is None or isinstance(generator, Generator):
        return _draw(shape, generator, device, dtype)
    if len(generator) == 1:  # one for all, as upstream reads it
        return _draw(shape, generator[0], device, dtype)
    if len(generator) != shape[0]:
        raise InputError(
            f"There are {len(generator)} generators for a batch of {shape[0]}. Give one for each item, or a single one."
        )
    return torch.cat([_draw((1, *shape[1:]), one, device, dtype) for one in generator])


def _draw(
    shape: Sequence[int],
    generator: Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    on_cpu = generator is not None and generator.device.type == "cpu"
    drawn = torch.randn(tuple(shape), generator=generator, device="cpu" if on_cpu else device, dtype=dtype)
    return drawn.to(device or "cpu") if on_cpu else drawn
