"""Cases are data: what is wrong with one is told when it is written down, all at once."""

from pathlib import Path
from typing import Any

import pytest

from refiners.errors import ParityError
from refiners.parity import collect_cases, load_cases, with_both_inits
from tests.refiners.parity.toys import make_case

MODULE = """
from tests.refiners.parity.toys import make_case
CASES = [{cases}]
"""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": "Bert Tiny"}, "its id must be lower-case segments joined by '/'"),
        ({"id": ""}, "its id must be"),
        ({"id": "a//b"}, "its id must be"),
        ({"upstream": None}, "`upstream` must be a function, got None"),
        ({"key_map": object()}, "`key_map` has no `convert` method, got object"),
        ({"lanes": ("float8",)}, "its lanes must be some of float64, float32"),
        ({"lanes": ()}, "its lanes must be some of"),
        ({"lanes": ("float32", "float32")}, "each once"),
        ({"init": "random"}, "`init` must be 'informative' or 'upstream', got 'random'"),
        ({"without_influence": {"key.bias": " "}}, "no reason is given for `key.bias`"),
    ],
)
def test_a_case_that_cannot_be_used_says_why(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ParityError) as error:
        make_case(**changes)
    assert reason in str(error.value)


def test_all_that_is_wrong_with_a_case_is_told_at_once() -> None:
    with pytest.raises(ParityError) as error:
        make_case(id="A", inputs=3, run_port=None)
    assert str(error.value).count(";") == 2


def test_both_inits_are_two_cases() -> None:
    first, second = with_both_inits(make_case(seed=3))
    assert (first.id, second.id) == ("toy/tower", "toy/tower.upstream-init")
    assert (second.init, second.seed, second.family) == ("upstream", 3, "toy")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes modules that can be imported in this test only."""
    import sys

    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write_module(name: str, text: str) -> None:
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    yield write_module
    for name in set(sys.modules) - before:
        if name.startswith("cases_of_"):
            del sys.modules[name]


def test_cases_of_several_modules_are_gathered_in_order(write: Any) -> None:
    write("cases_of_a", MODULE.format(cases="make_case(id='a/two'), make_case(id='a/one')"))
    write("cases_of_b", MODULE.format(cases="make_case(id='b/one')"))
    assert [case.id for case in load_cases("cases_of_b, cases_of_a")] == ["b/one", "a/two", "a/one"]
    assert [case.id for case in load_cases(["cases_of_a"])] == ["a/two", "a/one"]


def test_a_package_stands_for_its_public_modules(write: Any) -> None:
    write("cases_of_package.__init__", "")
    write("cases_of_package._shared", "HELP = 1")
    write("cases_of_package.b", MODULE.format(cases="make_case(id='b/one')"))
    write("cases_of_package.a", MODULE.format(cases="make_case(id='a/one')"))
    assert [case.id for case in load_cases("cases_of_package")] == ["a/one", "b/one"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nothing_of_this_name", "cannot be imported: ModuleNotFoundError: No module named"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("X = 1", "has no `CASES`"),
        ("CASES = []", "`CASES` of `cases_of_broken` is empty"),
        ("CASES = 'all'", "must be a sequence of Case, got str"),
        ("CASES = [1]", "`CASES[0]` of `cases_of_broken` must be a Case, got int"),
        (MODULE.format(cases="make_case(), make_case()"), "'toy/tower' is registered twice"),
        (MODULE.format(cases="make_case(id='Wrong Name')"), "Case 'Wrong Name' cannot be used"),
    ],
)
def test_a_module_that_cannot_be_used_is_one_line_and_the_others_go_on(write: Any, text: str, reason: str) -> None:
    write("cases_of_broken", text)
    write("cases_of_good", MODULE.format(cases="make_case(id='good/one')"))
    registry = collect_cases("cases_of_broken,cases_of_good")
    assert "good/one" in [case.id for case in registry.cases]
    assert len(registry.problems) == 1
    assert reason in registry.problems[0]
    with pytest.raises(ParityError, match="cases_of_broken|toy/tower"):
        load_cases("cases_of_broken,cases_of_good")


def test_no_case_at_all_is_an_error() -> None:
    with pytest.raises(ParityError, match="No parity case is registered in ''"):
        load_cases("")
    with pytest.raises(ParityError, match="`no.such.module` cannot be imported"):
        load_cases("no.such.module")


def test_a_case_that_is_not_there_is_an_error_with_the_nearest_names(write: Any) -> None:
    write("cases_of_near", MODULE.format(cases="make_case(id='bert/tiny'), make_case(id='bert/large')"))
    with pytest.raises(ParityError, match="no case 'bert/tinny' among 2. Nearest: bert/tiny"):
        collect_cases("cases_of_near").one("bert/tinny")
