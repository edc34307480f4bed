"""A run of many cases: nothing is lost, nothing is left out in silence, and the report says it all."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from refiners.errors import ParityError
from refiners.parity import Baseline, FullSize, Ledger, Result, Verdict, render_readme_table, run
from refiners.parity.full_size import check_full_size
from refiners.parity.ledger import Line
from refiners.parity.report import describe, live_progress, print_report, write_json
from refiners.parity.suite import register
from tests.refiners.parity.toys import Port, SameKeys, Upstream, make_case


def fails() -> nn.Module:
    raise RuntimeError("not this one")


def test_a_failing_case_does_not_end_the_run() -> None:
    report = run([make_case(fails, id="a/broken"), make_case(id="b/good")], lanes=["float32"])
    assert [result.verdict for result in report.results] == [Verdict.DIFFERENT, Verdict.BITWISE]
    assert report.problems == ["a/broken[float32]: DIFFERENT: building the port raised RuntimeError: not this one"]
    assert not report.ok


def test_a_green_run_is_ok_and_everything_registered_ran() -> None:
    report = run([make_case()])
    assert report.ok
    assert report.registered == tuple(f"toy/tower[{lane}]" for lane in ("float64", "float32", "bfloat16", "float16"))
    assert report.unran() == []


def test_what_was_registered_and_did_not_run_is_a_problem() -> None:
    def interrupt(item: Any, result: Any) -> None:
        if result is None and item.lane_name == "bfloat16":
            raise KeyboardInterrupt

    report = run([make_case()], progress=interrupt)
    assert [result.lane for result in report.results] == ["float64", "float32"]
    assert report.problems[0] == "interrupted: what follows was not run"
    assert report.problems[1].startswith("2 of 4 registered items did not run: toy/tower[bfloat16]")


def test_nothing_to_run_is_an_error() -> None:
    with pytest.raises(ParityError, match="Nothing is registered"):
        run([make_case(lanes=("float64",))], lanes=["float32"])
    with pytest.raises(ParityError, match="Nothing is registered"):
        run([])


def test_comparing_less_than_the_committed_counts_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    write_json(path, run([make_case(taps={"up": "up"}, full_size=sizes())]))
    baseline = Baseline.load(path)
    assert run([make_case(taps={"up": "up"}, full_size=sizes())], baseline=baseline, complete=True).ok
    less = run([make_case(full_size=sizes())], baseline=baseline)
    assert len(less.problems) == 4
    assert "it compares 10 tensors instead of 11, 224 elements instead of 248" in less.problems[0]
    gone = run([make_case(id="toy/other")], baseline=baseline, complete=True)
    assert len([problem for problem in gone.problems if "stands in the committed parity.json" in problem]) == 5


def test_counts_of_devices_that_are_not_here_are_not_missed() -> None:
    baseline = Baseline({"toy/tower[float32-cuda]": {"elements": 5}, "toy/tower[float32]": {"elements": 5}})
    assert baseline.unregistered(["toy/tower[float32]"], ["cpu"]) == []
    assert len(baseline.unregistered(["toy/tower[float32]"], ["cpu", "cuda"])) == 1


def test_a_file_that_is_no_parity_json_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    for text in ("[]", "{", '{"results": [{}]}'):
        path.write_text(text)
        with pytest.raises(ParityError, match="is no parity.json"):
            Baseline.load(path)


class Reordered(Port):
    def forward(self, x: Tensor) -> Tensor:
        x = x + nn.functional.gelu(self.up(self.norm_1(x)))
        y, weight = self.norm_2(x), self.down.weight
        return y[:, 4:] @ weight[:, 4:].T + (y[:, :4] @ weight[:, :4].T + self.down.bias) + 0 * self.down(y)


def line(lane: str, verdict: Verdict = Verdict.ROUNDING, case: str = "toy/tower") -> Line:
    return Line(case, lane, verdict, "another order", "never")


def test_the_ledger_decides_which_results_may_stand() -> None:
    lanes = ["float64", "float32"]
    assert len(run([make_case(Reordered)], lanes=lanes).problems) == 2
    ledger = Ledger([line("float64"), line("float32")])
    assert run([make_case(Reordered)], lanes=lanes, ledger=ledger).ok
    assert len(run([make_case()], lanes=lanes, ledger=ledger).problems) == 2
    stale = Ledger([line("float64"), line("float32"), line("float32", case="toy/gone")])
    assert "toy/gone[float32], which is not registered" in run([make_case(Reordered)], ledger=stale).problems[-1]


def sizes(port: Any = Port) -> dict[str, FullSize]:
    return {"base": FullSize(upstream=Upstream, port=port)}


def test_full_sizes_are_compared_on_meta() -> None:
    found = check_full_size(make_case(full_size=sizes()), "base")
    assert (found.equal, found.tensors, found.elements, found.id) == (True, 8, 176, "toy/tower[meta:base]")
    with pytest.raises(ParityError, match="has no full size 'large'. It has: base"):
        check_full_size(make_case(full_size=sizes()), "large")


class OtherShapes(Port):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(8, 9)


class Lenient(SameKeys):
    """Does not check keys, as a third party's may not."""

    def convert(self, state_dict: Mapping[str, Tensor], target: nn.Module) -> Mapping[str, Tensor]:
        return dict(state_dict)


@pytest.mark.parametrize(
    ("port", "reason"),
    [
        (OtherShapes, "`down.weight` is (8, 8) for (9, 8); `down.bias` is (8,) for (9,)"),
        (lambda: nn.Linear(2, 2), "missing `weight`; missing `bias`; unexpected `norm_1.weight`"),
        (nn.Identity, "nothing was compared"),
        (fails, "RuntimeError: not this one"),
    ],
)
def test_full_sizes_that_differ_are_red(port: Any, reason: str) -> None:
    case = make_case(full_size=sizes(port), key_map=Lenient())
    found = check_full_size(case, "base")
    assert not found.equal
    assert reason in found.reason
    report = run([case])
    assert [problem for problem in report.problems if problem.startswith("toy/tower[meta:base]: DIFFERENT")]


def test_a_result_survives_json_exactly() -> None:
    for result in run([make_case(Reordered), make_case(fails, id="a/b")]).results:
        assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_the_json_says_what_was_measured_with_what(tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    write_json(path, run([make_case(Reordered, full_size=sizes())]))
    data = json.loads(path.read_text())
    assert data["environment"]["torch"] == torch.__version__
    row = data["results"][1]
    assert (row["case"], row["lane"], row["verdict"]) == ("toy/tower", "float32", "ROUNDING")
    assert row["worst"]["ulp"] > 0
    assert row["error_port"] > 0
    assert data["full_size"][0]["elements"] == 176
    assert list(tmp_path.iterdir()) == [path]


def test_the_readme_table_depends_on_verdicts_and_counts_alone() -> None:
    cases = [
        make_case(),
        make_case(Reordered, id="toy/other", full_size=sizes()),
        make_case(id="zoo/one", lanes=("float32",)),
    ]
    first, second = (run(cases).to_json() for _ in range(2))
    assert render_readme_table(first) == render_readme_table(second)
    lines = render_readme_table(first).splitlines()
    assert lines[0] == "| family | cases | float64 | float32 | bfloat16 | float16 | full size | elements compared |"
    assert lines[2].startswith("| `toy` | 2 | 1 BITWISE, 1 ROUNDING |")
    assert lines[3].startswith("| `zoo` | 1 |  | 1 BITWISE |  |  |  |")
    assert f"torch {torch.__version__}" in lines[-1]


def test_the_terminal_shows_the_table_the_problems_and_the_summary() -> None:
    for width in (80, 140):
        console = Console(file=io.StringIO(), width=width)
        cases = [make_case(), make_case(fails, id="toy/broken")]
        with live_progress(console, register(cases)) as progress:
            report = run(cases, progress=progress)
        print_report(console, report)
        file = console.file
        assert isinstance(file, io.StringIO)
        text = file.getvalue()
        assert "8/8 toy/broken[float16] DIFFERENT" in text
        assert text.count("BITWISE") == 4 + 4 + 1
        assert "✗ toy/broken[float64, float32, bfloat16, float16]: DIFFERENT: building the port raised" in text
        assert "4 BITWISE, 4 DIFFERENT; 896 elements compared" in text


def test_a_live_table_follows_the_run() -> None:
    console = Console(file=io.StringIO(), width=120, height=20, force_terminal=True)
    cases = [make_case(id=f"toy/{i}", lanes=("float32",)) for i in range(3)]
    with live_progress(console, register(cases)) as progress:
        run(cases, progress=progress)
        shown = Console(file=io.StringIO(), width=120)
        shown.print(progress.render("toy/9[float32]"))
    assert isinstance(shown.file, io.StringIO)
    assert "3 of 3 done, running toy/9[float32]" in shown.file.getvalue()


def test_a_result_in_full_names_worst_element_errors_and_traceback() -> None:
    rounding, broken = run([make_case(Reordered), make_case(fails, id="a/b")], lanes=["float32"]).results
    text = describe(rounding)
    assert "toy/tower[float32]: ROUNDING" in text
    assert "worst element: y[" in text
    assert "error of the outputs against float64: upstream" in text
    assert "10 tensors, 224 elements, 4 leaves ran" in text
    assert 'raise RuntimeError("not this one")' in describe(broken)
