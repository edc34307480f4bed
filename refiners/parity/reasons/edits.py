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

from refiners.parity.operations import Operation, Slot, fill_template, tensors_in
from refiners.parity.unchecked import check_axes, refuse

_ABSENT = object()

Edit = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Hypothesis:
    """A fault that the port may have."""

    text: str
    """What would make it equal, completing "equal …"."""
    edit: Edit
    is_vague: bool = False
    """Whether it only says where: told if nothing says more."""


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


Change = Callable[[Any, Any, Any], Any]
"""Called with the function of an operation, its arguments and keyword arguments, in its place."""


class _Operations(TorchDispatchMode):
    """One operation among those of a module call is another one."""

    def __init__(self, position: int, function: Any, change: Change) -> None:
        cast(Any, super()).__init__()
        self.position, self.function, self.change = position, function, change
        self.met = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds, for code that is never compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.function:
            self.met += 1
            if self.met == self.position + 1:
                return self._changed(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _changed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What is done in its place. Torch's own functions trust the number of axes of the views that they ask for."""
        made = self.change(func, args, kwargs)
        if func.is_view:
            check_axes(tensors_in(made), tensors_in(func(*args, **kwargs)))
        return made


def operation(module: nn.Module, position: int, function: Any, change: Change) -> Edit:
    """Inside a module, one operation is another one.

    Receives:
        module: that runs it.
        position: how many of its operations of that function come before.
        function: of the operation.
        change: what is done in its place.
    """

    def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _Operations(position, function, change):
            return original(*args, **kwargs)

    return forward(module, wrapper)


def in_place_of(theirs: Operation, order: list[int]) -> Change:
    """Upstream's operation, whose tensors are the port's in that order."""

    def change(func: Any, args: Any, kwargs: Any) -> Any:
        given = list(tensors_in((args, kwargs)))
        return _run(theirs, [given[place] for place in order])

    return change


def preceded_by(theirs: Operation, place: int) -> Change:
    """Upstream's operation, of one tensor, comes before on the tensor at a place."""

    def change(func: Any, args: Any, kwargs: Any) -> Any:
        places = iter(range(len(list(tensors_in((args, kwargs))))))

        def put(tensor: Tensor) -> Tensor:
            return _run(theirs, [tensor]) if next(places) == place else tensor

        args, kwargs = fill_template((args, kwargs), Tensor, put)
        return func(*args, **kwargs)

    return change


def left_out(func: Any, args: Any, kwargs: Any) -> Any:
    """Nothing: the first tensor passes."""
    return tensors_in((args, kwargs))[0].clone()


def reordered(order: list[int]) -> Change:
    """The tensors that an operation returns stand in another order."""

    def change(func: Any, args: Any, kwargs: Any) -> Any:
        results = list(func(*args, **kwargs))
        return [results[place] for place in order]

    return change


def exchanged(first: int, second: int) -> Change:
    """Two of the tensors that an operation returns change places."""

    def change(func: Any, args: Any, kwargs: Any) -> Any:
        results = list(func(*args, **kwargs))
        results[first], results[second] = results[second], results[first]
        return results

    return change


def _run(theirs: Operation, tensors: list[Tensor]) -> Any:
    def put(slot: Slot) -> Tensor:
        return tensors[slot.place]

    args, kwargs = fill_template(theirs.template, Slot, put)
    refuse(theirs.name, args, tensors)
    return theirs.function(*args, **kwargs)


@contextmanager
def all_of(edits: list[Edit]) -> Generator[None, None, None]:
    """Several edits at once."""
    if not edits:
        yield
        return
    with edits[0](), all_of(edits[1:]):
        yield
