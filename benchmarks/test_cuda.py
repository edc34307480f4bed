"""Ports and adapters on a GPU, beside diffusers and peft in the same run: time by events, launches, allocated bytes.

`nox -s benchmarks -- --on cuda --figures FIGURES` measures them; `python -m benchmarks.baselines` compares and records.
Without a GPU they say so, and count as nothing.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.adapter_rows import ADAPTERS, inject_several
from benchmarks.conftest import Record, Tell
from benchmarks.engine.contestants import Pair
from benchmarks.engine.figures import exact
from benchmarks.engine.launches import launches, launches_among
from benchmarks.engine.memory import OnCuda
from benchmarks.engine.timers import ByEvents
from benchmarks.upstream import inject_peft_loras
from benchmarks.workloads import PORTS, PUBLISHED, Act, Workload

MODELS = {**PORTS, **PUBLISHED}
on_a_gpu = pytest.mark.cuda
each_model = pytest.mark.parametrize("name", MODELS)
each_adapter = pytest.mark.parametrize("name", ADAPTERS)
each_size = pytest.mark.parametrize("size", ["unet-sd1", "unet-sd1-published"])


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """Everything is built on the GPU, and gone after."""
    if not torch.cuda.is_available():
        yield
        return
    with torch.device("cuda"):
        yield
    torch.cuda.empty_cache()


def facts_of(workload: Workload, **more: Any) -> dict[str, Any]:
    dtype = str(workload.dtype or torch.float32).removeprefix("torch.")
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in workload.case.port().parameters())
    return {"workload": workload.name, "dtype": dtype, "parameters": size, **more}


def versus(act: Act, other: Act, limit: float | None, *, flush: bool, **facts: Any) -> Pair:
    return Pair(contestant=lambda: act, reference=lambda: other, limit=limit, timer=ByEvents(flush=flush), facts=facts)


def is_published(workload: Workload) -> bool:
    """Where kernels count and not launches, they find an empty cache."""
    return workload.name in PUBLISHED


@on_a_gpu
@each_model
def test_a_port_on_cuda_against_upstream(record: Record, name: str) -> None:
    workload = MODELS[name]()
    ours, theirs = workload.pair()
    facts = facts_of(workload, against="upstream")
    record(versus(ours, theirs, 1.02 if is_published(workload) else None, flush=is_published(workload), **facts))


@on_a_gpu
@each_model
def test_launches_of_a_port_on_cuda(tell: Tell, name: str) -> None:
    workload = MODELS[name]()
    act = workload.ready()[1]
    act()
    tell(exact(launches(act).total(), limit=None, unit="launches", **facts_of(workload)))


@on_a_gpu
@each_model
def test_peak_bytes_of_a_port_on_cuda(tell: Tell, name: str) -> None:
    workload = MODELS[name]()
    tell(exact(peak_of(workload.ready()[1]), limit=None, unit="bytes", **facts_of(workload)))


def peak_of(act: Callable[[], object]) -> int:
    """The most bytes that were allocated beside what was there before."""
    act()
    meter = OnCuda()
    meter.peak()
    act()
    return meter.peak()


def with_loras(workload: Workload, count: int) -> Act:
    model = workload.build()
    inject_several(model, count)
    return torch.no_grad()(workload.port(model))


def with_peft(workload: Workload, count: int) -> Act:
    assert workload.upstream is not None
    model = inject_peft_loras(workload.build_upstream(), count).to("cuda", workload.dtype)
    return torch.no_grad()(workload.upstream(model))


@on_a_gpu
@each_size
@pytest.mark.parametrize("count", [1, 4])
def test_loras_on_cuda_against_peft(record: Record, size: str, count: int) -> None:
    workload = MODELS[size]()
    facts = facts_of(workload, against="peft", stack=count)
    flush = is_published(workload)
    record(versus(with_loras(workload, count), with_peft(workload, count), 1.0, flush=flush, **facts))


@on_a_gpu
@each_size
@each_adapter
def test_an_adapter_on_cuda_against_without(record: Record, size: str, name: str) -> None:
    workload, row = MODELS[size](), ADAPTERS[name]
    model = workload.build()
    row.inject(model)
    act = torch.no_grad()(workload.port(model))
    facts = facts_of(workload, against="base", adapter=name, stack=row.stack)
    record(versus(act, workload.ready()[1], None, flush=is_published(workload), **facts))


@on_a_gpu
@each_size
@each_adapter
def test_bytes_that_an_adapter_adds_on_cuda(tell: Tell, size: str, name: str) -> None:
    """Allocated, in blocks of 512 bytes; never what is reserved."""
    workload = MODELS[size]()
    model = workload.build()
    before = {id(parameter) for parameter in model.parameters()}
    meter = OnCuda()
    eject = ADAPTERS[name].inject(model)
    added = meter.now()
    own = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in before)
    eject()
    del eject
    assert meter.now() == 0, "An ejection left bytes on the GPU."
    tell(exact(added, limit=None, unit="bytes", theoretical=own, measured=added, adapter=name, **facts_of(workload)))


# The logic, without a GPU


def test_launches_are_those_of_kernels_and_graphs() -> None:
    events = {"cudaLaunchKernel": 5, "cuLaunchKernel": 2, "cudaGraphLaunch": 1, "aten::add": 9, "cudaMemcpyAsync": 3}
    assert launches_among(events) == {"cudaLaunchKernel": 5, "cuLaunchKernel": 2, "graphs": 1}


class FakeEvent:
    """An event that notes the time of a clock that is set by hand."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, other: "FakeEvent") -> float:
        return 1000 * (other.at - self.at)


def test_events_time_the_calls_and_not_the_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(seconds: float) -> None:
        FakeEvent.now += seconds

    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    timer = ByEvents(flush=True)
    monkeypatch.setattr(ByEvents, "_fill", lambda self: take(9.0))
    assert timer(partial(take, 0.5), 4) == 0.5
