"""Exact counts: calls of Python functions and ATen operations, the same in every run on every machine.

A timing tells what a change costs, a count tells that something changed at all. Counts need no interval, no budget and
no quiet machine, so they are what a check on CI can stand on; timings see what counts cannot, such as a list copied by
one call.
"""

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


def python_calls(act: Callable[[], object]) -> Counter[str]:
    """How often each Python function was called by an act, by its qualified name. Its own frame does not count."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            calls[frame.f_code.co_qualname] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(before)
    calls -= Counter([act.__code__.co_qualname] if hasattr(act, "__code__") else [])
    return calls


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(act: Callable[[], object]) -> Counter[str]:
    """How often each ATen operation ran in an act."""
    with _Operations() as mode:
        act()
    return mode.counts
