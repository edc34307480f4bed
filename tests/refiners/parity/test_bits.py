"""Bits, and the distance between floats in units in the last place."""

import math

import pytest
import torch
from torch import Tensor

from refiners.parity.bits import find_worst, same_bits, ulp_distance

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_zeros_of_two_signs_are_equal_in_value_and_not_in_bits() -> None:
    zero = torch.zeros(2)
    assert torch.equal(zero, -zero)
    assert not same_bits(zero, -zero)


def test_nan_equals_the_nan_of_the_same_payload_only() -> None:
    quiet = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert same_bits(quiet, quiet.clone())
    assert not same_bits(quiet[:1], quiet[1:])
    worst = find_worst("y", quiet[:1], quiet[1:])
    assert worst is not None
    assert (worst.index, worst.ulp, worst.difference) == ((0,), None, 0.0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.ones(1, 2), torch.ones(2)),
        (torch.ones(2), torch.ones(2).double()),
        (torch.ones(2), torch.tensor([1.0, 1.0000001])),
        (torch.tensor([True]), torch.tensor([False])),
        (torch.tensor([1]), torch.tensor([2])),
        (torch.tensor([1 + 0j]), torch.tensor([1 - 0j]).conj_physical() * -1 * -1 + 1j),
    ],
)
def test_shape_dtype_and_value_all_count(first: Tensor, second: Tensor) -> None:
    assert same_bits(first, first.clone())
    assert not same_bits(first, second)


def test_strides_do_not_count() -> None:
    tensor = torch.randn(3, 4)
    assert same_bits(tensor, tensor.T.contiguous().T)


@pytest.mark.parametrize("dtype", FLOATS)
def test_neighbours_are_one_unit_apart_in_every_dtype(dtype: torch.dtype) -> None:
    one = torch.ones((), dtype=dtype)
    above = one + torch.finfo(dtype).eps
    below = one - torch.finfo(dtype).eps / 2
    assert ulp_distance(one, above) == ulp_distance(one, below) == 1
    assert ulp_distance(-one, -above) == 1
    assert ulp_distance(below, above) == 2
    assert ulp_distance(one, one) == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_distance_crosses_zero(dtype: torch.dtype) -> None:
    smallest = torch.full((), torch.finfo(dtype).smallest_normal, dtype=dtype)
    zero = torch.zeros((), dtype=dtype)
    assert ulp_distance(zero, -zero) == 1
    assert ulp_distance(smallest, zero) == ulp_distance(-smallest, -zero)
    half = ulp_distance(smallest, zero)
    assert half is not None
    assert ulp_distance(smallest, -smallest) == 2 * half + 1


def test_what_is_not_finite_has_no_distance() -> None:
    assert ulp_distance(torch.tensor(math.inf), torch.tensor(1.0)) is None
    assert ulp_distance(torch.tensor(1), torch.tensor(2)) is None


def test_the_worst_element_is_the_one_that_is_furthest_apart() -> None:
    first = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    second = torch.tensor([[1.0, 2.5], [3.25, 4.0]])
    worst = find_worst("y", first, second)
    assert worst is not None
    assert (worst.index, worst.upstream, worst.port, worst.difference) == ((0, 1), "2.0", "2.5", 0.5)
    assert str(worst) == "y[0, 1]: upstream 2.0, port 2.5 (2097152 ULP)"
    second[1, 1] = torch.nan
    worst = find_worst("y", first, second)
    assert worst is not None
    assert worst.index == (1, 1)
    assert worst.difference == math.inf
    assert find_worst("y", first, first.clone()) is None


def test_the_worst_element_of_a_scalar_or_a_boolean_has_a_place_too() -> None:
    worst = find_worst("y", torch.tensor(1.0), torch.tensor(2.0))
    assert worst is not None
    assert worst.index == ()
    worst = find_worst("y", torch.tensor([True, False]), torch.tensor([True, True]))
    assert worst is not None
    assert (worst.index, worst.ulp) == ((1,), None)
