"""Planted faults: every operator spoils something, nothing stays spoilt, and what no case tells is named."""

import io
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import ParityError
from refiners.parity import Case, Lane
from refiners.parity.mutants import operators as operators_of_nodes
from refiners.parity.mutants.equivalent import Line, load_equivalents, why_not_equivalent
from refiners.parity.mutants.kill_report import run_mutants
from refiners.parity.mutants.kills import Family, Settings, hunt
from refiners.parity.mutants.mutate import Bench, How, Mutant, Outcome, Trial, bench
from refiners.parity.mutants.operators import OPERATORS, Operator, Site, Ways
from refiners.parity.mutants.planting import Snapshot, with_attribute, with_forward, with_members
from tests.refiners.parity.toys import make_case

FLOAT64 = Lane("float64")
ROWWISE = {"swap-order::Block_2::with Slicing", "swap-order::Slicing::with LayerNorm"}
"""No faults: what works on each row by itself may come before or after some rows are taken."""


class Block(fl.Residual):
    """A norm, a wide activation, and the way back."""

    def __init__(self) -> None:
        super().__init__(fl.LayerNorm(8), fl.Linear(8, 8), fl.GeLU(), fl.Linear(8, 8))


class Tower(fl.Chain):
    """Two blocks, and the first row of what they give."""

    def __init__(self) -> None:
        super().__init__(Block(), Block(), fl.Slicing(dim=0, start=1, end=3), fl.LayerNorm(8))


class Upstream(Tower):
    """The same tree under another class: a case does not compare a model with itself."""


def tower_case(**changes: Any) -> Case:
    return make_case(**{"id": "toy/tower", "upstream": Upstream, "port": Tower, "inputs": image_of(5), **changes})


def image_of(rows: int) -> Callable[[torch.Generator], Mapping[str, Any]]:
    return lambda generator: {"x": torch.randn(rows, 8, generator=generator)}


@pytest.fixture(autouse=True)
def _without_gradients_left() -> None:
    torch.manual_seed(0)


@cache
def trials_of_the_tower() -> dict[str, Trial]:
    return trials(tower_case())


def trials(case: Case, operators: Mapping[str, Operator] = OPERATORS) -> dict[str, Trial]:
    with bench(case, FLOAT64) as built:
        found = {mutant.fault: built.try_out(mutant) for mutant in built.mutants(operators)}
        built.require_equal()
    return found


def one_operator(find: Callable[[Site], Ways]) -> Mapping[str, Operator]:
    return {"planted": Operator("planted", find)}


def test_there_are_at_least_25_operators_and_each_says_what_it_does() -> None:
    assert len(OPERATORS) >= 25
    assert all(operator.what for operator in OPERATORS.values())


def test_every_fault_of_a_small_tower_is_told_or_named() -> None:
    found = trials_of_the_tower()
    assert len(found) > 60
    survived = {fault for fault, trial in found.items() if trial.outcome is not Outcome.KILLED}
    assert survived == ROWWISE


def test_faults_are_planted_in_a_model_that_is_no_chain() -> None:
    found = trials(make_case())
    assert {trial.outcome for trial in found.values()} == {Outcome.KILLED}
    assert "transpose-weight::up::linear" in found
    assert "eps::norm_1::layer_norm, 1e-05 to 1e-12" in found


def test_an_eps_that_float32_cannot_see_is_told_in_float64() -> None:
    case = make_case(port=lambda: NarrowPort(1e-12), upstream=lambda: NarrowUpstream(1e-12))
    trial = trials(case)["eps::norm_1::layer_norm, 1e-12 to 1e-11"]
    assert trial.outcome is Outcome.KILLED


class NarrowUpstream(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(8, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_1(x)


class NarrowPort(NarrowUpstream):
    """The same; it is the port."""


@pytest.mark.parametrize("lane", ["float64", "bfloat16"])
def test_undoing_every_mutant_restores_the_port_exactly(lane: str) -> None:
    with bench(tower_case(), Lane(lane)) as built:
        before = Snapshot(built.port)
        state = {key: (value.data_ptr(), value.clone()) for key, value in built.port.state_dict().items()}
        output = built.port(torch.ones(3, 8, dtype=Lane(lane).dtype))
        for mutant in built.mutants():
            built.try_out(mutant)
            assert list(before.differences()) == []
        assert torch.equal(output, built.port(torch.ones(3, 8, dtype=Lane(lane).dtype)))
        for key, value in built.port.state_dict().items():
            assert value.data_ptr() == state[key][0]
            assert torch.equal(value, state[key][1])


def test_weights_stay_shared_while_a_fault_is_planted() -> None:
    with bench(tower_case(), FLOAT64) as built:
        storages = {tensor.data_ptr() for tensor in built.upstream.state_dict().values()}
        for mutant in built.mutants():
            with built.planted(mutant):
                assert {tensor.data_ptr() for tensor in built.port.state_dict().values()} == storages


def test_an_operator_that_changes_nothing_is_reported() -> None:
    def nothing(site: Site) -> Ways:
        yield "", lambda: lambda: None

    found = trials(tower_case(), one_operator(nothing))
    assert {trial.outcome for trial in found.values()} == {Outcome.INERT}
    family = Family("toy", list(found.values()))
    assert len(family.inert) == len(found)
    assert not family.survived


def test_an_operator_that_does_not_undo_itself_is_an_error() -> None:
    def forgetful(site: Site) -> Ways:
        if isinstance(site.module, fl.LayerNorm):

            def edit() -> Callable[[], None]:
                site.module.eps = 1.0
                return lambda: None

            yield "", edit

    with pytest.raises(ParityError, match=r"did not restore the model: .*another `eps`"):
        trials(tower_case(), one_operator(forgetful))


def test_an_exception_in_a_mutant_kills_it_and_is_listed_apart() -> None:
    def raising(site: Site) -> Ways:
        def forward(original: Any, *args: Any) -> Any:
            raise ValueError("planted")

        yield "", with_forward(site.module, forward)

    found = trials(tower_case(), one_operator(raising))
    assert {trial.how for trial in found.values()} == {How.EXCEPTION}
    assert "planted" in next(iter(found.values())).detail
    assert len(Family("toy", list(found.values())).to_json(earned=False)["exceptions"]) == len(found)


def test_a_fault_of_the_backward_pass_is_told_by_gradients() -> None:
    found = trials_of_the_tower()
    assert found["detach::Block_1.Linear_1::"].how is How.GRADIENT


def test_a_fault_below_rounding_is_told_by_its_bits() -> None:
    def last_bit(site: Site) -> Ways:
        if site.path == "LayerNorm":
            yield "", with_forward(site.module, lambda original, x: original(x) * (1 + 2**-52))

    found = trials(tower_case(), one_operator(last_bit))
    assert [trial.how for trial in found.values()] == [How.BITS]


def test_a_mutant_is_reproduced_by_its_id() -> None:
    with bench(tower_case(), FLOAT64) as first:
        ids = [mutant.id for mutant in first.mutants()]
    with bench(tower_case(), FLOAT64) as second:
        assert [mutant.id for mutant in second.mutants()] == ids
    assert len(set(ids)) == len(ids)
    assert ids[0].startswith("toy/tower::")


def test_a_case_that_is_not_equal_cannot_be_mutated() -> None:
    class Wrong(Tower):
        def __init__(self) -> None:
            super().__init__()
            self[3].eps = 1.0

    with pytest.raises(ParityError, match="not equal without any fault"), bench(tower_case(port=Wrong), FLOAT64):
        pass


def test_a_copy_of_the_tree_is_spoilt_with_it() -> None:
    tower = Tower()
    undo = with_members(tower[0], _finish=None)()
    copy = tower.structural_copy()
    assert copy[0]._finish is None
    assert isinstance(copy[0], Block)
    undo()
    assert type(tower[0]) is Block


def test_a_snapshot_names_what_changed() -> None:
    tower = Tower()
    snapshot = Snapshot(tower)
    undo = with_attribute(tower[3], "eps", 1.0)()
    assert list(snapshot.differences()) == ["LayerNorm: another `eps`"]
    undo()
    assert list(snapshot.differences()) == []
    with torch.no_grad():
        tower[3].bias.add_(1)
    assert list(snapshot.differences()) == ["LayerNorm: `bias` was written to"]
    tower[3].register_parameter("bias", None)
    assert "LayerNorm: `bias` is another tensor" in list(snapshot.differences())


def test_what_a_node_makes_of_an_attribute_is_restored_with_it() -> None:
    tree = fl.Chain(fl.Multiply(2.0))
    snapshot = Snapshot(tree)
    undo = with_attribute(tree[0], "bias", 0.5)()
    assert tree(torch.ones(1)).item() == 2.5
    undo()
    assert list(snapshot.differences()) == []


# --- equivalent mutants -------------------------------------------------------------------------------------------


def mutant_of(built: Bench, fault: str) -> Mutant:
    return next(mutant for mutant in built.mutants() if mutant.fault == fault)


class Tail(fl.Chain):
    """Two nodes that may stand in any order: one takes rows, the other works on each by itself."""

    def __init__(self) -> None:
        super().__init__(fl.Slicing(dim=0, start=1, end=3), fl.LayerNorm(8))


class TowerWithTail(fl.Chain):
    def __init__(self) -> None:
        super().__init__(Block(), Tail())


def tail_case(**changes: Any) -> Case:
    return make_case(
        **{"upstream": lambda: UpstreamWithTail(), "port": TowerWithTail, "inputs": image_of(5), **changes}
    )


class UpstreamWithTail(TowerWithTail):
    """The same under another class."""


def test_an_equivalent_mutant_is_proved_by_running_it_on_random_inputs() -> None:
    with bench(tail_case(), FLOAT64) as built:
        assert why_not_equivalent(built, mutant_of(built, "swap-order::Tail.Slicing::with LayerNorm"), scope=1) == ""


def test_a_claim_that_is_false_is_refuted() -> None:
    with bench(tail_case(), FLOAT64) as built:
        told = why_not_equivalent(built, mutant_of(built, "drop::Tail.LayerNorm::"), scope=0)
        assert told == "the outputs differ on random inputs"
        detached = mutant_of(built, "detach::Tail.LayerNorm::")
        assert "gradient" in why_not_equivalent(built, detached, scope=0)


def test_a_claim_about_the_whole_port_is_tried_as_its_case_runs_it() -> None:
    with bench(tail_case(), FLOAT64) as built:
        assert why_not_equivalent(built, mutant_of(built, "swap-order::Tail.Slicing::with LayerNorm"), scope=2) == ""
        told = why_not_equivalent(built, mutant_of(built, "drop::Tail.LayerNorm::"), scope=2)
        assert told == "the outputs differ on random inputs"


def test_a_survivor_counts_unless_it_is_proved_equivalent() -> None:
    line = Line("swap-order::*Slicing::*", "a norm of rows, and a choice of rows", 1)
    (without,) = hunt([tail_case()], Settings(keyword="Tail"))
    (proved,) = hunt([tail_case()], Settings(equivalents=[line], keyword="Tail"))
    assert set(without.survived) == {"swap-order::Tail.Slicing::with LayerNorm"}
    assert without.kill_rate < 1
    assert proved.survived == {}
    assert proved.proved == {"swap-order::Tail.Slicing::with LayerNorm": line.reason}
    assert proved.kill_rate == 1
    assert proved.problems == []


def test_a_claim_about_a_fault_that_is_killed_is_stale() -> None:
    (family,) = hunt(
        [tail_case()], Settings(equivalents=[Line("drop::Tail.LayerNorm::", "so I believe")], keyword="Tail")
    )
    assert family.problems == ["equivalent.toml: drop::Tail.LayerNorm:: is killed now: remove the line"]


def test_a_false_claim_is_a_problem_and_the_mutant_survives() -> None:
    case = tail_case(inputs=lambda generator: {"x": torch.randn(3, 8, generator=generator)}, gradients=False)
    lines = [Line("detach::*", "so I believe"), Line("swap-order::Tail.Slicing*", "true", 1)]
    (family,) = hunt([case], Settings(equivalents=lines, keyword="Tail"))
    assert family.survived
    assert all("said to be equivalent, but" in problem for problem in family.problems)


def test_a_claim_without_a_reason_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "equivalent.toml"
    path.write_text('[[line]]\nfault = "a"\nreason = ""\n')
    with pytest.raises(ParityError, match="no reason for a"):
        load_equivalents(path)
    path.write_text('[[line]]\nfault = "a"\nwhy = "b"\n')
    with pytest.raises(ParityError, match="cannot be used"):
        load_equivalents(path)


# --- families -----------------------------------------------------------------------------------------------------


def test_a_fault_that_one_case_masks_is_killed_by_another() -> None:
    short = tower_case(id="toy/short", inputs=image_of(3))
    long = tower_case(id="toy/long", inputs=image_of(5))
    (family,) = hunt([short, long], Settings(keyword="index::"))
    fault = "index::Slicing::__getitem__, axis 0 stop one further"
    assert family.killed[fault].case == "toy/long"
    assert f"toy/short::{fault}" in family.masked


def test_a_fault_that_one_case_alone_tells_is_what_it_earns() -> None:
    short = tower_case(id="toy/short", inputs=image_of(3))
    long = tower_case(id="toy/long", inputs=image_of(5))
    (family,) = hunt([short, long], Settings(every_case=True, keyword="index::"))
    earned = family.earned()
    assert not any(role.startswith("index::Slicing") for role in earned["toy/short"])
    assert any(role.startswith("index::Slicing") for role in earned["toy/long"])


def test_a_case_that_earns_nothing_is_shown() -> None:
    family = Family(
        "toy", [trial_of("toy/a", "drop::x::"), trial_of("toy/a", "eps::x::"), trial_of("toy/b", "eps::x::")]
    )
    assert family.earned() == {"toy/a": ["drop::x::"], "toy/b": []}


def trial_of(case: str, fault: str) -> Trial:
    return Trial(case, fault, fault, "float64", Outcome.KILLED, How.OUTPUT)


def test_a_budget_of_no_time_tries_nothing_and_says_so() -> None:
    (family,) = hunt([tower_case()], Settings(budget=0.0))
    assert not family.trials
    assert family.left_out > 60


def test_a_seed_decides_the_order() -> None:
    def order(seed: int) -> list[str]:
        (family,) = hunt([tower_case()], Settings(seed=seed, per_case=10))
        return [trial.id for trial in family.trials]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_a_case_that_cannot_be_built_is_a_problem_and_the_others_go_on() -> None:
    def broken() -> nn.Module:
        raise RuntimeError("no such upstream")

    (family,) = hunt([tower_case(id="toy/broken", upstream=broken), tower_case()], Settings(per_case=5))
    assert family.trials
    assert any("toy/broken[float64]" in problem and "no such upstream" in problem for problem in family.problems)


CASES = """
from tests.refiners.parity.mutants.test_mutate import tower_case

CASES = [tower_case()]
"""


def test_the_command_prints_the_table_and_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "cases_for_mutants.py").write_text(CASES)
    console = Console(file=io.StringIO(), width=200)
    code = run_mutants("cases_for_mutants", every_case=True, json_path=tmp_path / "out.json", console=console)
    written = json.loads((tmp_path / "out.json").read_text())
    printed = console.file.getvalue()
    assert code == 1
    assert "survived  toy/tower::swap-order::Slicing::with LayerNorm" in printed
    assert "what only one case tells" in printed
    assert sorted(written["families"][0]["survived"]) == [
        "toy/tower::swap-order::Block_2::with Slicing",
        "toy/tower::swap-order::Slicing::with LayerNorm",
    ]
    assert set(written["operators"]) == set(OPERATORS)


def test_the_command_runs_one_mutant_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "cases_for_mutants.py").write_text(CASES)
    console = Console(file=io.StringIO(), width=200)
    assert run_mutants("cases_for_mutants", keyword="toy/tower::drop::Block_1.LayerNorm::", console=console) == 0
    with pytest.raises(ParityError, match="No case id contains"):
        run_mutants("cases_for_mutants", keyword="nothing", console=console)


def test_a_case_that_the_ledger_excuses_has_no_mutants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "cases_for_mutants.py").write_text(CASES)
    ledger = tmp_path / "ledger.toml"
    ledger.write_text(
        '[[line]]\nid = "toy/tower"\nlane = "float64"\nverdict = "ROUNDING"\ncause = "an order"\nuntil = "never"\n'
    )
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(ParityError, match="excuses toy/tower from being BITWISE"):
        run_mutants("cases_for_mutants", ledger_path=ledger, console=console)


def test_operators_are_registered_once_each() -> None:
    assert operators_of_nodes.OPERATORS is OPERATORS
    assert all(name == operator.name for name, operator in OPERATORS.items())
