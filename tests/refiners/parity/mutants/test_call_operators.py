"""What counts as a cast among the calls of a leaf: a missing one is a fault, but not where nothing was cast."""

from typing import Any

import pytest
import torch

from refiners.parity.mutants.call_operators import cast_missing
from refiners.parity.mutants.calls import Call

X = torch.ones(2, dtype=torch.float64)
CPU = torch.device("cpu")


def planted(*args: Any, **kwargs: Any) -> list[str]:
    """The faults that are planted in a call of `to`."""
    return [told for told, _ in cast_missing(Call("to", 0, (X, *args), kwargs, X), {})]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((CPU,), {}),
        (("cpu",), {}),
        ((), {"device": CPU}),
        ((), {"device": "cpu", "non_blocking": True}),
        ((CPU,), {"copy": True}),
    ],
)
def test_a_move_to_a_device_is_no_cast(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert planted(*args, **kwargs) == []


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.float32,), {}),
        ((), {"dtype": torch.float32}),
        ((CPU, torch.float32), {}),
        ((CPU,), {"dtype": torch.float32}),
        ((), {"device": CPU, "dtype": torch.float32}),
        ((X,), {}),
    ],
)
def test_a_cast_is_one_beside_a_move_too(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert planted(*args, **kwargs) == ["missing"]


def test_a_cast_by_name_is_one() -> None:
    assert [told for told, _ in cast_missing(Call("float", 0, (X,), {}, X.float()), {})] == ["missing"]
