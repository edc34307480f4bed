"""The engine on machines that are simulated, so that what it has to find is known, and how often it errs is counted."""

import gc
import json
import random
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch

from benchmarks.engine.contestants import Growth, Pair, frozen_garbage
from benchmarks.engine.counts import CHECKOUT, operations, place, python_calls
from benchmarks.engine.figures import Interval, LimitError, Verdict, bootstrap, exact, measure
from benchmarks.engine.memory import mapped_bytes
from refiners.fluxion.utils import load_from_safetensors, save_to_safetensors


class Machine:
    """A machine with neighbours: every call takes a little more or less, and sometimes twice as long for a while."""

    def __init__(self, seed: int, noise: float = 0.05) -> None:
        self.random = random.Random(seed)
        self.noise = noise
        self.now = 0.0
        self.burst_until = 0.0

    def clock(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[], None]:
        def work() -> None:
            if self.random.random() < 0.01:
                self.burst_until = self.now + self.random.uniform(0, 0.05)
            slowness = 2.0 if self.now < self.burst_until else 1.0
            self.now += seconds * slowness * self.random.lognormvariate(0, self.noise)

        return work


def verdicts(ratio: float, runs: int = 60, limit: float = 1.0) -> list[Verdict]:
    with frozen_garbage():
        return [verdict_on(Machine(seed), ratio, limit) for seed in range(runs)]


def verdict_on(machine: Machine, ratio: float, limit: float) -> Verdict:
    pair = Pair(
        contestant=lambda: machine.work(0.001 * ratio),
        reference=lambda: machine.work(0.001),
        limit=limit,
        clock=machine.clock,
    )
    return pair.figure(budget=2.0).verdict


def test_equal_contestants_raise_an_alarm_in_at_most_one_of_a_hundred_runs() -> None:
    assert verdicts(1.0, runs=100).count(Verdict.MISSED) <= 1


def test_a_contestant_that_is_slower_by_a_twentieth_is_found_every_time() -> None:
    assert set(verdicts(1.05)) == {Verdict.MISSED}


def test_a_contestant_that_is_faster_by_a_twentieth_meets_the_limit_every_time() -> None:
    assert set(verdicts(0.95)) == {Verdict.MET}


def test_a_single_slow_draw_does_not_miss_a_limit() -> None:
    draws = iter([9.0, *[0.9] * 15])
    assert measure(lambda: next(draws), limit=1.0, budget=0).verdict is Verdict.MET


def test_a_spent_budget_leaves_a_close_figure_undecided() -> None:
    draws = cycle([0.9, 1.1])
    figure = measure(lambda: next(draws), limit=1.0, budget=0)
    assert figure.verdict is Verdict.UNDECIDED


def test_an_undecided_figure_is_not_green() -> None:
    draws = cycle([0.9, 1.1])
    with pytest.raises(LimitError, match="UNDECIDED"):
        measure(lambda: next(draws), limit=1.0, budget=0).require()


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.8, 1.0, Verdict.MET), (0.9, 1.1, Verdict.UNDECIDED), (1.01, 1.1, Verdict.MISSED)],
    ids=["below", "around", "above"],
)
def test_the_whole_interval_decides(low: float, high: float, verdict: Verdict) -> None:
    assert Interval(median=0.9, low=low, high=high).verdict(1.0) is verdict


@pytest.mark.parametrize(
    ("low", "high", "standing"),
    [(0.9, 0.99, "FASTER"), (1.01, 1.1, "SLOWER"), (0.995, 1.005, "SAME"), (0.9, 1.1, "UNDECIDED")],
    ids=str,
)
def test_a_ratio_says_who_is_faster(low: float, high: float, standing: str) -> None:
    assert Interval(median=(low + high) / 2, low=low, high=high).standing() == standing


def test_the_interval_holds_the_true_median() -> None:
    generator = random.Random(0)
    intervals = [bootstrap([generator.lognormvariate(0, 0.3) for _ in range(32)]) for _ in range(200)]
    assert sum(interval.low <= 1.0 <= interval.high for interval in intervals) >= 0.97 * len(intervals)


def test_the_same_samples_give_the_same_interval() -> None:
    samples = [random.Random(0).random() for _ in range(20)]
    assert bootstrap(samples) == bootstrap(samples)


@pytest.mark.parametrize(("power", "verdict"), [(1, Verdict.MET), (2, Verdict.MISSED)], ids=["linear", "quadratic"])
def test_growth_tells_linear_from_quadratic(power: int, verdict: Verdict) -> None:
    machine = Machine(seed=0)
    growth = Growth(
        build=lambda n: n, act=lambda n: machine.work(0.001 * n**power)(), n=4, limit=2.3, clock=machine.clock
    )
    assert growth.figure(budget=1.0).verdict is verdict


def test_a_figure_is_written_with_its_raw_samples() -> None:
    figure = exact(3, limit=2, unit="calls")
    assert json.loads(json.dumps(figure.as_json())) == {
        "interval": {"median": 3, "low": 3, "high": 3},
        "limit": 2,
        "samples": [3],
        "unit": "calls",
        "facts": {},
        "verdict": "MISSED",
    }


def test_the_garbage_is_thawed_after_a_failure() -> None:
    with pytest.raises(KeyError), frozen_garbage():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_every_python_call_is_counted() -> None:
    def twice() -> None:
        once()
        once()

    def once() -> None:
        pass

    assert python_calls(twice).total() == 2


def test_every_operation_is_counted() -> None:
    x = torch.ones(2)
    assert operations(lambda: (x + x) * x + x) == {"aten.add.Tensor": 2, "aten.mul.Tensor": 1}


def test_only_mapped_tensors_count_as_mapped(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_to_safetensors(path, {"a": torch.ones(1000), "b": torch.ones(10)})
    tensors = load_from_safetensors(path)
    assert mapped_bytes([tensors["a"], tensors["b"].clone()], path) == 4000


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (CHECKOUT / "refiners" / "errors.py", "refiners/errors.py"),
        (
            CHECKOUT / ".nox" / "environment" / "lib" / "python3.11" / "site-packages" / "torch" / "hub.py",
            "torch/hub.py",
        ),
        (Path("/usr/lib/site-packages/torch/hub.py"), "torch/hub.py"),
    ],
)
def test_a_file_is_called_the_same_wherever_its_environment_lies(path: Path, told: str) -> None:
    assert place(str(path)) == told
