"""Edits of a tree that are all done, or none of them.

Each primitive edit tells how to undo itself. Inside `transaction()` these notes are kept, and an exception plays them
back, so that a failing injection of many adapters leaves the tree as it was.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager


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


@contextmanager
def transaction() -> Generator[None]:
    """Undo all edits made inside, newest first, if an exception leaves it. Inner transactions join the outer one."""
    if _journal.undos is not None:
        yield
        return
    _journal.undos, _journal.endings = [], []
    try:
        yield
        for act in _journal.endings:
            act()
    except BaseException:
        undos, _journal.undos = _journal.undos, None
        for undo in reversed(undos):
            undo()
        raise
    finally:
        _journal.undos = _journal.endings = None
