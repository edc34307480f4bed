"""A limit on the time that anything of a case may take, so that a hang becomes one red line.

In the main thread of a system with POSIX signals an alarm interrupts; elsewhere a watching thread asks the interpreter
to raise in the thread that is late. Both end Python code, loops that never end included; the alarm ends waiting too
(`time.sleep`, a lock, a read). Neither ends a single operation in C that does not return to Python, such as a matrix
product that takes an hour: that is noticed when it returns. Code that catches `BaseException` and goes on cannot be
ended from inside its process at all: run such a case under `timeout` or pytest-xdist.
"""

import ctypes
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from refiners.errors import ParityError

AGAIN = 1.0
"""Seconds after which it is raised once more: a finaliser or a callback of C may have swallowed the first."""


class TimeLimit(ParityError):
    """What a case did took longer than its `time_limit`."""


class TimeIsUp(BaseException):
    """Raised in the middle of anything; no `except Exception` on the way stops it."""

    def __init__(self, where: str = "") -> None:
        super().__init__(where)
        self.where = where

    def as_error(self, seconds: float) -> TimeLimit:
        """What to tell people."""
        where = f" It was at {self.where} when it was stopped." if self.where else ""
        made = TimeLimit(f"it took more than {seconds:g} s, the case's `time_limit`.{where}")
        return made.with_traceback(self.__traceback__)


@contextmanager
def time_limit(seconds: float) -> Generator[None, None, None]:
    """Ends what runs inside when it takes too long.

    Raises:
        TimeLimit: it took longer; the message says where it was.
    """
    in_main = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    try:
        with _alarm(seconds) if in_main else _watcher(seconds):
            yield
    except TimeIsUp as up:
        raise up.as_error(seconds) from up


@contextmanager
def _alarm(seconds: float) -> Generator[None, None, None]:
    def ring(_: int, frame: FrameType | None) -> None:
        raise TimeIsUp(_place(frame))

    # pytest-timeout and others use the same alarm: it is theirs again afterwards, with the time that is left of it.
    started, before = time.monotonic(), signal.signal(signal.SIGALRM, ring)
    outer, interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, outer - (time.monotonic() - started)), interval)


def _place(frame: FrameType | None) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else ""


@contextmanager
def _watcher(seconds: float) -> Generator[None, None, None]:
    late, lock, done = threading.get_ident(), threading.Lock(), threading.Event()

    def watch() -> None:
        wait = seconds
        while not done.wait(wait):
            wait = AGAIN
            with lock:
                if not done.is_set():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(late), ctypes.py_object(TimeIsUp))

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        with lock:
            done.set()
