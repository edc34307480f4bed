"""The stages of running a case: whatever a stage raises becomes one line that says where it was."""

import traceback
from collections.abc import Generator
from contextlib import contextmanager

from refiners.errors import ChainError, RefinersError
from refiners.parity.environment import package_behind


class StageError(Exception):
    """Something raised while a stage of a case ran."""

    def __init__(self, stage: str, error: BaseException) -> None:
        super().__init__(stage)
        self.stage, self.error = stage, error


@contextmanager
def stage(name: str) -> Generator[None, None, None]:
    """Inside, everything but Ctrl-C is a `StageError` of that name."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, pytest's Skipped and TimeIsUp are no Exception
        raise StageError(name, error) from error


def shown(error: BaseException) -> str:
    """The last frames of an error, or its tree."""
    try:
        if isinstance(error, ChainError):  # it shows the frames that are not the framework's, and the tree
            return f"ChainError: {error}"
        return "".join(traceback.format_exception(error, limit=-6, chain=False))
    except Exception as other:  # an exception whose text cannot be had
        return f"{type(error).__name__} (it cannot be shown: {type(other).__name__})"


def _text(error: BaseException) -> str:
    try:
        return str(error).strip()
    except Exception as other:
        return f"(it cannot be shown: {type(other).__name__})"


def in_one_line(error: BaseException) -> str:
    """An error in one line, with the node and the package it comes from; all lines of one of ours."""
    cause = error.__cause__ if isinstance(error, ChainError) and error.__cause__ else error
    lines = _text(cause).splitlines() or [""]
    places = [line[3:-1] for line in _text(error).splitlines() if line.startswith("At ") and line.endswith(":")]
    where = f" at `{places[-1]}`" if cause is not error and places else ""
    package = package_behind(error)
    told = "\n".join(lines) if isinstance(cause, RefinersError) else lines[0]
    return f"{type(cause).__name__}: {told}{where}{f' ({package})' if package else ''}"
