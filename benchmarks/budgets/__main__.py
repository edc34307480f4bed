"""Write the exact budgets anew, or compare with them.

python -m benchmarks.budgets --write            all of them, after a change that is meant to alter them
python -m benchmarks.budgets --write bert vit   some
python -m benchmarks.budgets --check            compare, and write nothing
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.budgets import handle, stale
from benchmarks.workloads import WORKLOADS

PROCESSES = 2


def main(arguments: list[str]) -> int:
    """1 if a budget is missed."""
    if not arguments or arguments[0] not in ("--write", "--check"):
        print(__doc__)
        return 2
    write, names = arguments[0] == "--write", arguments[1:] or [*WORKLOADS]
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        print(f"No workload is called {', '.join(unknown)}. There are: {', '.join(WORKLOADS)}.")
        return 2
    red = 0
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        for told in pool.map(handle, names, [write] * len(names)):
            print(told, flush=True)
            red += told.startswith("RED")
    if write and not arguments[1:]:
        for path in stale():
            path.unlink()
            print(f"removed {path.name}: no such workload")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
