"""Edits of a port for the length of a `with`: what the diagnosis tries, and takes back exactly.

None of them touches the tree: they change an attribute, a weight, or what `forward` does, so that they work on any
module, and leaving the `with` puts back the very objects that were there, after an error too.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from refiners.parity.trace import Operation, Slot, fill_template, tensors_in

_ABSENT = object()

Edit = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Hypothesis:
    """A fault that the port may have."""

    text: str
    """What would make it equal, completing "equal …"."""
    edit: Edit


@contextmanager
def _entry(table: dict[str, Any], name: str, value: Any) -> Generator[None, None, None]:
    before = table.get(name, _ABSENT)
    order = list(table)
    table[name] = value
    try:
        yield
    finally:
        if before is _ABSENT:
            table.pop(name, None)
        else:
            table[name] = before
            for key in order:  # the order of weights is part of a module
                table[key] = table.pop(key)


def attribute(module: nn.Module, name: str, value: Any) -> Edit:
    """A plain attribute has another value."""
    return lambda: _entry(module.__dict__, name, value)


def weight(module: nn.Module, name: str, value: Tensor | None) -> Edit:
    """A parameter or buffer is another tensor, or none."""

    @contextmanager
    def edit() -> Generator[None, None, None]:
        with torch.no_grad():
            given = None if value is None else nn.Parameter(value.detach(), requires_grad=False)
        buffers, parameters = cast("list[dict[str, Any]]", [module.__dict__[t] for t in ("_buffers", "_parameters")])
        with _entry(buffers if name in buffers else parameters, name, given):
            yield

    return edit


def forward(module: nn.Module, wrapper: Callable[..., Any]) -> Edit:
    """`forward` is `wrapper(original forward, *inputs)`."""
    return lambda: _entry(module.__dict__, "forward", partial(wrapper, module.forward))


def before(module: nn.Module, change: Callable[[Tensor], Any]) -> Edit:
    """Its first input is changed."""

    def wrapper(original: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
        return original(change(x), *rest)

    return forward(module, wrapper)


def after(module: nn.Module, change: Callable[[Tensor], Any]) -> Edit:
    """Its output is changed."""

    def wrapper(original: Callable[..., Any], *args: Any) -> Any:
        return change(original(*args))

    return forward(module, wrapper)


def instead(module: nn.Module, function: Callable[[Tensor], Any]) -> Edit:
    """It is another function, of one input."""

    def wrapper(original: Callable[..., Any], x: Tensor) -> Any:
        return function(x)

    return forward(module, wrapper)


def kind(module: nn.Module, other: type[nn.Module]) -> Edit:
    """A module is of another class."""

    @contextmanager
    def edit() -> Generator[None, None, None]:
        before = module.__class__
        module.__class__ = other
        try:
            yield
        finally:
            module.__class__ = before

    return edit


class _Calls(TorchFunctionMode):
    """Calls of one function of torch take other arguments."""

    def __init__(self, function: Any, change: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.change = function, change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.function:
            return self.change(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def calls(module: nn.Module, function: Any, change: Callable[..., Any]) -> Edit:
    """Inside a module, `function(…)` is `change(function, …)`."""

    def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _Calls(function, change):
            return original(*args, **kwargs)

    return forward(module, wrapper)


class _Operations(TorchDispatchMode):
    """One operation among those of a module call is another one."""

    def __init__(self, position: int, ours: Operation, theirs: Operation, order: list[Any]) -> None:
        cast(Any, super()).__init__()
        self.position, self.ours, self.theirs, self.order = position, ours, theirs, order
        self.met = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds, for code that is never compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not self.ours.function:
            return func(*args, **kwargs)
        self.met += 1
        if self.met != self.position + 1:
            return func(*args, **kwargs)
        given = list(tensors_in((args, kwargs)))
        tensors = [given[item] if isinstance(item, int) else item for item in self.order]

        def put(slot: Slot) -> Tensor:
            return tensors[slot.place]

        new_args, new_kwargs = fill_template(self.theirs.template, Slot, put)
        return self.theirs.function(*new_args, **new_kwargs)


def operation(module: nn.Module, position: int, ours: Operation, theirs: Operation, order: list[Any]) -> Edit:
    """Inside a module, one operation is another one.

    Receives:
        module: that runs it.
        position: how many of its operations of that name come before.
        ours, theirs: the port's and upstream's.
        order: for each tensor of upstream's operation, the place of the port's, or a tensor.
    """

    def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _Operations(position, ours, theirs, order):
            return original(*args, **kwargs)

    return forward(module, wrapper)


@contextmanager
def all_of(edits: list[Edit]) -> Generator[None, None, None]:
    """Several edits at once."""
    if not edits:
        yield
        return
    with edits[0](), all_of(edits[1:]):
        yield
