"""Interrupts: Ctrl-C as Python delivers it, between any two lines and on the entry of any function of the framework."""

import sys
from collections.abc import Callable
from inspect import CO_GENERATOR
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import refiners.fluxion

_ROOM = str(Path(refiners.fluxion.__file__).parent)


def interrupted_at(step: int, act: Callable[[], object]) -> bool:
    """Run an act, and raise a KeyboardInterrupt at a step of it. False: it has fewer, and is done."""
    left = step

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(_ROOM):
            return None
        # A generator is entered to be closed as well, where an interrupt is lost.
        is_generator = bool(frame.f_code.co_flags & CO_GENERATOR)
        if event == "line" or (event == "call" and not is_generator):
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    before, records_gradients = sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        # An interrupt on the way out of `torch.no_grad()` finds torch as defenceless as any `with` block.
        torch.set_grad_enabled(records_gradients)
    return False
