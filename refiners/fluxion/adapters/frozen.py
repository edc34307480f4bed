"""A moment of some values, to come back to: containers are copied, tensors are set apart.

Whoever keeps a value for later has to know who keeps its tensors alive. `freeze` gives them separately, in the order
of a walk, and `Frozen.thaw` puts tensors back in their places, in containers that are new each time.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor


@dataclass(frozen=True)
class _Place:
    """Where a tensor was."""

    index: int


class Frozen:
    """What `freeze` made of a value, without its tensors."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def thaw(self, tensors: tuple[Tensor, ...]) -> Any:
        """The value with these tensors in it. A container that it held in two places is one in both."""

        def put_back(leaf: Any) -> Any:
            return tensors[leaf.index] if isinstance(leaf, _Place) else copied(leaf)

        return _rebuild(self._value, put_back, {})


def freeze(value: Any) -> tuple[list[Tensor], Frozen]:
    """The tensors in the dicts, lists, sets and tuples of a value, and all the rest of it."""
    tensors: list[Tensor] = []

    def set_apart(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            return _Place(len(tensors) - 1)
        return copied(leaf)

    rest = _rebuild(value, set_apart, {})
    return tensors, Frozen(rest)


def copied(leaf: Any) -> Any:
    """A copy of a container of another kind, such as a set; anything else is what it is."""
    return copy(cast(Any, leaf)) if isinstance(leaf, dict | list | set) else leaf


def _rebuild(value: Any, leaf_of: Callable[[Any], Any], done: dict[int, Any]) -> Any:
    kind = cast(Any, type(value))
    if kind not in (dict, list, tuple):
        return leaf_of(value)
    if id(value) in done:
        return done[id(value)]
    if kind is tuple:
        made: Any = tuple(_rebuild(item, leaf_of, done) for item in value)
        done[id(value)] = made
    elif kind is list:
        made = done[id(value)] = []
        made.extend(_rebuild(item, leaf_of, done) for item in value)
    else:
        made = done[id(value)] = {}
        made.update({key: _rebuild(item, leaf_of, done) for key, item in cast(dict[Any, Any], value).items()})
    return made
