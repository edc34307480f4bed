"""The submodules of a model under types that a checker can follow; torch's own are partly unknown."""

from typing import Any

from torch import Tensor, nn


def named_modules(model: nn.Module, *, every_name: bool = False) -> list[tuple[str, nn.Module]]:
    """Path and module of a model and all below it; a module with several names once, or under `every_name`."""
    found: list[tuple[str, nn.Module]] = []
    _walk(model, "", found, None if every_name else set())
    return found


def _walk(module: Any, path: str, found: list[tuple[str, nn.Module]], seen: set[nn.Module] | None) -> None:
    """As torch's own walk, whose nested generators take many times longer."""
    if seen is not None:
        if module in seen:
            return
        seen.add(module)
    found.append((path, module))
    prefix = f"{path}." if path else ""
    for name, child in module._modules.items():
        if child is not None:
            _walk(child, prefix + name, found, seen)


def modules(model: nn.Module) -> list[nn.Module]:
    """A model and all modules below it, each once."""
    return [module for _, module in named_modules(model)]


def own_state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and persistent buffers that a module itself holds, as they stand in its state dict."""
    own: Any = module
    owned = [(name, parameter) for name, parameter in own._parameters.items() if parameter is not None]
    transient = own._non_persistent_buffers_set
    buffers = own._buffers.items()
    return owned + [(name, buffer) for name, buffer in buffers if buffer is not None and name not in transient]
