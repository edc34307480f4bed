"""Torch's global random state and default dtype, changed for a while and put back."""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch


def seed_torch(seed: int) -> None:
    """Seeds the generators that models draw from when they are given none."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]  # torch leaves its decorator untyped
    else:  # without a device, torch would note the seed for one that may come, with a traceback, each time
        torch.default_generator.manual_seed(seed)


def forked_random_state(*, cuda: bool) -> AbstractContextManager[None]:
    """Whatever is drawn or seeded inside leaves torch's generators as they were."""
    devices: list[Any] = list(range(torch.cuda.device_count())) if cuda else []
    return cast(Any, torch.random).fork_rng(devices)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Generator[None, None, None]:
    """Torch's default dtype for what is built inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
