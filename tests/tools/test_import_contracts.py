"""The import contracts of pyproject.toml, held against one planted violation per arrow, in every form of import."""

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("refiners", "reference_ports", "parity_tests", "benchmarks", "tests", "tools")

AT_THE_TOP = "\nimport {module}\n"
IN_A_FUNCTION = "\ndef planted() -> None:\n    import {module}\n"
FOR_TYPES_ONLY = "\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import {module}\n"
FORMS = {"at the top": AT_THE_TOP, "in a function": IN_A_FUNCTION, "under TYPE_CHECKING": FOR_TYPES_ONLY}

# Contract that must break: the file that gets the import, and what it imports there.
ARROWS = [
    ("rooms", "refiners/fluxion/context.py", "reference_ports.clip"),
    ("rooms", "refiners/parity/case.py", "parity_tests.cases.clip"),
    ("rooms", "reference_ports/clip/__init__.py", "parity_tests.cases.clip"),
    ("rooms", "reference_ports/clip/__init__.py", "benchmarks"),
    ("upstream", "refiners/parity/case.py", "transformers"),
    ("upstream", "refiners/conversion/__init__.py", "diffusers.loaders"),
    ("upstream", "reference_ports/clip/__init__.py", "peft"),
    ("upstream", "tests/tools/test_house_rules.py", "transformers"),
    ("tests", "tests/tools/test_house_rules.py", "parity_tests.cases.clip"),
    ("framework", "refiners/fluxion/context.py", "refiners.parity"),
    ("framework", "refiners/fluxion/layers/chain.py", "refiners.conversion"),
    ("framework", "refiners/errors.py", "refiners.fluxion.context"),
    ("framework", "refiners/conversion/__init__.py", "refiners.parity"),
    ("fluxion", "refiners/fluxion/context.py", "refiners.fluxion.layers.tree"),
    ("fluxion", "refiners/fluxion/layers/linear.py", "refiners.fluxion.adapters"),
    ("layers", "refiners/fluxion/layers/tree.py", "refiners.fluxion.layers.module"),
    ("layers", "refiners/fluxion/layers/module.py", "refiners.fluxion.layers.branch"),
    ("layers", "refiners/fluxion/layers/chain.py", "refiners.fluxion.layers.linear"),
    ("verdict", "refiners/parity/runner.py", "refiners.parity.reasons.teacher"),
    ("verdict", "refiners/parity/trace.py", "refiners.parity.mutants.mutate"),
    ("reasons", "refiners/parity/reasons/causes.py", "refiners.parity.mutants.operators"),
    ("reasons", "refiners/parity/reasons/hypotheses.py", "refiners.parity.explain"),
    ("fl", "refiners/fluxion/layers/linear.py", "refiners.fluxion.layers"),
    ("ports", "reference_ports/clip/__init__.py", "reference_ports.bert"),
    ("ports", "reference_ports/bert/__init__.py", "reference_ports.clip"),
    ("ports", "reference_ports/vit/__init__.py", "reference_ports.clip"),
    ("ports", "reference_ports/blocks/images.py", "reference_ports.vit"),
]

# Rooms whose packages must not know one another; the contract has the name of the room.
SIBLINGS = ("adapters", "pipelines")


# An editable install puts this checkout on the path, where its rooms would stand in for those of the copy.
PROGRAM = """
import sys
sys.path[:] = [place for place in sys.path if place != {root!r}]
from importlinter.cli import lint_imports_command
lint_imports_command()
"""


def run_contracts(checkout: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT)), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)


def contract_names() -> dict[str, str]:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    return {contract["id"]: contract["name"] for contract in configuration["contracts"]}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the rooms, on which the contracts hold."""
    copy = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture
def plant(checkout: Path) -> Iterator[list[tuple[Path, str]]]:
    """What a test changes is changed back after it."""
    planted: list[tuple[Path, str]] = []
    yield planted
    for path, text in planted:
        path.write_text(text)


def test_the_contracts_hold_here(checkout: Path) -> None:
    result = run_contracts(checkout)
    assert result.returncode == 0, result.stdout
    assert " 0 broken." in result.stdout


@pytest.mark.parametrize(("contract", "importer", "imported"), ARROWS)
def test_an_arrow_that_turns_breaks_its_contract(
    contract: str, importer: str, imported: str, checkout: Path, plant: list[tuple[Path, str]]
) -> None:
    assert_broken(contract, importer, AT_THE_TOP.format(module=imported), checkout, plant)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("contract", "importer", "imported"), [ARROWS[0], ARROWS[4], ARROWS[9]])
def test_every_form_of_import_counts(
    contract: str, importer: str, imported: str, form: str, checkout: Path, plant: list[tuple[Path, str]]
) -> None:
    assert_broken(contract, importer, form.format(module=imported), checkout, plant)


def test_a_room_that_no_contract_knows_is_refused(checkout: Path) -> None:
    stranger = checkout / "reference_ports" / "stranger.py"
    stranger.touch()
    result = run_contracts(checkout)
    stranger.unlink()
    assert result.returncode == 1
    assert "stranger" in result.stdout


@pytest.mark.parametrize("room", SIBLINGS)
def test_siblings_that_import_one_another_break_their_contract(room: str, checkout: Path) -> None:
    folder = checkout / "reference_ports" / room
    packages = {
        folder: "",
        folder / "planted_one": "",
        folder / "planted_two": f"import reference_ports.{room}.planted_one\n",
    }
    new = [package for package in packages if not package.exists()]
    for package in new:
        package.mkdir()
        (package / "__init__.py").write_text(packages[package])
    result = run_contracts(checkout)
    for package in reversed(new):
        shutil.rmtree(package)
    assert result.returncode == 1
    assert f"{contract_names()[room]} BROKEN" in result.stdout


def test_every_contract_has_a_planted_violation() -> None:
    assert {contract for contract, _, _ in ARROWS} | set(SIBLINGS) == set(contract_names())


def assert_broken(contract: str, importer: str, text: str, checkout: Path, plant: list[tuple[Path, str]]) -> None:
    path = checkout / importer
    plant.append((path, path.read_text()))
    path.write_text(path.read_text() + text)
    result = run_contracts(checkout)
    assert result.returncode == 1, result.stdout
    assert f"{contract_names()[contract]} BROKEN" in result.stdout
    assert f"{importer.removesuffix('.py').removesuffix('/__init__').replace('/', '.')} ->" in result.stdout
