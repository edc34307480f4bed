"""Generated files: written when asked, found when stale, and never guessed when their source is missing."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import refiners.fluxion.layers as fl
from refiners.parity import report
from tools import generated


class Encoder(fl.Chain):
    """A tree to print."""

    def __init__(self) -> None:
        super().__init__(fl.Linear(2, 3), fl.ReLU())


def render(parity: dict[str, Any]) -> str:
    return f"| case | verdict |\n|---|---|\n| bert | {parity['verdict']} |\n"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one family, whose generated files are up to date."""
    family = tmp_path / "reference_ports" / "planted"
    family.mkdir(parents=True)
    (family / "__init__.py").touch()
    (family / "model.py").touch()
    (tmp_path / "parity_tests").mkdir()
    (tmp_path / generated.SOURCE).write_text(json.dumps({"verdict": "BITWISE"}))
    (tmp_path / "README.md").write_text(f"# Title\n\n{generated.BEGIN}\n{generated.END}\n\nThe rest.\n")
    module = ModuleType("reference_ports.planted")
    module.PORTS = {"planted-l": SimpleNamespace(summary="a planted encoder", build=Encoder)}  # type: ignore[attr-defined]  a fake
    monkeypatch.setitem(sys.modules, "reference_ports.planted", module)
    monkeypatch.setattr(report, "render_readme_table", render)
    assert generated.main(["--write"], tmp_path) == 0
    return tmp_path


def test_writing_gives_what_the_check_wants(checkout: Path) -> None:
    assert generated.main(["--check"], checkout) == 0


def test_the_table_stands_between_its_markers(checkout: Path) -> None:
    lines = (checkout / "README.md").read_text().splitlines()
    begin, end = lines.index(generated.BEGIN), lines.index(generated.END)
    assert lines[begin + 1 : end] == render({"verdict": "BITWISE"}).splitlines()
    assert (lines[0], lines[-1]) == ("# Title", "The rest.")


def test_the_tree_of_every_port_is_printed_on_the_meta_device(checkout: Path) -> None:
    text = (checkout / "reference_ports" / "planted" / "tree.txt").read_text()
    assert text.startswith("planted-l: a planted encoder\n\n(CHAIN) Encoder()")
    assert "Linear(in_features=2, out_features=3, device=meta, dtype=float32)" in text


@pytest.mark.parametrize("name", ["README.md", "reference_ports/planted/tree.txt"])
def test_a_stale_file_is_found_and_named_with_its_difference(
    name: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkout / name
    path.write_text(path.read_text().replace("BITWISE", "DIFFERENT").replace("out_features=3", "out_features=4"))
    assert generated.main(["--check"], checkout) == 1
    printed = capsys.readouterr().out
    assert f"{name}: stale. Run `nox -s fix`" in printed
    assert "\n-" in printed
    assert "\n+" in printed


def test_a_missing_tree_is_stale(checkout: Path) -> None:
    (checkout / "reference_ports" / "planted" / "tree.txt").unlink()
    assert generated.main(["--check"], checkout) == 1


def test_a_table_without_its_source_is_refused(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / generated.SOURCE).unlink()
    assert generated.main(["--check"], checkout) == 1
    assert "run `nox -s parity -- --parity-json parity_tests/parity.json` and commit" in capsys.readouterr().out


def test_a_readme_without_markers_is_refused(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "README.md").write_text("# Title\n")
    assert generated.main(["--write"], checkout) == 1
    assert generated.BEGIN in capsys.readouterr().out


def test_without_a_task_nothing_is_written(checkout: Path) -> None:
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    assert generated.main([], checkout) == 2
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before


def with_figures(checkout: Path) -> Path:
    """The document of benchmarks, and figures of which its tables are made."""
    document = checkout / "docs" / "benchmarks.md"
    document.parent.mkdir()
    document.write_text(f"# Benchmarks\n\n{generated.BEGIN_FIGURES}\n{generated.END_FIGURES}\n\nThe rest.\n")
    (checkout / "benchmarks").mkdir()
    figure = {"interval": {"median": 0.8, "low": 0.7, "high": 0.9}, "limit": 1.0, "unit": "×", "verdict": "MET"}
    told = {
        "format": "refiners-benchmarks-1",
        "device": {"kind": "cpu", "name": "a processor", "properties": {}},
        "commit": "abc",
        "started": "2026-11-22T05:00:00",
        "complete": True,
        "states": [],
        "figures": {"a port[bert]": {**figure, "samples": [0.8], "facts": {"suite": "ports"}}},
        "errors": {},
    }
    (checkout / generated.FIGURES).write_text(json.dumps(told))
    return document


def test_the_tables_of_figures_stand_between_their_markers(checkout: Path) -> None:
    document = with_figures(checkout)
    assert generated.main(["--check"], checkout) == 1
    assert generated.main(["--write"], checkout) == 0
    assert "| a port: bert | 0.800 × | [0.700, 0.900] | ≤ 1 | MET |" in document.read_text()
    assert document.read_text().endswith(f"{generated.END_FIGURES}\n\nThe rest.\n")
    assert generated.main(["--check"], checkout) == 0


def test_missing_figures_say_how_to_measure_them(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_figures(checkout)
    (checkout / generated.FIGURES).unlink()
    assert generated.main(["--write"], checkout) == 1
    assert "nox -s benchmarks -- --publish" in capsys.readouterr().out
