"""Kernels that a GPU is told to run: what an act costs at least, however small they are."""

from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# Calls of CUDA that launch something.
LAUNCHES = frozenset({"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"})


def launches(act: Callable[[], object]) -> Counter[str]:
    """How often each way of launching a kernel was called in an act, and `graphs` for those of CUDA graphs."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        act()
        torch.cuda.synchronize()
    return launches_among({event.key: event.count for event in seen.key_averages()})


def launches_among(events: dict[str, int]) -> Counter[str]:
    """Those of the events of a profile that launch something."""
    found = Counter({name: count for name, count in events.items() if name in LAUNCHES})
    graphs = sum(count for name, count in events.items() if name.startswith("cudaGraphLaunch"))
    return found + Counter({"graphs": graphs})
