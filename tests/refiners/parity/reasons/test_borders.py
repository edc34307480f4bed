"""Leaves that hold the same weights and do other work: a right port is not blamed, and a wrong one is named."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiners.parity.explain import Explanation
from tests.refiners.parity.toys import explained_pair

X = torch.linspace(-2, 2, 2 * 8 * 7, dtype=torch.float64).sin().view(2, 8, 7)


class Nearest(nn.Module):
    """Upstream: the nearest row of a codebook; and weights that a parametrization makes."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.book, self.after = nn.Linear(8, 8), nn.Embedding(5, 8), nn.Linear(8, 8)
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 4, padding=2), dim=2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.conv(x)[..., :-1])
        x = self.before(x.transpose(1, 2))
        return self.after(self.book(torch.cdist(x, self.book.weight).argmin(-1)))


class Book(nn.Module):
    """The port: one module looks for the row and takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(5, 8))
        self.is_last = False

    def forward(self, x: Tensor) -> Tensor:
        distances = torch.cdist(x, self.rows)
        return self.rows[distances.argmax(-1) if self.is_last else distances.argmin(-1)]


class Near(nn.Module):
    """The port: one module normalises its weights, convolves and activates."""

    def __init__(self) -> None:
        super().__init__()
        self.direction, self.length = nn.Parameter(torch.zeros(8, 8, 4)), nn.Parameter(torch.ones(1, 1, 4))
        self.bias = nn.Parameter(torch.zeros(8))
        self.start = 0

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv1d(x, torch._weight_norm(self.direction, self.length, 2), self.bias, padding=2)
        return F.gelu(y[..., self.start : self.start + 7])


class Whole(nn.Module):
    """The port of both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.near, self.book, self.last = nn.Linear(8, 8), Near(), Book(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.book(self.first((x + self.near(x)).transpose(1, 2))))


KEYS = {
    **{f"first.{part}": f"before.{part}" for part in ("weight", "bias")},
    **{f"last.{part}": f"after.{part}" for part in ("weight", "bias")},
    "book.rows": "book.weight",
    "near.length": "conv.parametrizations.weight.original0",
    "near.direction": "conv.parametrizations.weight.original1",
    "near.bias": "conv.bias",
}


def explained(*fault: Any) -> Explanation:
    return explained_pair(Nearest(), Whole(), KEYS, [X], fault=fault or None)


def test_a_module_around_what_upstreams_leaf_does_is_not_blamed() -> None:
    assert explained().faults == []


@pytest.mark.parametrize(
    ("path", "name", "value", "words"),
    [("near", "start", 1, "`start` is 0, not 1"), ("book", "is_last", True, "is_last")],
)
def test_what_is_wrong_in_such_a_module_is_named(path: str, name: str, value: object, words: str) -> None:
    (fault,) = explained(path, name, value).faults
    assert fault.finding.port == path
    assert words in fault.diagnosis


class Sides(nn.Module):
    """Upstream: the means of rows and of columns are joined for one convolution and one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.squeeze, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.rows, self.columns = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        means = torch.cat((x.mean(3, keepdim=True), x.mean(2, keepdim=True).mT), dim=2)
        rows, columns = F.hardswish(self.norm(self.squeeze(means))).split((5, 3), dim=2)
        return x * self.rows(rows).sigmoid() * self.columns(columns.mT).sigmoid()


class OneByOne(Sides):
    """The port: each goes through both by itself."""

    is_exchanged, slope = False, False

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        one, two = (self.columns, self.rows) if self.is_exchanged else (self.rows, self.columns)
        rows = F.hardswish(self.norm(self.squeeze(x.mean(3, keepdim=True))))
        columns = self.norm(self.squeeze(x.mean(2, keepdim=True)))
        columns = F.hardsigmoid(columns) if self.slope else F.hardswish(columns)
        return x * one(rows).sigmoid() * two(columns).sigmoid()


def found_in_sides(fault: str = "") -> list[tuple[str, str]]:
    picture = torch.linspace(-2, 2, 2 * 3 * 5 * 3, dtype=torch.float64).sin().view(2, 3, 5, 3)
    keys = {key: key for key in Sides().state_dict()}
    found = explained_pair(Sides(), OneByOne(), keys, [picture], fault=("", fault, True) if fault else None)
    return [(fault.finding.port, fault.diagnosis) for fault in found.faults]


def test_a_leaf_that_runs_once_for_each_part_of_what_upstream_joins_is_not_blamed() -> None:
    assert found_in_sides() == []


def test_beside_a_leaf_that_runs_for_each_part_only_what_is_wrong_is_named() -> None:
    ((path, told),) = found_in_sides("is_exchanged")
    assert path in ("rows", "columns")
    assert "`rows` and `columns` are exchanged" in told or "`columns` and `rows` are exchanged" in told
    ((_, told),) = found_in_sides("slope")
    assert "hardswish" in told
