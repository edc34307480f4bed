"""What a run writes: the page, JUnit XML, the summary. Each is tried on a run in which everything went wrong once."""

import html.parser
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.parity import Case, CaseRunner, FullSize, Lane, Ledger, Report, Result, Verdict
from refiners.parity.depth import relative_error
from refiners.parity.explaining import explain_failures, lane_to_explain
from refiners.parity.junit import junit
from refiners.parity.ledger import Judgement, Line
from refiners.parity.page import render_page, write_page
from refiners.parity.page.plot import plot
from refiners.parity.page.trees import Marks, Node, tree
from refiners.parity.page.write import with_code
from refiners.parity.report import in_short, render_summary, write_summary
from refiners.parity.suite import Item, run
from refiners.parity.told import LeafError, Told
from tests.refiners.parity.toys import Port, Upstream, make_case


class WrongEps(Port):
    def __init__(self) -> None:
        super().__init__(eps=1e-3)


class NotANumber(Port):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float("nan")


class Raises(Port):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no \x00 such <thing> as & `this`")


def none_built() -> nn.Module:
    raise AttributeError("module 'upstream' has no attribute 'Gone'")


LANES = ("float64", "float32")
SIZES = {"base": FullSize(upstream=Upstream, port=Port), "odd": FullSize(upstream=Upstream, port=fl.Identity)}
CASES = [
    make_case(id="toy/good", lanes=LANES, full_size=SIZES, taps={"up": "up"}, summary="equal & <well>"),
    make_case(WrongEps, id="toy/eps", lanes=LANES),
    make_case(WrongEps, id="toy/known", lanes=("float64",)),
    make_case(NotANumber, id="odd/nan", lanes=LANES),
    make_case(Raises, id="odd/raises", lanes=LANES),
    make_case(id="odd/gone", lanes=LANES, upstream=none_built),
    make_case(id="odd/late", lanes=LANES),
]
LEDGER = Ledger([Line("toy/known", "float64", Verdict.DIFFERENT, "eps", "it is mended")])


def stopped_at(case_id: str) -> Any:
    def progress(item: Item, result: Any) -> None:
        if item.case.id == case_id:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def report() -> Report:
    """Everything but the last case, which is interrupted; and what differs, explained."""
    made = run(CASES, ledger=LEDGER, progress=stopped_at("odd/late"))
    explain_failures(made, {case.id: case for case in CASES}, modules="their.cases")
    return made


def by_id(cases: Sequence[Case] = CASES) -> dict[str, Case]:
    return {case.id: case for case in cases}


class Page(html.parser.HTMLParser):
    """The elements of a page, checked for being closed in order."""

    VOID = frozenset({"meta", "input", "line", "polyline", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.found if "id" in attributes]


def test_the_page_is_one_file_that_loads_nothing(report: Report) -> None:
    page = Page(render_page(report, by_id()))
    assert page.open == []
    assert {tag for tag, _ in page.found}.isdisjoint({"link", "img", "iframe", "object", "embed"})
    assert not [attributes for _, attributes in page.found if "src" in attributes]
    assert not [a["href"] for _, a in page.found if "href" in a and not a["href"].startswith("#")]
    style = render_page(report, {}, with_trees=False)
    assert "url(" not in style
    assert "@import" not in style
    assert "http://" not in style
    assert "https://" not in style


def test_every_case_is_a_row_with_its_verdicts_and_every_link_leads_somewhere(report: Report) -> None:
    page = Page(render_page(report, by_id()))
    ids = page.ids()
    assert len(ids) == len(set(ids))
    assert {"toy-good", "toy-eps", "toy-known", "odd-nan", "odd-raises", "odd-gone", "odd-late"} <= set(ids)
    links = [attributes["href"][1:] for _, attributes in page.found if "href" in attributes]
    assert set(links) <= set(ids)
    kinds = {attributes["id"]: attributes["data-kind"] for tag, attributes in page.found if "data-words" in attributes}
    assert kinds["toy-good"] == "different"  # one of its full sizes is
    assert kinds["odd-late"] == "not-run"
    assert "toy-eps" in links
    assert "toy-known" not in links


def test_the_page_says_why_and_how_to_see_it_again(report: Report) -> None:
    text = render_page(report, by_id(), "their.cases")
    assert "Equal when <code>eps</code> is 1e-05" in text
    assert "refiners parity show toy/eps --cases their.cases" in text
    assert "differs first" in text
    assert "Error along the forward" in text
    assert "interrupted: what follows was not run" in text
    assert "equal &amp; &lt;well&gt;" in text
    assert "no \N{REPLACEMENT CHARACTER} such &lt;thing&gt;" in text
    assert "transformers" not in text
    assert f"<dd>{torch.__version__}</dd>" in text


def test_a_green_page_is_green() -> None:
    case = make_case(id="toy/good", lanes=("float32",), taps={"up": "up"})
    made = run([case])
    text = render_page(made, by_id([case]))
    assert "1 case may stand" in text
    assert 'class="good"' in text
    assert "What differs" not in text
    assert "1 module is compared along the way" in text


def test_a_case_whose_sides_cannot_be_built_has_a_page(report: Report) -> None:
    text = render_page(report, by_id())
    assert "upstream cannot be built here: AttributeError" in text


def test_the_page_replaces_the_old_one_whole(report: Report, tmp_path: Path) -> None:
    path = write_page(tmp_path / "deep" / "out", report, {})
    assert path.read_text(encoding="utf-8").endswith("</html>")
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]


def test_equal_neighbours_of_a_tree_are_one_line() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(5)))
    folded = tree(layers, Marks())
    assert [(node.name, node.times) for node in folded.children] == [("0: Sequential", 5)]
    marked = tree(layers, Marks({"2.0": "introduces"}, first="2.0"))
    assert [node.times for node in marked.children] == [2, 1, 2]
    assert marked.worst == "introduces"
    assert marked.children[1].is_open
    assert not marked.children[0].is_open
    assert marked.children[1].children[0].anchor == "first"


def test_a_chain_is_shown_as_it_prints() -> None:
    node: Node = tree(fl.Chain(fl.Linear(2, 3), fl.Residual(fl.ReLU())), Marks())
    assert (node.tag, node.name) == ("(CHAIN)", "Chain") or node.tag == "(CHAIN)"
    assert (node.children[0].name, node.children[0].attributes) == ("Linear", "(in_features=2, out_features=3)")
    assert node.children[1].tag == "(RES)"


def test_the_drawing_of_the_error_says_where_it_leaves_zero() -> None:
    errors = [
        LeafError(port=name, upstream=name, error=error) for name, error in (("a", 0.0), ("b", 1e-3), ("c", None))
    ]
    made = plot(errors)
    assert made is not None
    assert made.told == (
        "The error is zero behind the first 1 of 3 steps, leaves zero at b, and is not finite at the end."
    )
    first, second, third = (dot.y for dot in made.dots)
    assert first > second > third
    assert plot(errors[:1]) is None
    assert plot([]) is None


def test_an_error_is_relative_and_zero_only_for_equal_bits() -> None:
    ones = torch.ones(4)
    assert relative_error(ones, ones.clone()) == 0.0
    assert relative_error(ones * 1.5, ones) == 0.5
    assert relative_error(torch.zeros(4), -torch.zeros(4)) is None
    assert relative_error(ones * float("nan"), ones) is None
    assert relative_error(torch.ones(5), ones) is None
    assert relative_error(ones.reshape(2, 2), ones) == 0.0


def test_text_between_backticks_is_code() -> None:
    assert with_code("a `b<` c") == "a <code>b&lt;</code> c"
    assert with_code("one ` alone") == "one ` alone"


def test_junit_has_a_testcase_for_each_case_and_lane(report: Report) -> None:
    root = ElementTree.fromstring(junit(report))
    cases = {case.get("name", ""): case for case in root.iter("testcase")}
    assert set(report.registered) <= set(cases)
    children = {name: [child.tag for child in case] for name, case in cases.items()}
    assert children["toy/good[float32]"] == ["system-out"]
    assert children["toy/eps[float64]"] == ["failure"]
    assert children["toy/known[float64]"] == ["skipped"]
    assert children["odd/late[float64]"] == ["error"]
    assert children["toy/good[meta:odd]"] == ["failure"]
    failure = cases["toy/eps[float64]"].find("failure")
    assert failure is not None
    assert "when `eps` is 1e-05" in str(failure.text)
    problems = [case for case in root.iter("testcase") if case.get("classname") == "run"]
    messages = [failure.get("message", "") for case in problems for failure in case.iter("failure")]
    assert "interrupted: what follows was not run" in messages


def test_junit_counts_what_it_holds_and_says_what_was_measured_with(report: Report) -> None:
    root = ElementTree.fromstring(junit(report))
    for suite in root.iter("testsuite"):
        cases = suite.findall("testcase")
        assert int(suite.get("tests", "")) == len(cases)
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.get(attribute, "")) == sum(case.find(tag) is not None for case in cases)
        assert float(suite.get("time", "")) >= 0
        names = [entry.get("name") for entry in suite.iter("property")]
        assert {"python", "torch", "cpu"} <= set(names)
        assert suite[0].tag == "properties"
    assert int(root.get("tests", "")) == sum(int(suite.get("tests", "")) for suite in root.iter("testsuite"))


def test_the_summary_is_short_and_says_what_differs_first(report: Report) -> None:
    text = render_summary(report)
    lines = text.splitlines()
    assert lines[0] == "### ❌ Parity: 5 of 6 cases differ"
    assert "| `toy/eps` | float64, float32 |" in text
    assert "**Equal when `eps` is 1e-05.**" in text
    assert "- interrupted: what follows was not run" in lines
    assert f"torch {torch.__version__}" in lines[-1]
    assert len(lines) < 30
    green = run([make_case(lanes=("float32",))])
    assert render_summary(green).splitlines()[0] == "### ✅ Parity: 1 cases may stand"


def test_the_summary_is_appended_to_the_page_of_a_github_job(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step.md"
    path.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    write_summary(None, report)
    assert path.read_text().startswith("before\n### ❌ Parity")
    write_summary(tmp_path / "own.md", report)
    assert (tmp_path / "own.md").read_text().startswith("### ❌ Parity")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    write_summary(None, report)
    assert path.read_text().count("### ") == 1


def test_what_is_wrong_in_all_lanes_in_the_same_way_is_one_line(report: Report) -> None:
    lines = in_short(report)
    (line,) = [line for line in lines if "odd/raises" in line and "did not run" not in line]
    assert line.startswith("odd/raises[float64, float32]: DIFFERENT: running the port raised ValueError: no \x00 such")
    assert all("\n" not in line for line in lines)


def test_results_and_explanations_survive_being_written(report: Report) -> None:
    data = json.loads(json.dumps(report.to_json()))
    told = Told.from_json(data["explanations"]["toy/eps[float64]"])
    assert told == report.explanations["toy/eps[float64]"]
    assert told.depth[-1].mark == "output"
    assert [Result.from_json(row) for row in data["results"]] == report.results
    assert report.results[0].elements == sum(report.results[0].elements_by_kind.values())


def test_the_clearest_lane_is_explained_and_what_raised_is_not() -> None:
    def result(lane: str, verdict: Verdict, traceback: str = "") -> Result:
        return Result(case="toy/x", lane=lane, verdict=verdict, traceback=traceback)

    different = [result(lane, Verdict.DIFFERENT) for lane in ("float16", "float32")]
    assert lane_to_explain(different) == Lane("float32")
    assert lane_to_explain([result("float64", Verdict.BITWISE), *different]) == Lane("float32")
    assert lane_to_explain([result("float64", Verdict.DIFFERENT, "Traceback"), *different[:1]]) == Lane("float16")
    assert lane_to_explain([result("float64", Verdict.BITWISE)]) is None


def test_ctrl_c_while_explaining_keeps_the_explanations_that_are_there() -> None:
    cases = [make_case(WrongEps, id=f"toy/{i}", lanes=("float64",)) for i in range(2)]
    made = run(cases)

    def progress(told: str) -> None:
        if told.startswith("toy/1"):
            raise KeyboardInterrupt

    explain_failures(made, by_id(cases), progress=progress)
    assert list(made.explanations) == ["toy/0[float64]"]
    assert made.problems[-1] == "interrupted: not all that differs is explained"


def test_an_accepted_difference_is_not_explained() -> None:
    case = make_case(WrongEps, lanes=("float64",))
    made = run([case])
    made.judged[made.results[0].id] = Judgement(True, "known", True)
    explain_failures(made, by_id([case]))
    assert made.explanations == {}


def test_a_failing_chain_is_marked_in_the_tree() -> None:
    class Fails(fl.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    class Tower(fl.Chain):
        def __init__(self) -> None:
            super().__init__(fl.Linear(8, 8), fl.Chain(fl.ReLU(), Fails()))

    class Keys:
        def convert(self, state_dict: Any, target: nn.Module) -> Any:
            return {f"Linear.{key.rpartition('.')[2]}": tensor for key, tensor in state_dict.items()}

        def invert(self, state_dict: Any, source: Any) -> Any:
            return state_dict

    case = make_case(Tower, upstream=lambda: nn.Linear(8, 8), key_map=Keys(), lanes=("float32",))
    result = CaseRunner(case).run(Lane("float32"))
    assert result.reason == "running the port raised ValueError: no at `Tower.Chain.Fails`"
    text = render_page(run([case]), by_id([case]))
    assert "raises here" in text
