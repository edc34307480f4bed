"""Large files written tensor by tensor: never a half under the final name, and continued after they were interrupted.

A file grows beside a journal that notes each finished tensor with its digest. Killed at any moment, the work goes on
behind the last line of the journal. At the end all bytes are read again and compared with the digests.
"""

import ctypes
import errno
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from refiners.conversion.header import Header
from refiners.errors import FileFormatError, UnwritableFileError

_CHUNK = 2**24
_CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: a tensor was written, or read again.

    Attributes:
        part: the file, such as `unet`.
        key: the tensor.
        nbytes: how many bytes it has.
        kept: it was written before the conversion was interrupted.
        verified: it was read again and compared, not written.
    """

    part: str
    key: str
    nbytes: int
    kept: bool = False
    verified: bool = False


Report = Callable[[Progress], None]


class Finished(NamedTuple):
    """A tensor that is written: the SHA-256 of its bytes, and what it holds that is no number."""

    digest: str
    not_finite: str


class StreamedFile:
    """A safetensors file that is written tensor by tensor in a folder of its own.

    Receives:
        folder: where it is written.
        name: the file in it.
        header: what it will hold.

    Raises:
        UnwritableFileError: (an OSError) the disk is full, or nothing can be written there.
    """

    def __init__(self, folder: Path, name: str, header: Header) -> None:
        self.path = folder / name
        self._partial = folder / f"{name}.partial"
        self._journal = folder / f"{name}.journal"
        self.header = header
        self.header_digest = hashlib.sha256(header.encode()).hexdigest()
        self.finished: dict[str, Finished] = self._finished()

    def _finished(self) -> dict[str, Finished]:
        """What an earlier attempt at the same file has written."""
        if not self._journal.is_file() or not (self.path.is_file() or self._partial.is_file()):
            return {}
        first, *lines = self._journal.read_text(encoding="utf-8").split("\n")
        if first != self.header_digest:
            return {}
        # What comes after the last line feed is nothing, or a line that was cut off.
        found = {key: Finished(digest, what) for key, digest, what in map(json.loads, lines[:-1])}
        return {key: finished for key, finished in found.items() if key in self.header.places}

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of the bytes of each finished tensor, in the order of the file."""
        return {key: self.finished[key].digest for key in self.header.places if key in self.finished}

    @property
    def not_finite(self) -> dict[str, str]:
        """The tensors with values that are no numbers: `NaN`, or `infinity` and why."""
        return {key: finished.not_finite for key, finished in self.finished.items() if finished.not_finite}

    @property
    def complete(self) -> bool:
        """Whether an earlier attempt has written and verified all of it."""
        return self.path.is_file() and self.finished.keys() == self.header.places.keys()

    def write(self, weights: Mapping[str, Tensor], part: str = "", report: Report | None = None) -> None:
        """Writes the tensors that are not finished, reads all of them again, and gives the file its name.

        Receives:
            weights: the tensors by key.
            part: what the file is called in reports.
            report: called after each tensor.
        """
        with writing_to(self.path):
            self._begin()
            file, journal = self._partial.open("r+b"), self._journal.open("ab", buffering=0)
        with file, journal:
            for key, place in self.header.places.items():
                kept = key in self.finished
                if not kept:
                    given = weights[key]
                    made = given.detach().cpu().to(place.dtype).contiguous()
                    with writing_to(self.path):
                        self._write(file, journal, key, made, _not_finite(given, made))
                if report is not None:
                    report(Progress(part, key, place.nbytes, kept=kept))
            with writing_to(self.path):
                file.flush()
                os.fsync(file.fileno())
        self._verify(part, report)
        with writing_to(self.path):
            self._partial.replace(self.path)

    def _begin(self) -> None:
        """The file and its journal, begun anew unless there is something to keep."""
        lines = [self._line(key, finished) for key, finished in self.finished.items()]
        self._journal.write_text(f"{self.header_digest}\n{''.join(lines)}", encoding="utf-8")
        if not self.finished:
            with self._partial.open("wb") as file:
                file.write(self.header.encode())
                file.truncate(self.header.size)

    def _line(self, key: str, finished: Finished) -> str:
        return json.dumps([key, finished.digest, finished.not_finite]) + "\n"

    def _write(self, file: BinaryIO, journal: BinaryIO, key: str, tensor: Tensor, not_finite: str) -> None:
        data = memory_of(tensor)
        file.seek(self.header.data_start + self.header.places[key].start)
        file.write(data)
        file.flush()
        self.finished[key] = Finished(hashlib.sha256(data).hexdigest(), not_finite)
        journal.write(self._line(key, self.finished[key]).encode())

    def _verify(self, part: str, report: Report | None) -> None:
        wrong = list(differing(self._partial, self.header, self.digests, part, report))
        if wrong:
            self._journal.unlink()
            self._partial.unlink()
            raise UnwritableFileError(
                f"{self.path} was written, and reading it again gives other bytes at {', '.join(wrong[:5])}: the disk "
                "or the memory is at fault. It was removed. Convert again, on another disk if this comes back."
            )


def differing(
    path: Path, header: Header, digests: Mapping[str, str], part: str = "", report: Report | None = None
) -> Iterator[str]:
    """The tensors of a file whose bytes do not have these digests. The bytes are read from the disk if it can be."""
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for key, place in header.places.items():
            file.seek(header.data_start + place.start)
            if _digest(file, place.nbytes) != digests.get(key):
                yield key
            if report is not None:
                report(Progress(part, key, place.nbytes, verified=True))


def digest_of(path: Path) -> str:
    """The SHA-256 of a whole file."""
    with path.open("rb") as file:
        return _digest(file, path.stat().st_size)


def _digest(file: BinaryIO, nbytes: int) -> str:
    digest = hashlib.sha256()
    while nbytes > 0:
        chunk = file.read(min(nbytes, _CHUNK))
        if not chunk:
            break
        digest.update(chunk)
        nbytes -= len(chunk)
    return digest.hexdigest()


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, where they are."""
    if not tensor.nbytes:
        return memoryview(b"")
    # The array looks at the tensor's memory and does not own it: the caller keeps the tensor.
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _not_finite(given: Tensor, made: Tensor) -> str:
    """What a tensor holds that is no number, "" if it holds numbers only."""
    what = _extremes(made)
    if what == "infinity" and given.dtype != made.dtype and not _extremes(given):
        return f"infinity: its values are too large for {str(made.dtype).removeprefix('torch.')}"
    return what


def _extremes(tensor: Tensor) -> str:
    if tensor.dtype not in _CHECKED or not tensor.numel():
        return ""
    lowest, highest = torch.aminmax(tensor)
    if lowest.isnan() or highest.isnan():
        return "NaN"
    return "infinity" if lowest.isinf() or highest.isinf() else ""


@contextmanager
def writing_to(path: Path) -> Generator[None, None, None]:
    """Turns what the system says while a path is written to into one typed error."""
    try:
        yield
    except FileFormatError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = (
            "What is done is kept: make room and run it again, and it goes on from there."
            if full
            else "Choose a path in a folder that exists and that you may write to."
        )
        raise UnwritableFileError(f"{path} cannot be written: {error.strerror or error}. {advice}") from error
