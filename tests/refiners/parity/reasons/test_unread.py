"""Rows that one side computes and nobody reads are no fault, and hide none."""

import pytest
import torch
from torch import Tensor, nn

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.weights import fill_informative

LANE = Lane("float32")
KEEP = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)


class Upstream(nn.Module):
    """Tokens of two texts, the second of which is shorter; its padding is set to 0 on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)

    def padding(self, x: Tensor) -> Tensor:
        return x * KEEP[..., None]

    def summed(self, x: Tensor) -> Tensor:
        return torch.where(KEEP[..., None], x, 0.0).sum(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.summed(self.last(self.down(self.padding(self.up(x)).relu())))


class Port(Upstream):
    """The same, but for the padding."""

    def padding(self, x: Tensor) -> Tensor:
        return x


class Wrong(Port):
    """With a mistake behind."""

    def forward(self, x: Tensor) -> Tensor:
        return self.summed(self.last(self.down(self.padding(self.up(x)).relu()).relu()))


class ReadByUpstream(Upstream):
    """All tokens are summed up: the padding is read."""

    def summed(self, x: Tensor) -> Tensor:
        return x.sum(1)


class ReadByPort(ReadByUpstream, Port):
    """The same, but for the padding: here it is a mistake."""


class Late(nn.Module):
    """The first token is left out behind the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())[:, 1:].sin()


class Early(Late):
    """Before it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()[:, 1:]).sin()


class EarlyAndWrong(Late):
    """Before it, and the last token at that."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()[:, :-1]).sin()


def explained(upstream: nn.Module, port: nn.Module) -> Explanation:
    with held_equal(LANE):
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
        return explain_modules(upstream.eval(), port.eval(), lambda: {"x": upstream(x)}, lambda: {"x": port(x)})


def test_what_differs_in_rows_that_no_output_reads_is_no_fault() -> None:
    assert not explained(Upstream(), Port()).faults


def test_a_fault_is_told_alone_beside_rows_that_no_output_reads() -> None:
    (fault,) = explained(Upstream(), Wrong()).faults
    assert "without `relu(" in fault.diagnosis


def test_what_differs_in_rows_that_an_output_reads_is_told() -> None:
    (fault,) = explained(ReadByUpstream(), ReadByPort()).faults
    assert fault.finding.point.port == "down"


def test_rows_may_be_left_out_before_a_leaf_or_behind_it() -> None:
    assert not explained(Late(), Early()).faults
    assert not explained(Early(), Late()).faults


@pytest.mark.parametrize("upstream", [Late, Early])
def test_another_row_that_is_left_out_is_told(upstream: type[nn.Module]) -> None:
    (fault,) = explained(upstream(), EarlyAndWrong()).faults
    assert "slice" in fault.diagnosis or "slice" in str(fault.finding.port_operations)
