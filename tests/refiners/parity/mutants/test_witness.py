"""What an input of a case is good for: a fault that only it lets the case tell."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from refiners.parity.case import Case
from refiners.parity.mutants.kills import Settings, hunt
from refiners.parity.mutants.witness import NEEDED, UNDECIDED, UNREAD
from tests.refiners.parity.toys import make_case


class Shifted(nn.Module):
    """Adds an input that may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, shift: Tensor | None, unused: Tensor | None) -> Tensor:
        return self.norm(x if shift is None else x + shift)


class ShiftedUpstream(Shifted):
    """The same under another class."""


def run_shifted(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"y": model(inputs["x"], inputs.get("shift"), inputs.get("unused"))}


def shifted_case(*names: str) -> Case:
    return make_case(
        upstream=ShiftedUpstream,
        port=Shifted,
        inputs=lambda generator: {name: torch.randn(3, 8, generator=generator) for name in names},
        run_upstream=run_shifted,
        run_port=run_shifted,
    )


def test_an_input_that_earns_nothing_is_told_from_one_that_is_needed() -> None:
    case = shifted_case("x", "unused")
    (family,) = hunt([case], Settings(every_case=True))
    assert family.inputs == {case.id: {"x": NEEDED, "unused": ""}}


def test_an_input_without_which_every_fault_is_told_as_well_is_tied_to_a_port_that_does_not_read_it() -> None:
    case = shifted_case("x", "shift")
    (family,) = hunt([case], Settings(every_case=True))
    assert family.inputs == {case.id: {"x": NEEDED, "shift": UNREAD}}


def test_where_few_faults_are_tried_an_input_is_not_said_to_earn_nothing() -> None:
    case = shifted_case("x", "unused")
    (family,) = hunt([case], Settings(every_case=True, per_case=2))
    assert family.inputs == {case.id: {"x": NEEDED, "unused": UNDECIDED.format(2)}}


def test_an_input_is_tied_to_a_fault_that_only_it_tells() -> None:
    case = make_case(
        port=lambda: Rows(),
        upstream=lambda: RowsUpstream(),
        inputs=lambda generator: {"x": torch.randn(3, 8, generator=generator), "row": 0},
        run_upstream=run_rows,
        run_port=run_rows,
    )
    (family,) = hunt([case], Settings(every_case=True))
    assert family.inputs[case.id]["row"].startswith("index::pick::")


class Pick(nn.Module):
    """One row, or all."""

    def forward(self, x: Tensor, row: int | None) -> Tensor:
        return x if row is None else x[row]


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pick, self.norm = Pick(), nn.LayerNorm(8)

    def forward(self, x: Tensor, row: int | None) -> Tensor:
        return self.norm(self.pick(x, row))


class RowsUpstream(Rows):
    """The same under another class."""


def run_rows(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"y": model(inputs["x"], inputs.get("row"))}
