"""Tables whose rows hold more than numbers do not stop the search for faults."""

from typing import NamedTuple

import torch
from torch import Tensor

from refiners.parity.mutants import formula_operators


class Row(NamedTuple):
    number: Tensor
    weights: Tensor
    ratios: tuple[Tensor, ...] = ()


def ways(*rows: Row) -> list[str]:
    return [told for told, _ in formula_operators._ways_of_rows(rows)]  # pyright: ignore[reportPrivateUsage]: its rule is held here


def test_rows_with_empty_tensors_and_tuples_are_told_apart() -> None:
    one, other = Row(torch.tensor(1.0), torch.ones(0)), Row(torch.tensor(1.0), torch.ones(1), (torch.tensor(2.0),))
    assert "one further" in ways(one, other)
    assert "one further" not in ways(one, Row(torch.tensor(1.0), torch.ones(0)))
