"""Fresh processes, for what happens only once in each: imports, and the peak of memory."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine.figures import Figure, measure

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 3


def run_python(code: str, bytecode: Path | None = None) -> str:
    """Run lines of Python in a fresh interpreter that sees this checkout, on one thread. What they print.

    Args:
        code: The lines.
        bytecode: A folder for the compiled modules, as an installed package has them. None: every module that is no
            part of an installed package is compiled again, as in a checkout that Python may not write to.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"} if bytecode is None else {"PYTHONPYCACHEPREFIX": str(bytecode)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"A measured process failed:\n{code}\n{done.stderr}")
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class InFreshProcess:
    """Seconds of processor time that lines of Python take in a fresh interpreter, after other lines ran there.

    A copy of a running process (`os.fork`) would start ten times faster and pay half as much again for the lines, since
    every object that they touch has to be copied first.
    """

    code: str
    limit: float | None
    before: str = ""
    bytecode: Path | None = None
    fewest: int = 8

    def seconds(self) -> float:
        timed = f"import time\nstart = time.process_time()\n{self.code}\nprint(time.process_time() - start)"
        return float(run_python(f"{self.before}\n{timed}", self.bytecode).split()[-1])

    def figure(self, budget: float = 8.0) -> Figure:
        self.seconds()  # compiles what is imported, and brings its files into the page cache
        return measure(
            # What neighbours do only ever adds.
            lambda: min(self.seconds() for _ in range(REPEATS)),
            limit=self.limit,
            unit="s",
            precision=0.05,
            budget=budget,
            fewest=self.fewest,
        )

    def replay(self, benchmark: Any) -> None:
        benchmark.pedantic(self.seconds, rounds=1)
