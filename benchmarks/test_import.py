"""What `import refiners.fluxion.layers` costs beyond torch, which everybody who imports it has already."""

import json
from pathlib import Path

from benchmarks.conftest import Record, Tell
from benchmarks.engine.figures import exact
from benchmarks.engine.processes import InFreshProcess, run_python

# Everything else must wait for its first use.
NEEDED = frozenset({"jaxtyping", "refiners", "safetensors", "typing_extensions"})


def test_seconds_of_the_import_beyond_torch_as_installed(record: Record, tmp_path: Path) -> None:
    record(importing("import refiners.fluxion.layers", bytecode=tmp_path))


def test_seconds_of_the_import_beyond_torch_compiled_anew(record: Record) -> None:
    record(importing("import refiners.fluxion.layers"))


def importing(code: str, bytecode: Path | None = None, fewest: int = 8) -> InFreshProcess:
    return InFreshProcess(before="import torch", code=code, limit=0.05, bytecode=bytecode, fewest=fewest)


def test_packages_that_the_import_brings_without_need(tell: Tell) -> None:
    tell(exact(len(packages("import refiners.fluxion.layers") - NEEDED), limit=0, unit="packages"))


def packages(code: str) -> set[str]:
    """The installed packages that lines of Python import beyond torch's."""
    tops = "{name.partition('.')[0] for name in sys.modules}"
    printed = run_python(
        f"import json, sys, torch\nbefore = {tops}\n{code}\n"
        f"print(json.dumps(sorted({tops} - before - sys.stdlib_module_names)))"
    )
    return set(json.loads(printed))
