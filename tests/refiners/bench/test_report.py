"""The page and the tables of benchmarks, from files that are made up."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from refiners.bench.drawing import Scale, plot, powers, short, steps
from refiners.bench.figures import read_run, read_runs
from refiners.bench.page import render_page, written_bytes
from refiners.bench.table import render_tables
from refiners.cli import app
from refiners.errors import FileFormatError


def figure(median: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    interval = {"median": median, "low": low, "high": high}
    given = {"limit": None, "samples": [median] * 3, "unit": "×", "verdict": "no limit", "facts": {}}
    return {"interval": interval, **given, **more}


FIGURES: dict[str, Any] = {
    "a port against upstream[bert]": figure(
        0.8,
        0.79,
        0.81,
        limit=0.95,
        verdict="MET",
        standing="FASTER",
        facts={"suite": "ports", "against": "upstream", "parameters": 12000, "workload": "bert"},
    ),
    "a port against upstream[unet]": figure(
        1.2, 1.1, 1.3, limit=0.95, verdict="MISSED", standing="SLOWER", facts={"suite": "ports"}
    ),
    "a stack[1]": figure(1.1, 1.05, 1.15, facts={"suite": "adapters", "stack": 1, "who": "refiners"}),
    "a stack[4]": figure(1.5, 1.4, 1.6, facts={"suite": "adapters", "stack": 4, "who": "refiners"}),
    "memory[lora]": figure(
        1.0, 1.0, 1.0, facts={"suite": "memory", "adapter": "lora", "measured": 4096, "theoretical": 4096}
    ),
}


def write(path: Path, *, started: str = "2026-11-22T05:00:00", **changes: Any) -> Path:
    told: dict[str, Any] = {
        "format": "refiners-benchmarks-1",
        "device": {"kind": "cpu", "name": "A Processor <2>", "properties": {"torch": "2.13.0", "cores": "2"}},
        "commit": "abc1234",
        "started": started,
        "complete": True,
        "states": [],
        "figures": FIGURES,
        "errors": {},
        **changes,
    }
    path.write_text(json.dumps(told))
    return path


@pytest.fixture
def page(tmp_path: Path) -> str:
    return render_page([read_run(write(tmp_path / "run.json"))])


def test_the_page_needs_no_other_file(page: str) -> None:
    assert not re.search(r"""(src|href)=|url\(|@import|<script""", page)


def test_the_page_shows_every_figure_with_its_interval(page: str) -> None:
    for name in ("a port against upstream: bert", "a port against upstream: unet", "a stack: 4"):
        assert name in page
    assert "[0.790, 0.810]" in page


def test_the_page_says_first_what_was_missed(page: str) -> None:
    assert "1 limit missed" in " ".join(page.split())


def test_the_page_names_device_versions_and_commit(page: str) -> None:
    assert "A Processor &lt;2&gt;" in page
    assert "2.13.0" in page
    assert "abc1234" in page


def test_the_page_draws_size_stack_and_memory(page: str) -> None:
    assert "Overhead against the size of the model" in page
    assert "Cost against the number of adapters" in page
    assert "1.000 × the 4 KiB of the adapter" in page


def test_two_runs_of_a_device_have_a_history(tmp_path: Path) -> None:
    write(tmp_path / "a.json")
    write(tmp_path / "b.json", started="2026-11-23T05:00:00", commit="later")
    runs = read_runs([tmp_path])
    assert runs[0].commit == "later"
    assert "2026-11-22 abc1234: 0.800 [0.790, 0.810]" in render_page(runs)


def test_an_interrupted_and_throttled_run_with_an_error_says_so(tmp_path: Path) -> None:
    path = write(
        tmp_path / "run.json",
        complete=False,
        errors={"unet": "OutOfMemoryError: CUDA out of memory"},
        states=[{"throttled": ["power cap"], "readings": {}}],
    )
    page = render_page([read_run(path)])
    for told in ("was interrupted", "throttled: power cap", "OutOfMemoryError: CUDA out of memory"):
        assert told in page


def test_a_run_without_figures_is_a_page_too(tmp_path: Path) -> None:
    assert "<b>0</b> figures" in render_page([read_run(write(tmp_path / "run.json", figures={}))])


def test_tables_hold_a_row_for_each_figure(tmp_path: Path) -> None:
    text = render_tables(read_run(write(tmp_path / "run.json")))
    assert "| a port against upstream: bert | 0.800 × | [0.790, 0.810] | ≤ 0.95 | MET FASTER |" in text
    assert "A Processor <2> (torch 2.13.0, cores 2), commit `abc1234`, 2026-11-22." in text


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "is broken"), ("[]", "holds no figures"), ('{"format": "refiners-benchmarks-1"}', "is incomplete")],
    ids=["cut", "foreign", "half"],
)
def test_a_file_that_is_no_run_is_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=told):
        read_run(path)


def test_a_folder_without_files_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no figures in"):
        read_runs([tmp_path])


def test_the_commands_write_the_page_and_print_the_tables(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json")
    done = CliRunner().invoke(app, ["bench", "report", str(path), "--output", str(tmp_path / "page")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "page" / "index.html").is_file()
    assert "| a stack: 1 |" in CliRunner().invoke(app, ["bench", "table", str(path)]).output


def test_a_scale_keeps_values_inside() -> None:
    scale = Scale(1, 100, 0, 10, is_log=True)
    assert [scale(value) for value in (0.1, 1, 10, 100, 1000)] == [0, 0, 5, 10, 10]


def test_axes_have_round_numbers() -> None:
    assert steps(0.9, 2.1) == [1, 1.25, 1.5, 1.75, 2]
    assert powers(1e3, 2e5) == [1e3, 3e3, 1e4, 3e4, 1e5]
    assert [short(value) for value in (12, 12_000, 3.4e6, 2.6e9)] == ["12", "12k", "3.4M", "2.6G"]


def test_nothing_to_draw_is_no_drawing() -> None:
    assert plot({}, "x", "y") is None


def test_bytes_are_written_as_people_say_them() -> None:
    assert [written_bytes(n) for n in (12, 4096, 3 * 2**20, 2**31)] == ["12 bytes", "4 KiB", "3 MiB", "2 GiB"]


def test_labels_of_points_do_not_lie_on_one_another() -> None:
    drawn = plot({"": [(1.0, 0.9, 0.9, 0.9, "one"), (1.01, 0.9, 0.9, 0.9, "other")]}, "x", "y", labels=True)
    assert drawn is not None
    one, other = drawn.lines[0].points
    assert abs(one.label_y - other.label_y) >= 12
