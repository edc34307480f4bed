"""Memory: where the bytes of tensors lie, what an adapter adds to them, and what a process needs at its peak.

What is said of a process is read from /proc, so on Linux only.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.engine.processes import run_python
from benchmarks.engine.watch import Moment, Watch

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


class Memorised(NamedTuple):
    """The bytes of tensors before and after each stage of an adapter's life, and the peaks of the stages between.

    Allocated bytes, never those that an allocator has reserved. All are counted from before the injection, so that the
    base model is 0.
    """

    injected: int
    """After the injection: what the adapter adds."""
    forward_peak: int
    forward: int
    backward_peak: int
    backward: int
    ejected: int
    """After the ejection: 0, or something leaks."""


class Meter(Protocol):
    """Reads the bytes that are allocated."""

    def now(self) -> int: ...

    def peak(self) -> int:
        """The most since the last call of this."""
        ...


class OnCpu:
    """The bytes of storages, by a `Watch` that is open."""

    def __init__(self, seen: Watch) -> None:
        self.seen = seen

    def now(self) -> int:
        return self.seen.current

    def peak(self) -> int:
        highest, self.seen.peak = self.seen.peak, self.seen.current
        return highest


class OnCuda:
    """What PyTorch's allocator has handed out on a GPU; never what it has reserved."""

    def __init__(self, device: int = 0) -> None:
        self.device = device
        torch.cuda.synchronize(device)
        self.base = torch.cuda.memory_allocated(device)

    def now(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device) - self.base

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        highest = torch.cuda.max_memory_allocated(self.device) - self.base
        torch.cuda.reset_peak_memory_stats(self.device)
        return highest


def memorise(
    meter: Meter,
    inject: Callable[[], Callable[[], None]],
    forward: Callable[[], Tensor],
    forget: Callable[[], None],
) -> Memorised:
    """Inject, go forward and backward, and eject.

    Args:
        meter: Reads the memory.
        inject: Injects, and gives what ejects.
        forward: Gives what is gone backward from.
        forget: Drops the gradients of the base.
    """
    eject = inject()
    injected = meter.now()
    meter.peak()
    output = forward()
    after_forward, forward_peak = meter.now(), meter.peak()
    output.backward()
    del output
    after_backward, backward_peak = meter.now(), meter.peak()
    eject()
    del eject
    forget()
    return Memorised(injected, forward_peak, after_forward, backward_peak, after_backward, meter.now())


def over_budget(held: Iterable[Moment], budget: Mapping[str, int]) -> dict[str, int]:
    """By how many bytes each leaf holds more than its budget, `{"path: operation": bytes}`."""
    counted = Counter[str]()
    for moment in held:
        counted[f"{moment.path}: {moment.operation}"] += moment.bytes
    return {place: size - budget.get(place, 0) for place, size in counted.items() if size > budget.get(place, 0)}
