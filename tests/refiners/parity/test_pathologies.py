"""The checker checked: one row for each way to fool the verifier, every one of which must come out red.

A row says how a case of two equal models is broken and which words the one line about it has to contain. The controls
are rows that look odd and are right: they must stay BITWISE, or the verifier would cry wolf.
"""

import importlib
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from refiners.errors import ParityError
from refiners.parity import Verdict, collect_cases, run
from refiners.parity.commands import Outputs, run_cases
from tests.refiners.parity import broken_ports as broken
from tests.refiners.parity.broken_ports import Golden, beside, both, one, put
from tests.refiners.parity.toys import Port, Upstream, make_case, result_of

NO_GRAD: dict[str, Any] = {"gradients": False}

# name: how the case is broken, words that its first reason must contain
PATHOLOGIES: dict[str, tuple[dict[str, Any], str]] = {
    # outputs that prove nothing
    "constant-port": (one(lambda y: y * 0 + 1), "output `y` is constant in the port"),
    "constant-on-both-sides": (both(lambda y: y * 0 + 1), "output `y` is constant upstream"),
    "constant-beside-nan": (both(lambda y: put(y * 0 + 1, (0, 0), torch.nan)), "output `y` is constant upstream"),
    "empty": (both(lambda y: y[:0]), "zero elements were compared"),
    "one-of-two-is-empty": (beside(lambda y: y[:0], lambda y: y[:0]), "output `z` has no elements"),
    "all-nan-on-both-sides": (both(lambda y: y * torch.nan), "output `y` is NaN everywhere"),
    "nothing-finite": (both(lambda y: put(y * torch.nan, 0, torch.inf)), "output `y` has no finite element"),
    "a-weight-as-output": (broken.after_running(lambda m: m.up.weight), "a weight that both sides share"),
    "depends-on-nothing": (
        broken.after_running(lambda m: torch.arange(4.0), **NO_GRAD),
        "no output changes when weights and inputs do",
    ),
    # shapes, dtypes, names
    "broadcastable": (one(lambda y: y[:1]), "shape (1, 8) in the port, (3, 8) upstream"),
    "n-and-n-by-1": (beside(lambda y: y[:, 0], lambda y: y[:, :1]), "output `z`: shape (3, 1) in the port, (3,)"),
    "dtype-upcast-on-one-side": (beside(lambda y: y.float(), lambda y: y), "float64 in the port, float32 upstream"),
    "rounded-inside": (one(lambda y: y.float().double()), "differs in float64 by"),
    "missing-output": (
        beside(lambda y: y, lambda y: y, run_port=lambda m, i: {"y": m(i["x"])}),
        "return the output `z`",
    ),
    "extra-output": (
        beside(lambda y: y, lambda y: y, run_upstream=lambda m, i: {"y": m(i["x"])}),
        "returns `z`, which",
    ),
    "misnamed-outputs": (
        {"run_upstream": broken.halves("left", "right"), "run_port": broken.halves("left", "rihgt")},
        "the port does not return the output `right`",
    ),
    "swapped-outputs": (
        {"run_upstream": broken.halves("left", "right"), "run_port": broken.halves("right", "left")},
        "differs in float64 by",
    ),
    "swapped-arguments": (
        {
            "upstream": broken.Difference,
            "port": broken.PortOfDifference,
            "inputs": broken.two_inputs,
            "run_upstream": broken.straight,
            "run_port": broken.swapped,
        },
        "differs in float64 by",
    ),
    "ignores-strides": ({"port": broken.IgnoresStrides, "inputs": broken.transposed}, "differs in float64 by"),
    "a-tensor-that-lies": (one(lambda y: (y + 1).as_subclass(broken.Liar)), "`y` is Liar"),
    "a-tuple-of-outputs": ({"run_port": lambda m, i: (m(i["x"]),)}, "must return a dict of tensors, got tuple"),
    # small differences
    "one-row": ({"port": broken.LastRow}, "differs in float64 by"),
    "one-element": (one(lambda y: put(y, (1, 3), 0.5)), "differs in float64 by"),
    "last-element": (one(lambda y: put(y, (-1, -1), float("1e-3"))), "worst at y[2, 7]"),
    "sign-of-zero": (beside(lambda y: put(y, 0, 0.0), lambda y: put(y, 0, -0.0)), "upstream 0.0, port -0.0"),
    "nan-payload": (
        beside(lambda y: put(y.detach(), 0, broken.nan(1)), lambda y: put(y.detach(), 0, broken.nan(2))),
        "upstream nan, port nan",
    ),
    "sign-of-infinity": (beside(lambda y: put(y, 0, torch.inf), lambda y: put(y, 0, -torch.inf)), "infinities or NaN"),
    "finite-on-one-side": (one(lambda y: put(y, 0, torch.inf)), "elements are finite on one side only"),
    "integers-off-by-one": (beside(lambda y: y.argmax(-1), lambda y: y.argmax(-1) + 1), "int64 values differ"),
    # ports that do not compute
    "compared-with-itself": (Golden().changes(lambda g, y: g.kept, **NO_GRAD), "was compared with itself"),
    "golden-values": (Golden().changes(lambda g, y: g.kept.clone(), **NO_GRAD), "with other weights and inputs"),
    "golden-values-true-gradients": (
        Golden(once=True).changes(lambda g, y: broken.StraightThrough.apply(y, g.kept, 1.0)),
        "with other weights and inputs",
    ),
    "runs-upstream-inside": (
        {"port": broken.Hidden},
        "the port: it runs modules of the other side that its own tree does not hold: `Upstream`",
    ),
    "patches-upstream": (
        {"upstream": broken.patched_upstream, "port": broken.port_that_patches},
        "differs in float64 by 0.001",
    ),
    "shares-upstreams-modules": (
        {"upstream": lambda: ONE, "port": lambda: ONE, "lanes": ("float32",)},
        "would be compared with itself",
    ),
    "weights-ignored": ({"port": broken.OwnConstants}, "gradient `norm_1.weight` differs in float64"),
    "weights-ignored-without-gradients": ({"port": broken.OwnConstants, **NO_GRAD}, "with other weights and inputs"),
    "caches-its-first-result": ({"port": broken.CachesTheFirst, **NO_GRAD}, "with other weights and inputs"),
    "upstream-caches-too": (
        {"upstream": broken.CachesTheFirst, "port": broken.CachesTheFirst, **NO_GRAD},
        "no output changes when weights and inputs do",
    ),
    "drifts-on-both-sides": (
        {"upstream": broken.Counts, "port": broken.Counts},
        "the port does not repeat its output `y` bit for bit",
    ),
    "otherwise-without-gradients": (
        one(lambda y: y if torch.is_grad_enabled() else 2 * y),
        "under `torch.no_grad()` the output `y` differs",
    ),
    "drifts-from-call-to-call": ({"port": broken.Counts}, "with other weights and inputs"),
    "not-deterministic": ({"port": broken.Clock}, "differs in float64 by"),
    "leaf-that-never-ran": (
        {"port": broken.Loose, "upstream": broken.Loose},
        "leaves of the port that never ran: `spare`",
    ),
    "leaf-whose-result-is-discarded": ({"port": broken.Discards}, "differs in float64 by"),
    "weights-without-influence": (
        {"port": broken.Discards, "upstream": broken.Discards},
        "cannot influence the compared",
    ),
    "key-map-that-hides-a-fault": (
        {"port": broken.NoSecondNorm, "key_map": broken.EasyKeys(), **NO_GRAD},
        "The key map writes into upstream's weights `norm_2.weight`",
    ),
    # what a side may not do
    "training-mode": ({"port": broken.Trains}, "the port: it is in training mode at `the model`"),
    "dropout-active": ({"port": broken.Dropout}, "differs in float64 by"),
    "writes-its-inputs": ({"port": broken.WritesItsInput}, "may not write into its inputs, and this one changes `x`"),
    "upstream-writes-its-inputs": (
        {"upstream": broken.WritesItsInput},
        "running upstream raised ParityError: A forward",
    ),
    "writes-its-weights": (
        {"port": broken.WritesItsWeights},
        "the port: its forward writes into its weights `up.bias`",
    ),
    "changes-the-default-dtype": (
        {"port": broken.ChangesTheDefault},
        "it changes torch's default dtype to torch.float16",
    ),
    "other-buffer": ({"upstream": broken.Buffered, "port": lambda: broken.Buffered(1)}, "differs in float64 by"),
    "ties-what-is-untied": ({"port": broken.Tied}, "the port ties `norm_1.bias` and `norm_2.bias`, upstream does not"),
    "unties-what-is-tied": (
        {"upstream": broken.Tied},
        "upstream ties `norm_1.bias` and `norm_2.bias`, the port does not",
    ),
    # gradients
    "gradient-detached": (one(lambda y: y.detach()), "the output `y` can be differentiated upstream only"),
    "gradient-scaled": (one(broken.scaled_gradient), "differs in float64 by 0.001 relative"),
    "gradient-of-one-input": (
        {"run_port": lambda m, i: {"y": m(i["x"].detach())}},
        "input gradient `x` differs in float64",
    ),
    "frozen": ({"port": broken.Frozen}, "the port's `up.weight` has requires_grad=False"),
    # what breaks
    "raises": (one(lambda y: y @ y), "running the port raised RuntimeError: mat1 and mat2"),
    "raises-what-cannot-be-shown": (
        {"port": broken.raises(broken.Unprintable())},
        "building the port raised Unprintable",
    ),
    "raises-past-exception": (
        {"port": broken.raises(broken.Stops("enough"))},
        "building the port raised Stops: enough",
    ),
    "sparse": (both(lambda y: y.to_sparse(), **NO_GRAD), "`y` is a sparse_coo tensor: return `to_dense()`"),
    "nested": (
        both(lambda y: torch.nested.as_nested_tensor([y[0], y[1, :3]]), **NO_GRAD),
        "`y` is a nested tensor: return its rows one by one",
    ),
    "on-meta": (both(lambda y: y.to("meta"), **NO_GRAD), "`y` is on the meta device, which holds no numbers"),
    "quantized": (
        both(lambda y: torch.quantize_per_tensor(y.detach().float(), 0.1, 0, torch.qint8), **NO_GRAD),
        "`y` is quantized: return `dequantize()`",
    ),
    "builder-returns-none": ({"port": lambda: None}, "building the port raised ParityError: The builder must return"),
    "builder-returns-a-class": ({"port": lambda: Port}, "must return a torch.nn.Module, got type"),
    "builder-gives-a-dtype": ({"upstream": lambda: Upstream().half()}, "Give no dtype in a builder"),
    "upstream-class-is-gone": (
        {"upstream": lambda: nn.NotThere()},
        "building upstream raised AttributeError: module 'torch.nn' has no",
    ),
    "loops-for-ever": (
        {"port": broken.Loops, "time_limit": 0.2},
        "running the port raised TimeLimit: it took more than 0.2",
    ),
    "sleeps": ({"port": broken.Sleeps, "time_limit": 0.2}, "running the port raised TimeLimit: it took more than 0.2"),
    "builder-loops": (
        {"port": lambda: broken.Loops()(torch.ones(1)), "time_limit": 0.2},
        "building the port raised TimeLimit",
    ),
}
ONE = Upstream()

CONTROLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without-gradients": NO_GRAD,
    "other-order-of-outputs": {
        "run_upstream": broken.halves("left", "right"),
        "run_port": lambda m, i: dict(reversed(broken.halves("left", "right")(m, i).items())),
    },
    "other-strides": {"run_port": lambda m, i: {"y": m(i["x"]).T.contiguous().T}},
    "strided-inputs": {"inputs": broken.transposed},
    "tied-on-both-sides": {"upstream": broken.Tied, "port": broken.Tied},
    "equal-nan-beside-numbers": both(lambda y: put(y, 0, torch.nan)),
    "equal-integers": beside(lambda y: y.argmax(-1), lambda y: y.argmax(-1)),
    "a-weight-beside-the-output": {
        "run_upstream": lambda m, i: {"y": m(i["x"]), "w": m.up.weight},
        "run_port": lambda m, i: {"y": m(i["x"]), "w": m.up.weight},
    },
    "no-weights-and-fixed-inputs": {
        "upstream": broken.Sines,
        "port": broken.Sines,
        "inputs": lambda generator: {"x": torch.arange(6.0)},
    },
    "otherwise-without-gradients-as-upstream": both(lambda y: y if torch.is_grad_enabled() else 2 * y),
    "same-buffer": {"upstream": broken.Buffered, "port": broken.Buffered},
}


@pytest.mark.parametrize("name", PATHOLOGIES)
def test_a_pathology_is_red_and_says_so_in_one_line(name: str) -> None:
    changes, words = PATHOLOGIES[name]
    case = make_case(**changes)
    report = run([case, make_case(id="toy/next", lanes=("float32",))], lanes=case.lanes[:1])
    result, line = report.results[0], report.problems[0]
    assert result.verdict is not Verdict.BITWISE
    assert [reason for reason in result.reasons if words in reason], result.reasons
    assert line.startswith(f"toy/tower[{case.lanes[0]}]: ")
    assert "\n" not in line
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_is_bitwise(name: str) -> None:
    result = result_of(make_case(**CONTROLS[name]))
    assert (result.verdict, result.reasons) == (Verdict.BITWISE, ())


def test_a_port_that_patches_torch_is_compared_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda first, second: True)
    result = result_of(make_case(**one(lambda y: y * 1.5)), "float32")
    assert result.verdict is Verdict.DIFFERENT
    assert result.worst is not None


INSTALLED = """
from torch import nn

class Upstream(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.down(self.norm_2(x + nn.functional.gelu(self.up(self.norm_1(x)))))
"""


@pytest.mark.parametrize("is_borrowed", [True, False])
def test_a_port_that_runs_the_code_of_upstream_is_told_in_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_borrowed: bool
) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "installed_upstream.py").write_text(INSTALLED)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "installed_upstream", raising=False)
    installed: type[nn.Module] = importlib.import_module("installed_upstream").Upstream

    class Borrowed(Port):
        def forward(self, x: Tensor) -> Tensor:
            forward: Any = installed.forward
            return forward(self, x)

    result = result_of(make_case(Borrowed if is_borrowed else Port, upstream=installed), "float32")
    told = [note for note in result.notes if "the port runs upstream's own code" in note]
    assert result.verdict is Verdict.BITWISE
    assert len(told) == is_borrowed
    assert all("installed_upstream.py:11" in note for note in told)


def test_there_are_as_many_pathologies_as_the_documentation_says() -> None:
    assert len(PATHOLOGIES) >= 74


def test_the_run_goes_on_after_every_pathology() -> None:
    cases = [make_case(**changes) for changes, _ in PATHOLOGIES.values()]
    cases = [
        replace(case, id=f"bad/{name}", lanes=case.lanes[:1]) for case, name in zip(cases, PATHOLOGIES, strict=True)
    ]
    report = run([*cases, make_case(id="toy/last", lanes=("float64",))])
    assert len(report.results) == len(cases) + 1
    assert report.results[-1].verdict is Verdict.BITWISE
    assert json.loads(json.dumps(report.to_json()))["registered"] == len(cases) + 1


def test_two_cases_of_one_id_are_refused_before_anything_runs() -> None:
    cases = [make_case(), make_case(broken.LastRow)]
    with pytest.raises(ParityError, match="Several cases have the id `toy/tower`"):
        run(cases)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": "Toy Tower"}, "its id must be lower-case segments"),
        ({"id": 7}, "its id must be lower-case segments"),
        ({"port": Upstream()}, "`port` must be a function, got a Upstream: write `lambda:` before it"),
        ({"upstream": "Upstream"}, "`upstream` must be a function, got 'Upstream'"),
        ({"key_map": {}}, "`key_map` has no `convert` method, got dict"),
        ({"lanes": ("float8",)}, "its lanes must be some of"),
        ({"time_limit": 0.0}, "`time_limit` must be a number of seconds above 0, got 0.0"),
    ],
)
def test_a_case_that_cannot_be_run_is_refused_where_it_is_written(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ParityError, match=f"cannot be used.*{words}"):
        make_case(**changes)


def test_modules_without_cases_are_no_green_run() -> None:
    found = collect_cases("math,not.there")
    assert found.cases == ()
    assert "has no `CASES`" in found.problems[0]
    assert "cannot be imported" in found.problems[1]
    assert "No parity case is registered" in collect_cases("").problems[0]
    with pytest.raises(ParityError, match="Nothing is registered"):
        run([])


MODULE = """
from tests.refiners.parity.broken_ports import raises
from tests.refiners.parity.toys import make_case

CASES = [
    make_case(id="a/good", lanes=("float32",)),
    make_case(id="b/interrupted", lanes=("float32",), port=raises(KeyboardInterrupt())),
    make_case(id="c/never", lanes=("float32",)),
]
"""


def test_an_interrupted_run_keeps_and_writes_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "interrupted_cases.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    path, console = tmp_path / "parity.json", Console(file=io.StringIO(), width=200)
    assert run_cases("interrupted_cases", console=console, outputs=Outputs(json=path)) == 1
    data = json.loads(path.read_text())
    assert [(row["case"], row["verdict"]) for row in data["results"]] == [("a/good", "BITWISE")]
    assert data["problems"][0] == "interrupted: what follows was not run"
    assert "2 of 3 registered items did not run: b/interrupted[float32], c/never[float32]" in data["problems"][1]


def test_an_interrupted_session_of_pytest_writes_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "interrupted_cases.py").write_text(MODULE)
    path, root = tmp_path / "parity.json", Path(__file__).parents[3]
    arguments = ["-p", "refiners.parity.plugin", "--parity-cases", "interrupted_cases", "--parity-json", str(path)]
    command = [sys.executable, "-m", "pytest", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.INTERRUPTED
    data = json.loads(path.read_text())
    assert [(row["case"], row["verdict"]) for row in data["results"]] == [("a/good", "BITWISE")]
    assert data["problems"][0] == "interrupted: what follows was not run"
    assert "2 of 3 registered parity items did not run: b/interrupted[float32], c/never" in data["problems"][1]
