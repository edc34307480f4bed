"""`refiners parity list | run | show | explain`."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from refiners.errors import ParityError
from refiners.parity.commands import explain_case, list_cases, run_cases, show_case

CASES = """
from tests.refiners.parity.toys import Port, make_case

class Wrong(Port):
    def __init__(self):
        super().__init__(eps=1e-6)

CASES = [
    make_case(id="toy/good", lanes=("float64", "float32"), summary="a tower of two norms"),
    make_case(Wrong, id="toy/bad", lanes=("float64", "float32")),
]
"""


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=140)


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "cases_for_commands.py").write_text(CASES)
    yield
    sys.modules.pop("cases_for_commands", None)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_list_shows_every_case_with_what_it_is(console: Console) -> None:
    assert list_cases("cases_for_commands", console=console) == 0
    assert "toy/good" in text(console)
    assert "a tower of two norms" in text(console)


def test_list_tells_which_module_is_broken(console: Console) -> None:
    assert list_cases("cases_for_commands,not_there", console=console) == 1
    assert "toy/good" in text(console)
    assert "✗ The case module `not_there` cannot be imported" in text(console)


def test_run_is_red_when_a_case_is_and_writes_what_it_measured(console: Console, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert run_cases("cases_for_commands", json_path=path, console=console) == 1
    assert "✗ toy/bad[float64]: DIFFERENT: output `y` differs in float64" in text(console)
    assert len(json.loads(path.read_text())["results"]) == 4


def test_run_chooses_cases_and_lanes(console: Console) -> None:
    assert run_cases("cases_for_commands", keyword="good", lanes="float32", console=console) == 0
    assert "1/1 toy/good[float32] BITWISE" in text(console)


def test_run_judges_by_ledger_and_committed_counts(console: Console, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    run_cases("cases_for_commands", keyword="good", json_path=path, console=console)
    assert run_cases("cases_for_commands", keyword="good", baseline_path=path, console=console) == 0
    lines = "".join(
        f'[[line]]\nid = "toy/bad"\nlane = "{lane}"\nverdict = "DIFFERENT"\ncause = "eps"\nuntil = "mended"\n'
        for lane in ("float64", "float32")
    )
    (tmp_path / "ledger.toml").write_text(lines)
    assert run_cases("cases_for_commands", ledger_path=tmp_path / "ledger.toml", console=console) == 0


def test_show_tells_everything_about_one_case(console: Console) -> None:
    assert show_case("toy/bad", "cases_for_commands", lanes="float64", console=console) == 1
    assert "worst element: y[" in text(console)
    assert show_case("toy/good", "cases_for_commands", console=console) == 0


def test_what_does_not_exist_is_an_error() -> None:
    with pytest.raises(ParityError, match="No case id contains 'gpt'"):
        run_cases("cases_for_commands", keyword="gpt")
    with pytest.raises(ParityError, match="no case 'toy/god' among 2. Nearest: toy/good"):
        show_case("toy/god", "cases_for_commands")
    with pytest.raises(ParityError, match="no device 'tpu'"):
        run_cases("cases_for_commands", device="tpu")


def test_explain_tells_where_and_why_a_case_differs(console: Console) -> None:
    assert explain_case("toy/bad", "cases_for_commands", lanes="float64", console=console) == 1
    assert "toy/bad[float64]: 2 faults" in text(console)
    assert "when `eps` is 1e-05" in text(console)
    assert "refiners parity explain toy/bad --lanes float64" in text(console)


def test_explain_has_nothing_to_say_of_an_equal_case(console: Console) -> None:
    assert explain_case("toy/good", "cases_for_commands", console=console) == 0
    assert "BITWISE, nothing to explain" in text(console)
