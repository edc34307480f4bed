"""Every workload takes exactly what its budget says, and a fault for each kind of count turns it red, with its leaf."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from benchmarks import budgets
from benchmarks.engine import budget as engine
from benchmarks.engine.budget import Budget, BudgetError, compare, require
from benchmarks.engine.compiled import compiling
from benchmarks.workloads import WORKLOADS

KEPT: list[Tensor] = []


@pytest.mark.budget
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_takes_what_its_budget_says(name: str, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--write-budgets"):
        print(budgets.handle(name, write=True))
    else:
        require(budgets.committed(name), budgets.counted(name))


def test_no_budget_is_left_of_a_workload_that_is_gone() -> None:
    assert [path.name for path in budgets.stale()] == []


# What is planted: in one layer, before it runs for the first time


class WithCopy(fl.Linear):
    """One more operation: the layout of a transposed tensor is made anew."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1).contiguous().transpose(0, 1))


class WithNeedlessCall(fl.Linear):
    """`contiguous` of what is contiguous: no operation, but a call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous()


class Keeping(fl.Linear):
    """Its output stays alive until the next."""

    def forward(self, x: Tensor) -> Tensor:
        KEPT[:] = [super().forward(x)]
        return KEPT[0]


class Rounding(fl.Linear):
    """To another dtype and back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.float64).to(x.dtype))


class Breaking(fl.Linear):
    """What torch.compile cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class Changing(fl.Linear):
    """What torch.compile has to compile again each time."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) if self.calls % 10_000 < 9_999 else x


class Recomputing(fl.Linear):
    """The work of the layer twice."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return super().forward(x)


PLANTED: dict[str, tuple[type[fl.Linear], str]] = {
    "contiguous": (WithCopy, "aten.clone.default 0 → 2"),
    "needless call": (WithNeedlessCall, "c: Tensor.contiguous 3 → 4"),
    "kept alive": (Keeping, "{leaf}: kept 0 → 1792"),
    "dtype there and back": (Rounding, "{leaf}: aten._to_copy.default 0 → 2"),
    "graph break": (Breaking, "compiled: breaks at {leaf} (test_budgets.py:"),
    "recompilation": (Changing, "compiled: compiled again because "),
    "computed twice": (Recomputing, "{leaf}: aten.addmm.default 1 → 2"),
}
# No operation runs that the leaf could be known by; the message names the call.
NAMELESS = {"needless call"}
LEAF = "TransformerLayer_2.FeedForwardResidual.FeedForward.Linear_2"


def counted_with(plant: Callable[[nn.Module], None]) -> Budget:
    workload = WORKLOADS["bert"]()
    model, act = workload.ready()
    plant(model)
    return engine.measure("bert", workload.what, model, act, model)


@pytest.mark.parametrize("name", [*PLANTED])
def test_a_planted_fault_is_red_and_names_its_leaf(name: str) -> None:
    fault, told = PLANTED[name]

    def plant(model: nn.Module) -> None:
        model.get_submodule(LEAF).__class__ = fault

    with pytest.raises(BudgetError) as caught:
        require(budgets.committed("bert"), counted_with(plant))
    assert LEAF in str(caught.value) or name in NAMELESS
    assert told.format(leaf=LEAF) in str(caught.value)
    assert "python -m benchmarks.budgets --write bert" in str(caught.value)


def test_telling_why_leaves_the_evaluation_of_frames_to_cpython() -> None:
    for fault in (Breaking, Changing):
        workload = WORKLOADS["bert"]()
        model, act = workload.ready()
        model.get_submodule(LEAF).__class__ = fault
        assert compiling(model, act).why
        assert references_of_what_is_let_go() == 2


def references_of_what_is_let_go() -> int:
    """2: the name in the called function, and `getrefcount` itself. A caller that kept it would be a third."""

    def called(x: object) -> int:
        return sys.getrefcount(x)

    x: object = object()
    return called((x, x := None)[0])


def test_a_layer_less_is_red_too() -> None:
    def plant(model: Any) -> None:
        model.TransformerLayer_2.FeedForwardResidual.FeedForward.pop(1)

    told = compare(budgets.committed("bert"), counted_with(plant))
    assert any("aten.gelu.default 1 → 0" in line for line in told)


def test_a_loop_without_calls_is_red() -> None:
    found = budgets.committed("bert")
    path = next(iter(found.lines))
    slower = replace(found, lines={**found.lines, path: found.lines[path] + 100})
    assert len(compare(found, slower)) == 1


def test_counts_do_not_depend_on_the_number_of_threads() -> None:
    workload = WORKLOADS["bert"]()
    model, act = workload.ready()
    torch.set_num_threads(2)
    found = engine.measure("bert", workload.what, model, act, model)
    require(budgets.committed("bert"), found)


def test_a_written_budget_reads_as_it_was(tmp_path: Path) -> None:
    found = budgets.counted("bert")
    path = tmp_path / "bert.json"
    path.write_text(found.as_text())
    assert compare(engine.read(path), found) == []
    assert json.loads(path.read_text())["totals"] == found.totals


def test_a_budget_of_other_versions_is_compared_with_nothing_and_not_green() -> None:
    found = budgets.committed("bert")
    other = replace(found, versions={**found.versions, "torch": "9.9"})
    with pytest.raises(BudgetError, match="nothing was compared"):
        require(other, found)


def test_versions_without_budgets_are_not_green(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "versions", lambda: {"python": "9.9", "torch": "9.9"})
    with pytest.raises(BudgetError, match="no budgets of python-9.9-torch-9.9, so nothing was compared"):
        budgets.committed("bert")


@pytest.mark.parametrize("text", ["{", "[]", '{"workload": "bert"}'], ids=["cut", "list", "foreign"])
def test_a_broken_budget_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bert.json"
    path.write_text(text)
    with pytest.raises(BudgetError, match="is no budget"):
        engine.read(path)


def test_a_missing_budget_says_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="--write bert"):
        engine.read(tmp_path / "bert.json")
