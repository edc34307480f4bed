"""What a port costs beside its upstream with the same weights, at sizes so small that calls count and not kernels.

At published sizes the kernels are all there is; `nox -s parity_full` measures those.
"""

import os
import time
from collections.abc import Mapping
from functools import cache, partial
from itertools import cycle
from shutil import which
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Record, Tell
from benchmarks.engine.contestants import Pair, Work
from benchmarks.engine.counts import calls
from benchmarks.engine.figures import Verdict, exact
from benchmarks.engine.timers import ByClock
from benchmarks.engine.watch import watch
from benchmarks.workloads import PORTS, Act, Workload, case
from refiners.parity import CaseRunner
from refiners.parity import Verdict as Parity
from refiners.parity.lanes import select_lanes

# What a port may take at most, of its upstream's time. Others are told.
LIMITS = {"bert": 0.85, "clip-text": 0.85, "unet-sd1": 0.95, "unet-sdxl": 0.95}
# Where objects lie in memory makes equal models differ, so there are several of each.
POOL = 3


@cache
def pool(name: str) -> tuple[Workload, list[tuple[Act, Act]]]:
    """Acts of port and upstream with the same weights, which give the same bits."""
    workload = PORTS[name]()
    pairs = [workload.pair() for _ in range(POOL)]
    for ours, theirs in pairs if not workload.gradients else ():
        assert same_bits(ours(), theirs()), f"{name} differs from upstream, so their times cannot be compared."
    return workload, pairs


def same_bits(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, Mapping):
        return ours.keys() == theirs.keys() and all(same_bits(ours[key], theirs[key]) for key in ours)
    return ours == theirs


def against_upstream(name: str, limit: float | None, **options: Any) -> Pair:
    """The act of the port divided by upstream's."""
    workload, pairs = pool(name)
    ours, theirs = (cycle([pair[side] for pair in pairs]) for side in (0, 1))
    size = sum(parameter.numel() for parameter in workload.build().parameters())
    more = options.pop("facts", {})
    facts = {"workload": name, "against": "upstream", "parameters": size, "dtype": "float32", **more}
    return Pair(contestant=partial(next, ours), reference=partial(next, theirs), limit=limit, facts=facts, **options)


def limited(names: Mapping[str, Any], limits: Mapping[str, float]) -> list[Any]:
    """The names as parameters; those without a limit are measured only where a file of figures is asked for."""
    return [name if name in limits else pytest.param(name, marks=pytest.mark.told) for name in names]


@pytest.mark.parametrize("name", limited(PORTS, LIMITS))
def test_a_port_against_upstream(record: Record, name: str) -> None:
    record(against_upstream(name, LIMITS.get(name), facts={"threads": 1}))


@pytest.mark.told
@pytest.mark.parametrize("name", ["unet-sd1", "step-sd1"])
def test_a_port_against_upstream_on_all_threads(record: Record, name: str) -> None:
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    clock = time.perf_counter
    record(against_upstream(name, None, timer=ByClock(clock), clock=clock, facts={"threads": threads}))


@pytest.mark.told
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch, while inductor is imported
@pytest.mark.parametrize("name", ["bert", "clip-text", "unet-sd1"])
def test_a_compiled_port_against_compiled_upstream(record: Record, name: str) -> None:
    """Both as one graph, for which inductor generates kernels: what is left to differ is what guards the graph.

    Setting the contexts is in the graph, as `docs/concepts/context.md` has it.
    """
    torch.compiler.reset()
    backend = "inductor" if which("g++") else "eager"
    ours, theirs = PORTS[name]().pair(backend)
    facts = {"workload": name, "against": "upstream, compiled", "backend": backend, "threads": 1}
    record(Pair(contestant=lambda: ours, reference=lambda: theirs, limit=None, facts=facts))
    torch.compiler.reset()


@pytest.mark.told
@pytest.mark.parametrize("case_id", ["bert/tiny", "clip/text-l", "unet/sd1"])
def test_seconds_of_a_parity_case(record: Record, case_id: str) -> None:
    """What contributors wait for: all lanes of a case, forward, backward and the float64 truth."""
    found = case(case_id)

    def run(runner: CaseRunner) -> None:
        for lane in select_lanes(found.lanes):
            assert runner.run(lane).verdict is Parity.BITWISE

    record(
        Work(build=lambda _: CaseRunner(found), act=run, n=1, limit=None, facts={"case": case_id}, repeats=1, fewest=3)
    )


@pytest.mark.told
@pytest.mark.parametrize("name", PORTS)
def test_calls_of_a_port_for_each_of_upstream(tell: Tell, name: str) -> None:
    """Python's and C's calls: what a figure in time is made of at this size."""
    ours, theirs = (counted(act) for act in pool(name)[1][0])
    tell(exact(ours / theirs, limit=None, unit="×", workload=name, ours=ours, theirs=theirs))


def counted(act: Act) -> int:
    for _ in range(2):
        act()
    found = calls(act)
    return found.python.total() + found.c.total()


@pytest.mark.told
@pytest.mark.parametrize("name", PORTS)
def test_peak_bytes_of_a_port_for_each_of_upstream(tell: Tell, name: str) -> None:
    ours, theirs = pool(name)[1][0]
    peaks = [watch(act).peak for act in (ours, theirs)]
    tell(exact(peaks[0] / peaks[1], limit=None, unit="×", workload=name, measured=peaks[0], theoretical=peaks[1]))


@pytest.mark.timed
def test_a_port_whose_calls_are_watched_by_six_is_missed() -> None:
    workload = PORTS["unet-sd1"]()
    hooked, act = workload.ready()
    for module in hooked.modules():
        for _ in range(6):
            module.register_forward_hook(lambda *_: None)
    pair = Pair(contestant=lambda: act, reference=lambda: pool("unet-sd1")[1][0][1], limit=LIMITS["unet-sd1"])
    assert pair.figure(2.0).verdict is Verdict.MISSED
