"""Budgets: all that can be counted of an act, as a file that is reviewed, and what differs from it by leaf.

A count has to be equal to its budget. Fewer is a finding too: until it is understood, it may be a layer that no longer
runs. What is meant is written by one command, and the diff of the file, one line a leaf, shows it to the reviewer.
"""

import json
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from benchmarks.engine.compiled import compiling
from benchmarks.engine.counts import calls, lines
from benchmarks.engine.watch import Watch, watch

Counts = dict[str, int]
# How many differences a message shows.
SHOWN = 24
# What runs once and is then remembered is no cost of an act.
WARM_UPS = 2


class BudgetError(AssertionError):
    """Counts that differ from their budget, or a budget that cannot be compared with."""


def versions() -> dict[str, str]:
    """What counts depend on. Neither the processor nor the number of threads is among it."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "torch": torch.__version__.partition("+")[0]}


def key_of(found: Mapping[str, str]) -> str:
    """The versions as the name of a folder."""
    return "-".join(f"{name}-{version}" for name, version in found.items())


@dataclass
class Budget:
    """Everything that was counted of an act."""

    workload: str
    what: str
    totals: Counts
    operations: Counts
    """ATen operations by name."""
    compiled: Counts
    """Graphs, graph breaks and recompilations, and the first of them with its leaf."""
    leaves: dict[str, Counts]
    """What each module did itself: operations, calls, allocations and bytes."""
    at_peak: Counts
    """Whose bytes were alive when most were: by leaf and operation."""
    python: Counts
    """Calls of Python functions, by file and name."""
    c: Counts
    """Calls of functions of C, by name."""
    lines: Counts
    """Lines of ours that ran, by file."""
    versions: dict[str, str] = field(default_factory=versions)

    def as_text(self) -> str:
        """JSON with one line for each leaf and each function."""
        parts = [f'"workload": {json.dumps(self.workload)}', f'"what": {json.dumps(self.what)}']
        parts += [f'"versions": {json.dumps(self.versions)}']
        for name in ("totals", "operations", "compiled", "leaves", "at_peak", "python", "c", "lines"):
            entries = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in getattr(self, name).items()]
            parts.append(f'"{name}": {{' + ("\n" + ",\n".join(entries) + "\n" if entries else "") + "}")
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def sections(self) -> Iterator[tuple[str, str, Counts]]:
        """(kind, of what, counts), the most telling first."""
        yield "leaf", "", {}
        for path, counts in self.leaves.items():
            yield "leaf", path, counts
        for name in ("totals", "operations", "compiled", "at_peak", "python", "c", "lines"):
            yield name, "", getattr(self, name)


def read(path: Path) -> Budget:
    """The budget of a file.

    Raises:
        BudgetError: It is missing, or no budget.
    """
    if not path.is_file():
        raise BudgetError(f"There is no budget {path}. Write it with {command(path.stem)}")
    try:
        return Budget(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise BudgetError(f"{path} is no budget: {error}. Write it anew with {command(path.stem)}") from error


def command(name: str) -> str:
    return f"`python -m benchmarks.budgets --write {name}`, and look at the diff."


def measure(
    name: str, what: str, model: nn.Module, act: Callable[[], object], compiled: nn.Module | None = None
) -> Budget:
    """Count an act in all ways: each by itself, so that none sees what another one does."""
    for _ in range(WARM_UPS):
        act()
    bare, by_leaf, called, ran = watch(act), watch(act, model), calls(act), lines(act)
    totals = {
        "operations": bare.operations.total(),
        "allocations": bare.allocations,
        "allocated bytes": bare.bytes,
        "peak bytes": bare.peak,
        "bytes kept after the act": bare.current,
        "module calls": by_leaf.calls,
        "python calls": called.python.total(),
        "c calls": called.c.total(),
        "lines": ran.total(),
    }
    graphs = _compiled(compiled, act)
    return Budget(
        workload=name,
        what=what,
        totals=totals,
        operations=_sorted(bare.operations),
        compiled=graphs,
        leaves=_leaves(by_leaf),
        at_peak=_at_peak(by_leaf),
        python=_sorted(called.python),
        c=_sorted(called.c),
        lines=_sorted(ran),
    )


def _compiled(model: nn.Module | None, act: Callable[[], object]) -> Counts:
    if model is None:
        return {}
    seen = compiling(model, act)
    counts = {"graphs": seen.graphs, "graph breaks": seen.breaks, "recompilations": seen.recompilations}
    return {**counts, **dict.fromkeys(seen.why, 1)}


def _leaves(seen: Watch) -> dict[str, Counts]:
    return {
        path: {
            **dict(sorted(leaf.operations.items())),
            **({"allocations": leaf.allocations, "bytes": leaf.bytes} if leaf.allocations else {}),
            **({"kept": leaf.kept} if leaf.kept else {}),
            **({"calls": leaf.calls} if leaf.calls != 1 else {}),
        }
        for path, leaf in seen.leaves.items()
        if leaf
    }


def _at_peak(seen: Watch) -> Counts:
    held: Counter[str] = Counter()
    for moment in seen.held:
        held[f"{moment.path}: {moment.operation}"] += moment.bytes
    return _sorted(held)


def _sorted(counts: Mapping[str, int]) -> Counts:
    return dict(sorted(counts.items()))


def compare(budget: Budget, found: Budget) -> list[str]:
    """What differs, leaf by leaf: empty where everything is equal."""
    if budget.versions != found.versions:
        told = [f"{name} {version}" for name, version in budget.versions.items()]
        return [f"the budget is of {' and '.join(told)}, this is {found.versions}: nothing was compared"]
    wanted = {(kind, of): counts for kind, of, counts in budget.sections()}
    given = {(kind, of): counts for kind, of, counts in found.sections()}
    differences: list[str] = []
    for kind, of in {**given, **wanted}:
        changes = _changes(wanted.get((kind, of), {}), given.get((kind, of), {}))
        if not changes:
            continue
        if kind == "leaf":
            differences.append(f"{of}: {', '.join(changes)}")
        else:
            differences += [f"{kind.replace('_', ' ')}: {change}" for change in changes]
    return differences


def _changes(wanted: Counts, given: Counts) -> list[str]:
    """Operations first, since they say the most."""
    names = sorted({**wanted, **given}, key=lambda name: not name.startswith("aten."))
    return [
        f"{name} {wanted.get(name, 0)} → {given.get(name, 0)}"
        for name in names
        if wanted.get(name, 0) != given.get(name, 0)
    ]


def require(budget: Budget, found: Budget) -> None:
    """Nothing, if all counts are equal.

    Raises:
        BudgetError: Some differ; the message names leaves and operations.
    """
    differences = compare(budget, found)
    if differences:
        rest = len(differences) - SHOWN
        told = differences[:SHOWN] + ([f"and {rest} more"] if rest > 0 else [])
        raise BudgetError(
            f"{found.workload} differs from its budget (budget → now):\n  "
            + "\n  ".join(told)
            + f"\nIf that is meant: {command(found.workload)}"
        )
