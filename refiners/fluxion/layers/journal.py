"""Edits of a tree that are all done, or none of them.

Each primitive edit tells how to undo itself, before it is done. In a function that is `all_or_nothing` these notes are
kept, and an exception plays them back, so that a failing injection of many adapters leaves the tree as it was.

An interrupt (Ctrl-C) may come between any two steps of Python, so also while edits are undone. An undo that it has cut
short is played once more, which is why each of them may be played twice. No Python code can catch an interrupt on the
very entry of `__exit__` of a `with` block: what users call is therefore a function that is `all_or_nothing`, where all
of it is inside of a `try`.
"""

import threading
from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

P = ParamSpec("P")
R = TypeVar("R")

Acts = list[Callable[[], None]]


class _Journal(threading.local):
    undos: Acts | None = None
    endings: Acts | None = None
    # What is being undone, the newest last.
    undoing: Acts | None = None


_journal = _Journal()


def note_undo(undo: Callable[[], None]) -> None:
    """Remember how to undo the edit about to be made, if a transaction is open. It may be played twice."""
    if _journal.undos is not None:
        _journal.undos.append(undo)


def at_end(act: Callable[[], None]) -> None:
    """Do something when the edits are all done: at once, unless a transaction is open. It must not fail."""
    if _journal.endings is None:
        act()
    else:
        _journal.endings.append(act)


def all_or_nothing(act: Callable[P, R]) -> Callable[P, R]:
    """Undo all edits that a call makes, newest first, if an exception leaves it. Inner calls join the outer one."""

    @wraps(act)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _journal.undos is not None:
            return act(*args, **kwargs)
        try:
            try:
                _begin()
                result = act(*args, **kwargs)
                _commit()
            except BaseException:
                _undo_all()
                raise
        except BaseException:
            # As if nothing had cut the first one short.
            _undo_all()
            raise
        return result

    return call


def note_values(tensors: Iterable[Tensor]) -> None:
    """Remember the values of tensors that are about to be written to, if a transaction is open."""
    if _journal.undos is None:
        return
    plain: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        values = tensor.detach() if tensor.requires_grad else tensor
        if type(values) is Tensor or type(values) is Parameter:
            plain.setdefault((values.device, values.dtype), []).append(values)
        else:  # parts of a tensor that several processes share
            note_undo(partial(_copy, values, values.clone()))
    for group in plain.values():
        # All in one piece: many small pieces of fresh memory take several times as long.
        note_undo(partial(_put_back, group, torch.cat([values.reshape(-1) for values in group])))


def _put_back(tensors: list[Tensor], before: Tensor) -> None:
    start = 0
    for values in tensors:
        end = start + values.numel()
        _copy(values, before[start:end].view(values.shape))
        start = end


def _copy(values: Tensor, before: Tensor) -> None:
    values.copy_(before)


def _begin() -> None:
    _journal.undos, _journal.endings, _journal.undoing = [], [], None


def _commit() -> None:
    for act in _journal.endings or ():
        act()
    _journal.undos = None
    _journal.endings = None


def _undo_all() -> None:
    """Play back what is not committed. Called again, it goes on where an interrupt has stopped it."""
    if _journal.undos is not None:
        _journal.undoing, _journal.endings = _journal.undos, None
        _journal.undos = None
    while _journal.undoing:
        _journal.undoing[-1]()
        _journal.undoing.pop()
