"""Where a conversion works until it is done: a folder beside the target, renamed to it at the end.

Whoever looks at the target sees all of it or nothing. The folder says what is being converted, so that only the same
conversion goes on with it.
"""

import json
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refiners.conversion.writing import writing_to
from refiners.errors import FileFormatError, UnwritableFileError

_PLAN = "plan.json"
_LOCK = "lock"


class BusyError(FileFormatError, BlockingIOError):
    """Another process is converting to the same place."""


@contextmanager
def workplace(
    target: Path, plan: Mapping[str, Any], nbytes: int, overwrite: bool = False
) -> Generator[Path, None, None]:
    """A folder to convert in. It stays when the block raises, and is found again by the same conversion.

    Receives:
        target: what the result will be called.
        plan: what is being converted, from where and how: JSON.
        nbytes: how much will be written, to be told at once if the disk has no room.
        overwrite: whether the beginnings of another conversion may be thrown away.

    Raises:
        FileFormatError: another conversion was begun there; another process is at it (then a BlockingIOError).
        UnwritableFileError: (an OSError) the disk has no room, or nothing can be written there.
    """
    folder = target.with_name(f"{target.name}.converting")
    wanted = json.loads(json.dumps(plan))
    with writing_to(target):
        folder.mkdir(exist_ok=True)
    with _locked(folder, target):
        found = _plan_of(folder)
        if found not in (None, wanted):
            if not overwrite:
                raise FileFormatError(
                    f"{folder} holds the beginnings of another conversion, or of one from files that have changed "
                    "since. Delete it, or start over with --force."
                )
            _empty(folder)
        _check_room(folder, target, nbytes)
        with writing_to(target):
            (folder / _PLAN).write_text(json.dumps(plan), encoding="utf-8")
        yield folder


def sources_of(files: Sequence[Path]) -> list[list[Any]]:
    """What tells whether source files are still the same: paths, sizes and times."""
    stats = [(file.resolve(), file.stat()) for file in files]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def tidy(folder: Path) -> None:
    """Takes out of a finished folder what only the work needed."""
    for file in [folder / _PLAN, *folder.glob("*.journal"), *folder.glob("*.partial"), folder / _LOCK]:
        file.unlink(missing_ok=True)


def _plan_of(folder: Path) -> Any:
    try:
        return json.loads((folder / _PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return "unreadable"


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _check_room(folder: Path, target: Path, nbytes: int) -> None:
    # A file that was begun is sparse: its blocks, not its length, are what it has taken already.
    begun = sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if nbytes - begun > free:
        if _plan_of(folder) is None:
            shutil.rmtree(folder)
        raise UnwritableFileError(
            f"{target} cannot be written: it needs {size_of(nbytes - begun)}, and {target.absolute().parent} has "
            f"{size_of(free)} free. Make room, or choose another disk."
        )


def size_of(nbytes: int) -> str:
    """A number of bytes as people say it.

    Example:
        >>> size_of(6_938_040_682)
        '6.9 GB'
    """
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


@contextmanager
def _locked(folder: Path, target: Path) -> Generator[None, None, None]:
    """Holds the folder for this process alone. The system lets go of it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # a system without such locks
        yield
        return
    with writing_to(target):
        handle = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"Another process is converting to {target}. Wait until it is done.") from error
        yield
    finally:
        os.close(handle)
