"""The error rates of the timings: on simulated machines, and in a few runs here. `nox -s benchmark_gate` makes many."""

import itertools

import pytest
import torch

from benchmarks.engine import gate as engine
from benchmarks.engine.contestants import Pair, frozen_garbage
from benchmarks.engine.figures import Standing
from benchmarks.engine.gate import Gate, Tries, binomial
from benchmarks.gate import chain
from benchmarks.test_engine import Machine

RUNS = 100


def simulated(calls: int) -> Tries:
    tries = Tries()
    with frozen_garbage():
        for seed in range(RUNS):
            machine = Machine(seed)
            contest = Pair(
                contestant=lambda machine=machine: machine.work(0.001 * calls / engine.CALLS),
                reference=lambda machine=machine: machine.work(0.001),
                limit=None,
                clock=machine.clock,
            )
            tries.standings[str(contest.figure(2.0).standing)] += 1
    return tries


def test_equal_contestants_are_called_different_in_at_most_one_of_a_hundred_simulated_runs() -> None:
    tries = simulated(engine.CALLS)
    assert tries.share(Standing.SLOWER, Standing.FASTER)[1] <= engine.MOST_ALARMS


def test_a_twentieth_more_is_found_in_nearly_all_simulated_runs() -> None:
    tries = simulated(engine.CALLS + engine.MORE)
    assert tries.share(Standing.SLOWER)[1] >= engine.LEAST_POWER


@pytest.mark.timed
@torch.no_grad()
def test_a_few_real_runs_find_twice_the_work() -> None:
    """On any machine. A twentieth more is found only where little else runs, of which three runs can prove nothing."""
    gates = engine.measure_gates({"chain": chain}, runs=3, minutes=0.2, seconds=1.0, more=engine.CALLS)
    tries = gates["chain"]
    assert tries.equal.share(Standing.SLOWER)[0] <= 1
    assert tries.slower.share(Standing.SLOWER)[0] == tries.slower.runs > 0


def test_too_few_runs_are_not_trusted() -> None:
    gate = Gate(Tries(), Tries())
    gate.equal.standings.update({"SAME": 10})
    gate.slower.standings.update({"SLOWER": 10})
    assert gate.problems == ["100 runs of each are needed, 10 and 10 were made"]


def test_alarms_and_misses_are_not_trusted() -> None:
    gate = Gate()
    gate.equal.standings.update({"SAME": 97, "SLOWER": 3})
    gate.slower.standings.update({"SLOWER": 90, "UNDECIDED": 10})
    assert gate.problems == ["more than 1% false alarms", "less than 95% of the slowdowns found"]


def test_a_good_gate_is_trusted_and_prints_its_rates() -> None:
    gate = Gate()
    gate.equal.standings.update({"SAME": 299, "UNDECIDED": 1})
    gate.slower.standings.update({"SLOWER": 300})
    assert gate.problems == []
    assert "false alarms, A against A:   0 of 300 (0.0%, 95 % interval 0.0% to 1.2%)" in gate.lines()


def test_the_interval_of_a_share_holds_it_as_often_as_it_says() -> None:
    for share, runs in itertools.product((0.01, 0.3), (20, 100)):
        covered = 0.0
        for hits in range(runs + 1):
            low, high = binomial(hits, runs)
            chance = engine.comb(runs, hits) * share**hits * (1 - share) ** (runs - hits)
            covered += chance if low <= share <= high else 0
        assert covered >= engine.CONFIDENCE
