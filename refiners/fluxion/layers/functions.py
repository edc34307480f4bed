"""Leaves that hold a function, or change how their Chain runs."""

import inspect
from collections.abc import Callable
from typing import Any

from refiners.fluxion.layers.chain import Returned
from refiners.fluxion.layers.module import FunctionModule, Module


class Lambda(FunctionModule):
    """Calls a function. For one line that needs no name of its own in the tree; anything longer is a layer.

    Example:
        >>> import torch
        >>> import refiners.fluxion.layers as fl
        >>> fl.Lambda(torch.tanh)(torch.zeros(1))
        tensor([0.])
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        super().__init__()
        self.func = func

    def forward(self, *args: Any) -> Any:
        return self.func(*args)

    def __str__(self) -> str:
        func = self.__dict__.get("func")
        name = getattr(func, "__name__", type(func).__name__)
        try:
            signature = str(inspect.signature(func)) if callable(func) else ""
        except ValueError:  # a function written in C may not say
            signature = "(...)"
        return f"{type(self).__name__}({name}{signature})"


class Return(Module):
    """Ends the Chain it stands in, which returns what this layer was given."""

    def forward(self, *args: Any) -> Any:
        return Returned(args[0] if len(args) == 1 else args)


class Breakpoint(Module):
    """Stops in the debugger each time it is called, and returns its inputs.

    Args:
        vscode: Use debugpy, the debugger of Visual Studio Code, if it is attached; else Python's own.
    """

    def __init__(self, vscode: bool = True) -> None:
        super().__init__()
        self.vscode = vscode

    def forward(self, *args: Any) -> Any:
        if self.vscode and _is_debugpy_attached():
            import debugpy  # pyright: ignore[reportMissingImports] (present only under the debugger)

            debugpy.breakpoint()  # pyright: ignore[reportUnknownMemberType] (untyped)
        else:
            breakpoint()
        return args[0] if len(args) == 1 else args


def _is_debugpy_attached() -> bool:
    import sys

    debugpy = sys.modules.get("debugpy")
    return debugpy is not None and debugpy.is_client_connected()
