"""Measure how often the rule of the timings errs on this machine: `nox -s benchmark_gate`.

python -m benchmarks.gate --minutes 20 --runs 100 --json gate.json
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import nn

import refiners.fluxion.layers as fl
from benchmarks import subjects
from benchmarks.engine.contestants import Act
from benchmarks.engine.gate import measure_gates
from benchmarks.workloads import WORKLOADS


def chain() -> Act:
    """A Chain, built anew each time."""
    tree, x = subjects.flat(fl.Chain, fl.Linear, 20), subjects.example()
    return lambda: tree(x)


@cache
def bert_model() -> tuple[nn.Module, Act]:
    return WORKLOADS["bert"]().ready()


def bert() -> Act:
    """A port, built once."""
    return bert_model()[1]


GATED: dict[str, Callable[[], Act]] = {"a Chain of 20 layers": chain, "a tiny BERT": bert}


@torch.no_grad()
def main(arguments: list[str]) -> int:
    """1 if the rule may not be trusted here."""
    parser = argparse.ArgumentParser(prog="nox -s benchmark_gate --", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="when to stop, whatever was measured")
    parser.add_argument("--runs", type=int, default=100, help="runs of each kind for each workload")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    gates = measure_gates(GATED, options.runs, options.minutes)
    for name, gate in gates.items():
        print(f"{name}:", *gate.lines(), sep="\n  ")
    if options.json:
        text = json.dumps({name: gate.as_json() for name, gate in gates.items()}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 1 if any(gate.problems for gate in gates.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
