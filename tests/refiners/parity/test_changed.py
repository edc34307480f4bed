"""What has to run again: each kind of change to what a case rests on changes its digest, and nothing else does."""

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from refiners.errors import ParityError
from refiners.parity import changed, closure
from refiners.parity.changed import Digests, Record
from refiners.parity.closure import Sources
from refiners.parity.ledger import Ledger, Line
from refiners.parity.registry import collect_cases
from refiners.parity.result import Verdict
from refiners.parity.selection import Part, choose, digests_of
from refiners.parity.shards import Shard

FILES = {
    "strangers/__init__.py": "from importlib import import_module\n\ndef load(name):\n    return import_module(name)\n",
    "strangers/cases/__init__.py": "",
    "strangers/cases/one.py": """
from typing import TYPE_CHECKING
import torch
from strangers import helpers
from strangers.ports.first import Port
from tests.refiners.parity.toys import make_case
if TYPE_CHECKING:
    from strangers import types_only
def late():
    from strangers import imported_late
DATA = "words.txt"
CASES = [make_case(Port, id="one/tiny")]
""",
    "strangers/cases/two.py": """
from strangers.ports.second import Port
from tests.refiners.parity.toys import make_case
CASES = [make_case(Port, id="two/tiny")]
""",
    "strangers/cases/words.txt": "a b c",
    "strangers/helpers.py": "",
    "strangers/imported_late.py": "",
    "strangers/types_only.py": "",
    "strangers/unrelated.py": "",
    "strangers/ports/__init__.py": "",
    "strangers/ports/first.py": "from .shared import Shared\nclass Port(Shared): pass\n",
    "strangers/ports/second.py": "from strangers.ports.shared import Shared\nclass Port(Shared): pass\n",
    "strangers/ports/shared.py": "from tests.refiners.parity.toys import Port as Shared\n",
}
ALL = {"one/tiny", "two/tiny"}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "strangers"]:
        del sys.modules[name]


def digests(*lines: Line) -> dict[str, str]:
    registry = collect_cases("strangers.cases")
    assert registry.problems == ()
    return digests_of(registry.cases, registry, Ledger(lines))


def changes_of(change: Callable[[], Any]) -> set[str]:
    before = digests()
    change()
    after = digests()
    return {case for case in before if before[case] != after[case]}


@pytest.mark.parametrize(
    ("file", "cases"),
    [
        ("cases/one.py", {"one/tiny"}),
        ("cases/two.py", {"two/tiny"}),
        ("ports/first.py", {"one/tiny"}),
        ("ports/shared.py", ALL),
        ("ports/__init__.py", ALL),
        ("cases/__init__.py", ALL),
        ("__init__.py", ALL),
        ("helpers.py", {"one/tiny"}),
        ("imported_late.py", {"one/tiny"}),
        ("cases/words.txt", {"one/tiny"}),
        ("types_only.py", set()),
        ("unrelated.py", set()),
    ],
)
def test_a_changed_file_changes_the_cases_that_reach_it(project: Path, file: str, cases: set[str]) -> None:
    path = project / "strangers" / file
    assert changes_of(lambda: path.write_text(f"{path.read_text()}\n# changed\n")) == cases


def test_what_a_package_would_import_by_name_counts_once_it_is_used(project: Path) -> None:
    """`from strangers import load` could load any module of the package; reaching one of its modules could not."""
    path = project / "strangers" / "cases" / "two.py"
    path.write_text(f"from strangers import load\n{path.read_text()}")
    sys.modules.pop("strangers.cases.two", None)
    unrelated = project / "strangers" / "unrelated.py"
    assert changes_of(lambda: unrelated.write_text("changed = 1\n")) == {"two/tiny"}


def test_a_module_named_in_a_string_counts(project: Path) -> None:
    path = project / "strangers" / "cases" / "two.py"
    path.write_text(f"{path.read_text()}\nNAME = 'strangers.unrelated'\n")
    unrelated = project / "strangers" / "unrelated.py"
    assert changes_of(lambda: unrelated.write_text("changed = 1\n")) == {"two/tiny"}


def test_a_change_of_the_engine_changes_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Callable[[], list[str]] = changed._engine  # pyright: ignore[reportPrivateUsage]  # stands for an edit
    assert any(line.startswith("parity/verdict.py ") for line in engine())
    assert any(line.startswith("fluxion/layers/linear.py ") for line in engine())
    edited = [line if not line.startswith("parity/verdict.py") else "parity/verdict.py edited" for line in engine()]
    assert changes_of(lambda: monkeypatch.setattr(changed, "_engine", lambda: edited)) == ALL


def test_another_version_of_a_package_changes_the_cases_that_reach_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        path = project / "strangers" / "cases" / f"{name}.py"
        path.write_text(f"UPSTREAM = '{'packaging' if name == 'two' else 'words.txt'}'\n{path.read_text()}")
    real = importlib.metadata.distribution

    class Other:
        version, requires = "999", ["torch>=1"]

    def distribution(name: str) -> Any:
        return Other() if name == "packaging" else real(name)

    def move() -> None:
        monkeypatch.setattr(importlib.metadata, "distribution", distribution)

    reached = Sources().reach(["strangers.cases.one"])
    assert "packaging" not in reached.packages
    before, _ = digests(), move()
    after = digests()
    assert before["two/tiny"] != after["two/tiny"]


def test_versions_of_what_a_package_requires_count_too() -> None:
    versions: Callable[[set[str]], set[str]] = changed._versions  # pyright: ignore[reportPrivateUsage]  # no public way
    names = {line.partition(" ")[0] for line in versions({"torch"})}
    assert {"torch", "sympy", "mpmath"} <= names


def test_another_machine_changes_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    assert changes_of(lambda: monkeypatch.setattr(changed, "environment", lambda: {"machine": "another"})) == ALL


def test_a_line_of_the_ledger_changes_its_case() -> None:
    line = Line("one/tiny", "float32", Verdict.ROUNDING, "a sum in another order", "upstream moves")
    before, after = digests(), digests(line)
    assert before["one/tiny"] != after["one/tiny"]
    assert before["two/tiny"] == after["two/tiny"]


def test_a_module_that_cannot_be_parsed_reaches_nothing(project: Path) -> None:
    (project / "strangers" / "broken.py").write_text("def (")
    found = Sources().reach(["strangers.broken", "strangers.absent", "not a name"])
    assert {path.name for path in found.files} == {"__init__.py", "broken.py"}


def test_installed_packages_are_not_followed() -> None:
    found = Sources().reach(["strangers.cases.one"], stop=["tests"])
    assert "torch" in found.packages
    assert not any("site-packages" in str(path) for path in found.files)
    assert "importlib" not in found.packages


def test_a_record_keeps_what_passed_and_strikes_what_failed(project: Path) -> None:
    record = Record.load(project)
    record.take("a", "1", passed=True)
    record.take("b", "2", passed=True)
    record.take("b", "2", passed=False)
    record.save()
    again = Record.load(project)
    assert again.is_unchanged(["a"], "1")
    assert not again.is_unchanged(["a"], "2")
    assert not again.is_unchanged(["a", "b"], "1")
    assert (project / changed.FOLDER / ".gitignore").read_text() == "*\n"


def test_a_broken_record_is_an_error_that_says_what_to_do(project: Path) -> None:
    (project / changed.FOLDER).mkdir()
    (project / changed.FOLDER / "record.json").write_text("[]")
    with pytest.raises(ParityError, match="Delete it: everything runs then"):
        Record.load(project)


def test_what_is_unchanged_is_left_out_of_its_shard(project: Path) -> None:
    parts = [Part(f"{name}[{lane}]", name, "digest") for name in "abcd" for lane in ("x", "y")]
    record = Record(project / "record.json", {"a[x]": "digest", "a[y]": "another", "b[x]": "digest"})
    first, told = choose(parts, shard=Shard(1, 2), seconds={}, record=record)
    second, _ = choose(parts, shard=Shard(2, 2), seconds={}, record=record)
    assert first | second == {part.key for part in parts} - {"a[x]", "b[x]"}
    assert not first & second
    assert told[0] == "shard 1/2: 4 of 8 run here"
    assert told[1].startswith("changed: ")


def test_what_has_no_digest_always_runs(project: Path) -> None:
    record = Record(project / "record.json", {"a": ""})
    assert choose([Part("a", "a")], seconds={}, record=record)[0] == {"a"}


def test_a_digest_is_the_same_in_another_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of one machine of CI is of use to the next."""
    before = Digests().of_modules(["strangers.cases.two"])
    moved = project.with_name("moved")
    project.rename(moved)
    monkeypatch.chdir(moved)
    monkeypatch.syspath_prepend(moved)
    assert closure.Sources().reach(["strangers.cases.two"]).files
    assert Digests().of_modules(["strangers.cases.two"]) == before
    moved.rename(project)
