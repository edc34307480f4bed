"""`refiners parity list | run | show | explain`."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from refiners.errors import ParityError
from refiners.parity.commands import Outputs, explain_case, list_cases, run_cases, show_case

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
    assert run_cases("cases_for_commands", outputs=Outputs(json=path), console=console) == 1
    assert "✗ toy/bad[float64]: DIFFERENT: output `y` differs in float64" in text(console)
    assert len(json.loads(path.read_text())["results"]) == 4


def test_run_chooses_cases_and_lanes(console: Console) -> None:
    assert run_cases("cases_for_commands", keyword="good", lanes="float32", console=console) == 0
    assert "1/1 toy/good[float32] BITWISE" in text(console)


def test_run_judges_by_ledger_and_committed_counts(console: Console, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    run_cases("cases_for_commands", keyword="good", outputs=Outputs(json=path), console=console)
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


# What is written, and which cases run


def test_run_writes_every_report_that_was_asked_for(console: Console, tmp_path: Path) -> None:
    outputs = Outputs(
        json=tmp_path / "out.json", junit=tmp_path / "out.xml", html=tmp_path / "out", summary=tmp_path / "out.md"
    )
    assert run_cases("cases_for_commands", outputs=outputs, console=console) == 1
    assert "Equal when <code>eps</code>" in (tmp_path / "out" / "index.html").read_text()
    assert (tmp_path / "out.xml").read_text().count("<testcase ") == 4
    assert "1 of 2 cases differ" in (tmp_path / "out.md").read_text()
    assert "toy/bad[float64]" in json.loads((tmp_path / "out.json").read_text())["explanations"]
    assert f"page: {tmp_path / 'out' / 'index.html'}" in text(console)
    assert f"torch {torch.__version__}" in text(console)


def test_run_explains_what_differs_in_short(console: Console) -> None:
    run_cases("cases_for_commands", lanes="float64", console=console)
    assert "  norm_{1,2} receives what upstream's leaf receives, and returns something else\n" in text(console)
    assert "    equal when `eps` is 1e-05\n" in text(console)
    assert "refiners parity show toy/bad --lanes float64 --cases cases_for_commands" in text(console)


def test_a_path_that_cannot_be_written_to_is_an_error_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for outputs in (
        Outputs(json=tmp_path / "none" / "out.json"),
        Outputs(junit=tmp_path),
        Outputs(html=tmp_path / "file"),
    ):
        with pytest.raises(ParityError, match="Nothing was run"):
            run_cases("cases_for_commands", outputs=outputs)


def ids_run(tmp_path: Path, console: Console, **options: Any) -> set[str]:
    path = tmp_path / "run.json"
    run_cases("cases_for_commands", outputs=Outputs(json=path), explain=False, console=console, **options)
    data = json.loads(path.read_text())
    path.unlink()
    return {f"{row['case']}[{row['lane']}]" for row in data["results"]}


def test_run_divides_cases_among_machines(console: Console, tmp_path: Path) -> None:
    first, second = (ids_run(tmp_path, console, shard=shard) for shard in ("1/2", "2/2"))
    assert first | second == {f"toy/{name}[{lane}]" for name in ("good", "bad") for lane in ("float64", "float32")}
    assert not first & second
    assert "shard 1/2: 2 of 4 run here" in text(console)
    with pytest.raises(ParityError, match="no shard '3'"):
        run_cases("cases_for_commands", shard="3")


def test_run_leaves_out_what_passed_and_did_not_change(console: Console, tmp_path: Path) -> None:
    assert len(ids_run(tmp_path, console)) == 4
    assert ids_run(tmp_path, console, changed=True) == {"toy/bad[float64]", "toy/bad[float32]"}
    assert run_cases("cases_for_commands", keyword="good", changed=True, console=console) == 0
    assert "changed: 0 of 2 run, 2 passed before with the same digest" in text(console)
    path = tmp_path / "cases_for_commands.py"
    path.write_text(f"{path.read_text()}\n# changed\n")
    assert len(ids_run(tmp_path, console, changed=True)) == 4


def test_a_line_of_the_ledger_about_a_case_that_was_not_chosen_is_not_stale(console: Console, tmp_path: Path) -> None:
    (tmp_path / "ledger.toml").write_text(
        '[[line]]\nid = "toy/bad"\nlane = "float64"\nverdict = "DIFFERENT"\ncause = "eps"\nuntil = "mended"\n'
    )
    assert run_cases("cases_for_commands", keyword="good", ledger_path=tmp_path / "ledger.toml", console=console) == 0


def test_show_explains_what_differs(console: Console) -> None:
    assert show_case("toy/bad", "cases_for_commands", lanes="float64", console=console) == 1
    assert ">>> LayerNorm" in text(console)
    assert "again: refiners parity show toy/bad --lanes float64 --cases cases_for_commands" in text(console)


def test_show_leaves_the_explanation_out_when_it_has_no_time_for_it(console: Console) -> None:
    assert show_case("toy/bad", "cases_for_commands", lanes="float64", seconds=0, console=console) == 1
    assert ">>>" not in text(console)


def test_show_judges_by_the_ledger(console: Console, tmp_path: Path) -> None:
    (tmp_path / "ledger.toml").write_text(
        '[[line]]\nid = "toy/bad"\nlane = "float64"\nverdict = "DIFFERENT"\ncause = "eps"\nuntil = "mended"\n'
    )
    ledger = tmp_path / "ledger.toml"
    assert show_case("toy/bad", "cases_for_commands", lanes="float64", ledger_path=ledger, console=console) == 0
    assert "it may stand: DIFFERENT, known: eps" in text(console)


# Bad input: each is one clear line, and the other cases run

BROKEN = """
import time
from dataclasses import replace
import torch
from tests.refiners.parity.toys import Port, make_case

class Raises(Port):
    def forward(self, x):
        raise ValueError("cannot add (3,) to (4,)")

class NotANumber(Port):
    def forward(self, x):
        return super().forward(x) * float("nan")

class Hangs(Port):
    def forward(self, x):
        while True:
            time.sleep(0.01)

def returns(function):
    return lambda model, inputs: function(model(inputs["x"]))

def gone():
    return torch.nn.NoSuchModel()

LANES = ("float32",)
CASES = [
    make_case(id="first/good", lanes=LANES),
    make_case(Raises, id="bad/raises", lanes=LANES),
    make_case(id="bad/other-outputs", lanes=LANES, run_port=returns(lambda y: {"z": y})),
    make_case(id="bad/other-shapes", lanes=LANES, run_port=returns(lambda y: {"y": y[:1]})),
    make_case(id="bad/tuple", lanes=LANES, run_port=returns(lambda y: (y,))),
    make_case(id="bad/text", lanes=LANES, run_port=returns(lambda y: {"y": "y"})),
    make_case(NotANumber, id="bad/nan", lanes=LANES),
    make_case(Hangs, id="bad/hangs", lanes=LANES, time_limit=0.3),
    make_case(id="bad/upstream", lanes=LANES, upstream=gone),
    make_case(id="Bad Name", lanes=LANES),
    make_case(id="first/good", lanes=LANES),
    make_case(id="last/good", lanes=LANES),
]
"""
LINES = (
    "✗ Case 'Bad Name' cannot be used: its id must be lower-case segments joined by '/', as in 'bert/tiny'.",
    "✗ The case id 'first/good' is registered twice. Give each case an id of its own.",
    "✗ bad/raises[float32]: DIFFERENT: running the port raised ValueError: cannot add (3,) to (4,)",
    "✗ bad/other-outputs[float32]: DIFFERENT: the port does not return the output `y`",
    "✗ bad/other-shapes[float32]: DIFFERENT: output `y`: shape (1, 8) in the port, (3, 8) upstream",
    "✗ bad/tuple[float32]: DIFFERENT: running the port raised ParityError: The case's function must return a dict of",
    "✗ bad/text[float32]: DIFFERENT: running the port raised ParityError: ",
    "✗ bad/nan[float32]: DIFFERENT: output `y` is NaN everywhere in the port: nothing informative was compared",
    "✗ bad/hangs[float32]: DIFFERENT: running the port raised TimeLimit: it took more than 0.3 s, the case's `time_lim",
    "✗ bad/upstream[float32]: DIFFERENT: building upstream raised AttributeError: module 'torch.nn' has no attribute "
    f"'NoSuchModel' (torch {torch.__version__} is installed)",
)


def test_bad_input_is_one_clear_line_each_and_the_other_cases_run(console: Console, tmp_path: Path) -> None:
    (tmp_path / "cases_for_commands.py").write_text(BROKEN)
    outputs = Outputs(html=tmp_path / "out", junit=tmp_path / "out.xml", json=tmp_path / "out.json")
    assert run_cases("cases_for_commands,gone_module", outputs=outputs, console=console) == 1
    lines = text(console).splitlines()
    for line in LINES:
        assert len([found for found in lines if found.startswith(line)]) == 1, line
    assert "✗ The case module `gone_module` cannot be imported: ModuleNotFoundError: No module named" in text(console)
    assert "10/10 last/good[float32] BITWISE" in text(console)
    assert (tmp_path / "out.xml").read_text().count("<failure ") == 8 + 3
    assert "last/good" in (tmp_path / "out" / "index.html").read_text()


def test_an_upstream_that_the_installed_version_lacks_is_named_with_the_version(
    console: Console, tmp_path: Path
) -> None:
    (tmp_path / "cases_for_commands.py").write_text("from torch.nn import NoSuchModel\n")
    assert list_cases("cases_for_commands", console=console) == 1
    assert "cannot import name 'NoSuchModel' from 'torch.nn'" in text(console)
    assert f"(torch {torch.__version__} is installed)." in text(console).replace("\n", " ")


STOPS = """
from tests.refiners.parity.toys import Port, make_case

class Stops(Port):
    def forward(self, x):
        raise KeyboardInterrupt

CASES = [make_case(id="toy/first", lanes=("float32",)), make_case(Stops, id="toy/second", lanes=("float32",)),
         make_case(id="toy/third", lanes=("float32",))]
"""


def test_ctrl_c_keeps_what_was_measured_in_every_report(console: Console, tmp_path: Path) -> None:
    (tmp_path / "cases_for_commands.py").write_text(STOPS)
    outputs = Outputs(html=tmp_path / "out", junit=tmp_path / "out.xml", json=tmp_path / "out.json")
    assert run_cases("cases_for_commands", outputs=outputs, console=console) == 1
    assert "✗ interrupted: what follows was not run" in text(console)
    data = json.loads((tmp_path / "out.json").read_text())
    assert [row["case"] for row in data["results"]] == ["toy/first"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("not run</span>") == 2
    assert "interrupted: what follows was not run" in page
    xml = (tmp_path / "out.xml").read_text()
    assert xml.count('type="not run"') == 2
