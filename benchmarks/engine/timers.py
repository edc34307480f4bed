"""How an act is timed: in processor time on one thread, by the clock on the wall on all, by events on CUDA."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Act = Callable[[], object]
Clock = Callable[[], float]


class Timer(Protocol):
    """Seconds of one call of an act, of several in a row."""

    def __call__(self, act: Act, calls: int) -> float: ...


@dataclass(frozen=True)
class ByClock:
    """Reads a clock before and after.

    Processor time for acts of one thread: waiting for a busy machine is nobody's cost. Of several threads it would add
    the times up, so there `time.perf_counter` reads the clock on the wall.
    """

    clock: Clock = time.process_time

    def __call__(self, act: Act, calls: int) -> float:
        start = self.clock()
        for _ in range(calls):
            act()
        return (self.clock() - start) / calls


@dataclass(frozen=True)
class ByEvents:
    """Marks the stream of a GPU before and after each call, and waits until the marks are passed.

    `flush` fills more memory than the L2 cache holds between calls, outside of the marks: without it, a small model
    finds its weights in the cache, which a large pipeline never does. Where launching is what takes time, nothing is
    flushed, since the GPU would be busy with that while the launches are made.
    """

    flush: bool = False
    device: int = 0
    _filler: list[Any] = field(default_factory=list[Any], repr=False)

    def __call__(self, act: Act, calls: int) -> float:
        marks: list[tuple[Any, Any]] = []
        torch.cuda.synchronize(self.device)
        for _ in range(calls):
            if self.flush:
                self._fill()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            act()
            end.record()
            marks.append((start, end))
        torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(end) for start, end in marks) / 1000 / calls

    def _fill(self) -> None:
        if not self._filler:
            size = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
            self._filler.append(torch.empty(size, dtype=torch.uint8, device=f"cuda:{self.device}"))
        self._filler[0].zero_()
