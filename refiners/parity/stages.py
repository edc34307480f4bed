"""The stages of running a case: whatever a stage raises becomes one line that says where it was."""

import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import nn

from refiners.errors import ChainError, RefinersError
from refiners.parity.environment import package_behind
from refiners.parity.influence import some


class StageError(Exception):
    """Something raised while a stage of a case ran."""

    def __init__(self, stage: str, error: BaseException, hint: str = "") -> None:
        super().__init__(stage)
        self.stage, self.error, self.hint = stage, error, hint


@contextmanager
def stage(name: str, hint: Callable[[], str] = str) -> Generator[None, None, None]:
    """Inside, everything but Ctrl-C is a `StageError` of that name, with what a hint says then."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, pytest's Skipped and TimeIsUp are no Exception
        raise StageError(name, error, hint()) from error


def of_other_dtypes(model: nn.Module, dtype: torch.dtype) -> str:
    """What to do where a model has weights that do not follow the default dtype; "" if all do."""
    parameters = model.named_parameters()
    other = {name: p.dtype for name, p in parameters if p.is_floating_point() and p.dtype != dtype}
    if not other:
        return ""
    held = ", ".join(str(one).removeprefix("torch.") for one in dict.fromkeys(other.values()))
    return (
        f"; {some(list(other))} hold {held} whatever the default dtype is, as what `torch.FloatTensor` makes does: "
        "let the case's builder end with `.to(torch.get_default_dtype())`"
    )


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
