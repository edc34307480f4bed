"""The submodules of a model under types that a checker can follow; torch's own are partly unknown."""

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn


def named_modules(model: nn.Module, *, every_name: bool = False) -> list[tuple[str, nn.Module]]:
    """Path and module of a model and all below it; a module with several names once, or under `every_name`."""
    found = cast(Iterator[tuple[str, nn.Module]], model.named_modules(remove_duplicate=not every_name))
    return list(found)


def modules(model: nn.Module) -> list[nn.Module]:
    """A model and all modules below it, each once."""
    return [module for _, module in named_modules(model)]


def own_state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and persistent buffers that a module itself holds, as they stand in its state dict."""
    transient = module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]  # the only way
    owned: list[tuple[str, Tensor]] = list(module.named_parameters(recurse=False, remove_duplicate=False))
    buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    return owned + [(name, buffer) for name, buffer in buffers if name not in transient]
