"""Memory: where the bytes of tensors lie, and what a process needs at its peak. Read from /proc, so on Linux only."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from benchmarks.engine.processes import run_python

MEBIBYTE = 2**20

# Printed by a process of its own: a peak never falls, so an earlier one would hide what is measured here.
_MEASURE = """
from pathlib import Path

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024

{prepare}
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
before, own_before = status("VmRSS"), status("RssAnon")
{act}
print(status("VmHWM") - before, status("RssAnon") - own_before)
"""


def mapped_bytes(tensors: Iterable[Tensor], path: Path) -> int:
    """How many bytes of the tensors are the file itself, mapped into memory."""
    mappings: list[tuple[int, int]] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5)
        if name == str(path.resolve()):
            start, end = addresses.split("-")
            mappings.append((int(start, 16), int(end, 16)))
    return sum(
        tensor.nbytes
        for tensor in tensors
        if any(start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end for start, end in mappings)
    )


class Memory(NamedTuple):
    """By how many bytes something raised the memory of a process.

    Args:
        peak: At its highest, pages of mapped files included, as far as they were read.
        own: At the end, and only what is no page of a file.
    """

    peak: int
    own: int


def memory_of(prepare: str, act: str) -> Memory:
    """What lines of Python need in a fresh process, after other lines were run there."""
    peak, own = run_python(_MEASURE.format(prepare=prepare, act=act)).split()
    return Memory(int(peak), int(own))
