"""The files that a machine writes, and the check that none of them is stale.

python -m tools.generated --check    fails when a file is not what it would be if it were written now
python -m tools.generated --write    writes them

README.md                         the table of verdicts, between its two markers, from parity_tests/parity.json
docs/benchmarks.md                the tables of figures, between their markers, from benchmarks/figures.json
reference_ports/FAMILY/tree.txt   the tree of every port of the family, built on the meta device
"""

import difflib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "parity_tests/parity.json"
MEASURE = f"nox -s parity -- --parity-json {SOURCE}"
BEGIN = "<!-- parity table: begin (written from parity.json by `nox -s fix`) -->"
END = "<!-- parity table: end -->"
FIGURES = "benchmarks/figures.json"
BEGIN_FIGURES = "<!-- figures: begin (written from benchmarks/figures.json by `nox -s fix`) -->"
END_FIGURES = "<!-- figures: end -->"
REPAIR = "Run `nox -s fix` and commit what it writes."


class StaleError(Exception):
    """A generated file that cannot be written, because what it is generated from is not there."""


def readme(root: Path) -> str:
    """README.md, with the table that parity.json gives."""
    from refiners.parity.report import render_readme_table

    text, source = (root / "README.md").read_text(encoding="utf-8"), root / SOURCE
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise StaleError(f"README.md must hold these two lines once, in this order:\n{BEGIN}\n{END}")
    if not source.is_file():
        raise StaleError(f"{SOURCE} is missing: run `{MEASURE}` and commit the file.")
    table = render_readme_table(json.loads(source.read_text(encoding="utf-8")))
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{before}{BEGIN}\n{table.strip()}\n{END}{after}"


def benchmarks(root: Path) -> str:
    """docs/benchmarks.md, with the tables that the committed figures give."""
    from refiners.bench.figures import read_run
    from refiners.bench.table import render_tables

    text, source = (root / "docs" / "benchmarks.md").read_text(encoding="utf-8"), root / FIGURES
    if text.count(BEGIN_FIGURES) != 1 or text.count(END_FIGURES) != 1:
        raise StaleError(f"docs/benchmarks.md must hold these two lines once:\n{BEGIN_FIGURES}\n{END_FIGURES}")
    if not source.is_file():
        raise StaleError(f"{FIGURES} is missing: run `nox -s benchmarks -- --publish` and commit the file.")
    before, after = text.partition(BEGIN_FIGURES)[0], text.partition(END_FIGURES)[2]
    return f"{before}{BEGIN_FIGURES}\n{render_tables(read_run(source)).strip()}\n{END_FIGURES}{after}"


def families(root: Path) -> Iterator[str]:
    """The packages of reference_ports that hold ports, in alphabetical order."""
    for package in sorted((root / "reference_ports").glob("*/__init__.py")):
        if (package.parent / "model.py").is_file():
            yield package.parent.name


def trees(family: str) -> str:
    """The printed tree of every port of a family, each under its name."""
    ports = importlib.import_module(f"reference_ports.{family}").PORTS
    with torch.device("meta"):
        return "\n\n".join(f"{name}: {port.summary}\n\n{port.build()!r}" for name, port in ports.items()) + "\n"


def generated(root: Path = ROOT) -> dict[Path, Callable[[], str]]:
    """Every generated file, and what says what it has to hold."""
    families_trees = {root / "reference_ports" / name / "tree.txt": partial(trees, name) for name in families(root)}
    documents = {root / "README.md": partial(readme, root)}
    if (root / "docs" / "benchmarks.md").is_file():
        documents[root / "docs" / "benchmarks.md"] = partial(benchmarks, root)
    return {**families_trees, **documents}


def difference(path: Path, wanted: str) -> str:
    """The first lines in which a file differs from what it has to hold; empty when it does not."""
    found = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = difflib.unified_diff(found.splitlines(), wanted.splitlines(), "committed", "generated", n=1, lineterm="")
    return "\n".join([*lines][:20]) or ("" if found == wanted else "the line ends differ")


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Check or write the generated files; 1 if one is stale, or cannot be generated."""
    if arguments not in (["--check"], ["--write"]):
        print(__doc__)
        return 2
    write, stale, impossible = arguments == ["--write"], 0, 0
    files = generated(root)
    for path, wanted in files.items():
        try:
            text = wanted()
        except StaleError as error:
            print(f"{path.relative_to(root)}: {error}")
            impossible += 1
            continue
        lines = difference(path, text)
        if not lines:
            continue
        stale += 1
        if write:
            path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(root)}: {'written' if write else f'stale. {REPAIR}'}\n{lines}")
    print(f"Generated files: {stale} of {len(files)} {'written' if write else 'stale'}, {impossible} without a source.")
    return 1 if impossible or (stale and not write) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
