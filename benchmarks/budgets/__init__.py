"""The exact budgets: one folder for each pair of versions that was measured, one file for each workload.

Operations, allocations and calls are those of one version of PyTorch and Python. With other versions nothing is
compared, and that is not green: measure them too, into a folder of their own.
"""

from pathlib import Path

import torch

from benchmarks.engine.budget import Budget, BudgetError, key_of, measure, read, require, versions
from benchmarks.workloads import WORKLOADS

FOLDER = Path(__file__).parent


def folder() -> Path:
    """Where the budgets of the installed versions lie."""
    return FOLDER / key_of(versions())


def committed(name: str) -> Budget:
    """The budget of a workload.

    Raises:
        BudgetError: There is none for the installed versions, or it cannot be read.
    """
    if not folder().is_dir():
        known = sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and path.name.startswith("python-"))
        raise BudgetError(
            f"There are no budgets of {key_of(versions())}, so nothing was compared. There are those of "
            f"{', '.join(known) or 'no versions'}. Install one of them, or write budgets of these versions from a "
            "commit that is known to be good: `python -m benchmarks.budgets --write`."
        )
    return read(folder() / f"{name}.json")


def counted(name: str) -> Budget:
    """What a workload takes now."""
    workload = WORKLOADS[name]()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, act = workload.ready()
        return measure(name, workload.what, model, act, None if workload.compiled is None else workload.compiled(model))
    finally:
        torch.set_num_threads(threads)


def stale() -> list[Path]:
    """Budgets of workloads that are gone."""
    return [path for path in sorted(folder().glob("*.json")) if path.stem not in WORKLOADS]


def handle(name: str, write: bool) -> str:
    """Count one workload, and write it or compare it: the line to print."""
    found = counted(name)
    if not write:
        try:
            require(committed(name), found)
        except BudgetError as error:
            return f"RED {error}"
        return f"ok   {name}"
    path = folder() / f"{name}.json"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    path.parent.mkdir(exist_ok=True)
    path.write_text(found.as_text(), encoding="utf-8")
    return f"{'same' if before == found.as_text() else 'written'} {name}"
