"""Edits of a tree that are all done, or none of them.

Each primitive edit tells how to undo itself. Inside `transaction()` these notes are kept, and an exception plays them
back, so that a failing injection of many adapters leaves the tree as it was.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext


class _Journal(threading.local):
    undos: list[Callable[[], None]] | None = None
    endings: list[Callable[[], None]] | None = None


_journal = _Journal()


def note_undo(undo: Callable[[], None]) -> None:
    """Remember how to undo the edit just made, if a transaction is open."""
    if _journal.undos is not None:
        _journal.undos.append(undo)


def at_end(act: Callable[[], None]) -> None:
    """Do something when the edits are all done: at once, unless a transaction is open. It must not fail."""
    if _journal.endings is None:
        act()
    else:
        _journal.endings.append(act)


def transaction() -> AbstractContextManager[None]:
    """Undo all edits made inside, newest first, if an exception leaves it. Inner transactions join the outer one."""
    return _Transaction() if _journal.undos is None else _JOINED


class _Transaction(AbstractContextManager[None]):
    def __enter__(self) -> None:
        _journal.undos, _journal.endings = [], []

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        endings, is_done = _journal.endings or [], False
        try:
            if error is None:
                for act in endings:
                    act()
                is_done = True
        finally:
            undos, _journal.undos = _journal.undos or [], None
            if not is_done:
                for undo in reversed(undos):
                    undo()
            _journal.endings = None


_JOINED = nullcontext()
