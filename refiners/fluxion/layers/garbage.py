"""Building thousands of objects without Python's search for garbage among them.

CPython searches for cycles that nobody holds after so many new objects, and now and then among all objects that there
are. Beside torch and transformers that takes about 200 ms, several times as long as injecting a LoRA into each layer of
a large model, which makes many objects and no garbage. See docs/decisions/0009.
"""

import gc
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def makes_no_garbage(act: Callable[P, R]) -> Callable[P, R]:
    """Pause the search during each call of a function, unless it is off already; objects are freed as ever."""

    @wraps(act)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not gc.isenabled():
            return act(*args, **kwargs)
        try:
            gc.disable()
            return act(*args, **kwargs)
        finally:
            try:
                _count_all_as_old()
            finally:
                gc.enable()

    return call


def _count_all_as_old() -> None:
    """Or the next new object would set off a search among all that were just built."""
    if gc.get_freeze_count():
        return  # thawed below, what somebody else has frozen would be searched
    try:
        gc.freeze()
    finally:
        gc.unfreeze()
