"""The pytest plugin, as a third party uses it: their project, their module, one option."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refiners.parity.report import describe
from tests.refiners.parity.toys import make_case, result_of

pytest_plugins = ["pytester"]

CASES = """
from tests.refiners.parity.toys import Port, Upstream, make_case
from refiners.parity import FullSize

class Wrong(Port):
    def __init__(self):
        super().__init__(eps=1e-6)

SIZE = {{"base": FullSize(upstream=Upstream, port=Port)}}
CASES = [{cases}]
"""
GOOD = "make_case(id='good/one', full_size=SIZE), make_case(id='good/two', lanes=('float32',))"
BAD = "make_case(Wrong, id='bad/one', lanes=('float64', 'float32'))"


class Project:
    """A project with a module of cases and a test that has nothing to do with them."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        pytester.syspathinsert(Path(__file__).parents[3])
        # What is imported here needs not be imported again by each of the sessions inside a test.
        describe(result_of(make_case()))
        pytester.makepyfile(test_unrelated="def test_unrelated():\n    raise AssertionError('not asked for')\n")

    def cases(self, cases: str) -> None:
        self.pytester.makepyfile(their_cases=CASES.format(cases=cases))

    def run(self, *arguments: str) -> pytest.RunResult:
        options = ("-p", "refiners.parity.plugin", "-p", "no:cacheprovider", "--assert=plain")
        return self.pytester.runpytest_inprocess(*options, *arguments)


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return Project(pytester)


def test_the_cases_of_a_module_run_and_nothing_else(project: Project) -> None:
    project.cases(GOOD)
    result = project.run("--parity-cases", "their_cases", "-v")
    result.assert_outcomes(passed=6)
    result.stdout.fnmatch_lines(["*good/one?float32? PASSED*", "*good/one?meta:base? PASSED*"])
    result.stdout.fnmatch_lines(
        ["*good/one*BITWISE*BITWISE*BITWISE*BITWISE*equal*", "5 BITWISE, 1 of 1 full sizes equal*"]
    )
    assert result.ret == pytest.ExitCode.OK


def test_a_fault_fails_with_its_reason_and_no_frames_of_the_engine(project: Project) -> None:
    project.cases(BAD)
    result = project.run("--parity-cases", "their_cases")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["DIFFERENT: output `y` differs in float64 by *", "*worst element: y*upstream*port*"])
    result.stdout.no_fnmatch_line("*plugin.py*")


def test_a_fault_is_explained_where_it_fails(project: Project) -> None:
    project.cases(BAD)
    result = project.run("--parity-cases", "their_cases", "--lanes", "float64")
    result.stdout.fnmatch_lines(["DIFFERENT:*", "bad/one?float64?: 2 faults*", "*equal*when `eps` is 1e-05"])


def test_items_are_chosen_by_their_id(project: Project) -> None:
    project.cases(GOOD)
    project.run("--parity-cases", "their_cases", "-k", "good/one and float32").assert_outcomes(passed=1, deselected=5)
    project.run("--parity-cases", "their_cases", "--lanes", "float64,float32").assert_outcomes(passed=3)


def test_the_results_are_written_and_held_against_the_committed_ones(project: Project) -> None:
    project.cases(GOOD)
    assert project.run("--parity-cases", "their_cases", "--parity-json", "parity.json").ret == 0
    path = project.pytester.path / "parity.json"
    data = json.loads(path.read_text())
    assert (len(data["results"]), len(data["full_size"]), data["registered"], data["problems"]) == (5, 1, 6, [])
    again = ("--parity-cases", "their_cases", "--parity-baseline", "parity.json")
    project.run(*again).assert_outcomes(passed=6)
    data["results"][0]["elements"] += 1
    path.write_text(json.dumps(data))
    result = project.run(*again)
    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines(["*it compares 224 elements instead of 225*"])


def test_a_ledger_turns_a_known_gap_into_an_expected_failure(project: Project) -> None:
    project.cases(BAD)
    lines = "".join(
        f'[[line]]\nid = "bad/one"\nlane = "{lane}"\nverdict = "DIFFERENT"\ncause = "eps"\nuntil = "mended"\n'
        for lane in ("float64", "float32")
    )
    (project.pytester.path / "ledger.toml").write_text(lines)
    arguments = ("--parity-cases", "their_cases", "--parity-ledger", "ledger.toml")
    project.run(*arguments).assert_outcomes(xfailed=2)
    project.cases("make_case(id='bad/one', lanes=('float64',))")
    sys.modules.pop("their_cases", None)
    result = project.run(*arguments)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*remove the line*", "*bad/one?float32?, which is not registered: remove it*"])


def test_a_test_module_that_names_cases_brings_its_own_ledger_and_counts(project: Project) -> None:
    project.cases(GOOD)
    folder = project.pytester.mkdir("proof")
    (folder / "test_parity.py").write_text('PARITY_CASES = "their_cases"\n')
    project.run("proof").assert_outcomes(passed=6)
    (folder / "ledger.toml").write_text(
        '[[line]]\nid = "gone/one"\nlane = "float32"\nverdict = "ROUNDING"\ncause = "x"\nuntil = "y"\n'
    )
    result = project.run("proof")
    result.assert_outcomes(passed=6, failed=1)
    result.stdout.fnmatch_lines(["*gone/one?float32?, which is not registered: remove it*"])
    (folder / "ledger.toml").write_text("")
    (folder / "parity.json").write_text(
        json.dumps({"results": [{"case": "gone/one", "lane": "float32", "elements": 1}], "full_size": []})
    )
    result = project.run("proof")
    result.assert_outcomes(passed=6, failed=1)
    result.stdout.fnmatch_lines(["*gone/one?float32? stands in the committed parity.json and is not registered*"])


HAS_OPTIONS = """
def pytest_addoption(parser):
    parser.addoption("--device", default="theirs")

def pytest_report_header(config):
    return f"their device is {config.getoption('--device')}"
"""


def test_options_of_a_project_win_over_the_short_names(project: Project) -> None:
    """Loaded in every project, the plugin may not break one whose conftest has a `--device` of its own."""
    project.cases("make_case(id='good/one', lanes=('float32', 'float64'))")
    project.pytester.makeconftest(HAS_OPTIONS)
    arguments = (
        "--parity-cases",
        "their_cases",
        "--device",
        "tpu",
        "--parity-device",
        "all",
        "--parity-lanes",
        "float32",
    )
    result = project.run(*arguments)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["their device is tpu"])


def test_the_short_names_work_where_they_are_free(project: Project) -> None:
    project.cases("make_case(id='good/one', lanes=('float32', 'float64'))")
    project.run("--parity-cases", "their_cases", "--device", "cpu", "--lanes=float64").assert_outcomes(passed=1)
    assert project.run("--parity-cases", "their_cases", "--device", "tpu").ret == pytest.ExitCode.USAGE_ERROR


LOSES_ONE = """
import pytest

def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if "float16]" not in item.name]
"""


def test_a_run_that_loses_items_fails_unless_a_filter_was_given(project: Project) -> None:
    project.cases("make_case(id='good/one')")
    project.pytester.makeconftest(LOSES_ONE)
    result = project.run("--parity-cases", "their_cases")
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*2 of 4 registered parity items did not run: good/one?bfloat16?, good/one?float16?*"])
    assert project.run("--parity-cases", "their_cases", "-k", "good").ret == pytest.ExitCode.OK


SKIPS = """
import pytest

def pytest_runtest_setup(item):
    pytest.skip("not today")
"""


def test_a_run_in_which_everything_is_skipped_fails(project: Project) -> None:
    project.cases("make_case(id='good/one', lanes=('float32',))")
    project.pytester.makeconftest(SKIPS)
    result = project.run("--parity-cases", "their_cases")
    result.assert_outcomes(skipped=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*1 of 1 registered parity items did not run*"])


@pytest.mark.parametrize(
    ("cases", "arguments", "line"),
    [
        ("1", (), "*`CASES?0?` of `their_cases` must be a Case, got int*"),
        ("", (), "*`CASES` of `their_cases` is empty*"),
        (GOOD, ("--lanes", "float8"), "*no lane 'float8'*"),
        (GOOD, ("--parity-ledger", "none.toml"), "*none.toml cannot be read*"),
        (BAD, ("--lanes", "float16"), "*Nothing is registered*"),
    ],
)
def test_what_cannot_be_run_is_red_and_says_why(
    project: Project, cases: str, arguments: tuple[str, ...], line: str
) -> None:
    project.cases(cases)
    result = project.run("--parity-cases", "their_cases", *arguments)
    assert result.ret in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)
    text = [*result.outlines, *result.errlines]
    from fnmatch import fnmatch

    assert any(fnmatch(found, line) for found in text)


def test_a_broken_module_does_not_hide_the_others(project: Project) -> None:
    project.cases("make_case(id='good/one', lanes=('float32',))")
    result = project.run("--parity-cases", "their_cases,not_there")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*case module `not_there` cannot be imported*"])


def test_the_plugin_costs_projects_without_cases_nothing() -> None:
    """Loaded through its entry point in every project, it may import neither torch nor rich."""
    script = (
        "import sys, pytest, refiners.parity.plugin;"
        "heavy = [name for name in ('torch', 'rich', 'numpy', 'refiners.parity.case') if name in sys.modules];"
        "sys.exit(', '.join(heavy) or 0)"
    )
    root = Path(__file__).parents[3]
    found = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


def test_the_plugin_may_be_named_on_the_command_line_too(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.cases("make_case(id='good/one', lanes=('float32',))")
    run: Callable[..., pytest.RunResult] = project.run
    run("-p", "refiners.parity.plugin", "--parity-cases", "their_cases").assert_outcomes(passed=1)


# Several processes, shards, and what changed


def xdist(project: Project, *arguments: str) -> pytest.RunResult:
    """A session of two processes, in a process of its own as its workers are."""
    given = ("-p", "refiners.parity.plugin", "-p", "xdist.plugin", "-p", "no:cacheprovider", "--assert=plain")
    return project.pytester.runpytest_subprocess(*given, "-n", "2", "--dist", "worksteal", *arguments)


def without_times(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text())
    for row in (*data["results"], *data["full_size"]):
        del row["seconds"]
    return {**data, "problems": sorted(data["problems"])}


MANY = f"{GOOD}, {BAD}, *[make_case(id='many/' + name) for name in 'abcd']"


def test_two_processes_give_the_results_of_one(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts, counts, order, what is wrong and why, all but the times; and what has to run again."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    project.cases(MANY)
    project.run("--parity-cases", "their_cases", "--parity-json", "one.json").assert_outcomes(passed=22, failed=2)
    result = xdist(project, "--parity-cases", "their_cases", "--parity-json", "two.json", "--parity-html", "out")
    result.assert_outcomes(passed=22, failed=2)
    result.stdout.fnmatch_lines(["*bad/one?float64?: 2 faults*", "*21 BITWISE, 2 DIFFERENT*", "page: *"])
    one, two = (without_times(project.pytester.path / f"{name}.json") for name in ("one", "two"))
    assert [row["case"] for row in two["results"]] == [row["case"] for row in one["results"]]
    seconds = [told.pop("text") for run in (one, two) for told in run["explanations"].values()]
    assert len(seconds) == 4
    assert two == one
    assert "Equal when <code>eps</code> is 1e-05" in (project.pytester.path / "out" / "index.html").read_text()
    again = xdist(project, "--parity-cases", "their_cases", "--changed")
    again.stdout.fnmatch_lines(["changed: 2 of 24 run, 22 passed before with the same digest"])


DIES = """
import os
from tests.refiners.parity.toys import Port, make_case

class Dies(Port):
    def forward(self, x):
        os._exit(1)

class CachesTheFirst(Port):
    def forward(self, x):
        if "kept" not in self.__dict__:
            self.kept = super().forward(x)
        return self.kept

CASES = [make_case(id="good/one"), make_case(Dies, id="bad/dies", lanes=("float64",)),
         make_case(CachesTheFirst, id="bad/cached", lanes=("float64",)), make_case(id="good/two")]
"""


def test_in_several_processes_nothing_is_lost_in_silence(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale line of the ledger, a process that dies, and what only the second look sees."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    project.pytester.makepyfile(their_cases=DIES)
    line = '[[line]]\nid = "good/gone"\nlane = "float32"\nverdict = "ROUNDING"\ncause = "x"\nuntil = "y"\n'
    (project.pytester.path / "ledger.toml").write_text(line)
    result = xdist(project, "--parity-cases", "their_cases", "--parity-ledger", "ledger.toml")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=8, failed=3)
    result.stdout.fnmatch_lines(["*good/gone?float32?, which is not registered: remove it*"])
    result.stdout.fnmatch_lines(["*with other weights and inputs the output `y` differs*"])
    result.stdout.fnmatch_lines(["*worker * crashed while running *bad/dies*"])
    result.stdout.fnmatch_lines(["*1 of 10 registered parity items did not run: bad/dies?float64?*"])


def passed_in(project: Project, *arguments: str) -> set[str]:
    project.run("--parity-cases", "their_cases", "--parity-json", "shard.json", *arguments)
    path = project.pytester.path / "shard.json"
    data = json.loads(path.read_text())
    path.unlink()
    rows = {f"{row['case']}[{row['lane']}]" for row in data["results"]}
    return rows | {f"{row['case']}[meta:{row['name']}]" for row in data["full_size"]}


def test_shards_are_disjoint_and_make_up_the_whole(project: Project) -> None:
    project.cases(GOOD)
    whole = passed_in(project)
    first, second = passed_in(project, "--shard", "1/2"), passed_in(project, "--shard=2/2")
    assert first | second == whole
    assert not first & second
    assert len({name.partition("[")[0] for name in first}) == 1


def test_a_shard_is_complete_in_itself_and_holds_other_tests_too(project: Project) -> None:
    project.cases(GOOD)
    folder = project.pytester.mkdir("proof")
    (folder / "test_parity.py").write_text('PARITY_CASES = "their_cases"\ndef test_a(): pass\ndef test_b(): pass\n')
    counts = [project.run("proof", "--shard", f"{number}/3").parseoutcomes() for number in (1, 2, 3)]
    assert sum(count["passed"] for count in counts) == 8
    assert all(count["passed"] + count["deselected"] == 8 for count in counts)
    result = project.run("proof", "--shard", "1/3")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["shard 1/3: * of 8 run here"])


def test_there_is_no_shard_three_of_two(project: Project) -> None:
    project.cases(GOOD)
    result = project.run("--parity-cases", "their_cases", "--shard", "3/2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*There is no shard '3/2'*"])


def test_what_passed_is_left_out_until_it_changes(project: Project) -> None:
    project.cases(GOOD)
    first = project.run("--parity-cases", "their_cases", "--changed")
    first.assert_outcomes(passed=6)
    second = project.run("--parity-cases", "their_cases", "--changed")
    second.assert_outcomes(deselected=6)
    assert second.ret == pytest.ExitCode.OK
    second.stdout.fnmatch_lines(["changed: 0 of 6 run, 6 passed before with the same digest"])
    path = project.pytester.path / "their_cases.py"
    path.write_text(f"{path.read_text()}\n# changed\n")
    project.run("--parity-cases", "their_cases", "--changed").assert_outcomes(passed=6)


def test_what_failed_runs_again_although_nothing_changed(project: Project) -> None:
    project.cases(f"{GOOD}, {BAD}")
    arguments = ("--parity-cases", "their_cases")
    project.run(*arguments).assert_outcomes(passed=6, failed=2)
    project.run(*arguments, "--changed").assert_outcomes(failed=2, deselected=6)


def test_other_reports_of_pytest_are_not_filled_with_results(project: Project) -> None:
    project.cases(GOOD)
    project.run("--parity-cases", "their_cases", "--junitxml", "out.xml")
    text = (project.pytester.path / "out.xml").read_text()
    assert text.count("<testcase ") == 6
    assert "refiners-parity" not in text


STOPS = """
import pytest

def pytest_runtest_call(item):
    if "good/two" in item.name:
        raise KeyboardInterrupt
"""


def test_ctrl_c_keeps_what_was_measured(project: Project) -> None:
    project.cases(GOOD)
    project.pytester.makeconftest(STOPS)
    given = (
        "-p",
        "refiners.parity.plugin",
        "-p",
        "no:cacheprovider",
        "--assert=plain",
        "--parity-cases",
        "their_cases",
    )
    outputs = ("--parity-json", "out.json", "--parity-html", "out")
    result = project.pytester.runpytest_inprocess(*given, *outputs, no_reraise_ctrlc=True)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    data = json.loads((project.pytester.path / "out.json").read_text())
    assert len(data["results"]) == 4
    assert data["problems"][0] == "interrupted: what follows was not run"
    assert "not run" in (project.pytester.path / "out" / "index.html").read_text()
