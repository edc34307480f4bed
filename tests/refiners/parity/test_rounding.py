"""The two constants: what has to stay below them, and what has to show above."""

import pytest
import torch

from refiners.parity.rounding import (
    ENOUGH,
    ERROR_RATIO,
    FLOAT64_AGREEMENT,
    Error,
    ErrorPair,
    agrees_in_float64,
    joint_ratio,
    relative_error,
    typical_magnitude,
    why_not_rounding,
    worst_output_ratio,
)
from refiners.parity.rounding_measured import MISTAKES, REWRITES, measure_float64, measure_ratios


@pytest.mark.parametrize("way", REWRITES)
def test_a_legitimate_rewrite_is_far_below_both_constants(way: str) -> None:
    assert measure_float64(way, seeds=2)[1] * 100 < FLOAT64_AGREEMENT
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert max(measure_ratios(way, dtype, seeds=2)) < ERROR_RATIO


@pytest.mark.parametrize("way", MISTAKES)
def test_a_mistake_is_far_above_the_constant_of_float64(way: str) -> None:
    assert measure_float64(way, seeds=2)[0] > FLOAT64_AGREEMENT * 1000


def test_one_huge_value_does_not_hide_an_error_elsewhere() -> None:
    truth = torch.randn(100, dtype=torch.float64)
    truth[0] = -3e38
    wrong = truth.clone()
    wrong[1] += 1e-6
    magnitude = typical_magnitude(truth, gradient=False)
    assert not agrees_in_float64(relative_error(wrong, truth, magnitude))
    assert agrees_in_float64(relative_error(truth, truth, magnitude))


def test_one_wrong_element_among_a_million_shows_in_float64() -> None:
    truth = torch.ones(1_000_000, dtype=torch.float64)
    wrong = truth.clone()
    wrong[123456] = 1 + 1e-9
    assert not agrees_in_float64(relative_error(wrong, truth, 1.0))


def test_values_where_the_truth_is_zero_are_infinitely_wrong() -> None:
    zeros = torch.zeros(4, dtype=torch.float64)
    assert typical_magnitude(zeros, gradient=True) == 0.0
    assert relative_error(zeros + 1e-30, zeros, 0.0).worst == float("inf")
    assert relative_error(zeros, zeros, 0.0) == Error(0.0, 0.0, 4)


def test_what_is_not_finite_is_left_to_the_bits() -> None:
    truth = torch.tensor([1.0, torch.inf, torch.nan])
    assert relative_error(truth, truth, 1.0) == Error(0.0, 0.0, 1)
    assert relative_error(truth[1:], truth[1:], 1.0) == Error(0.0, 0.0, 0)


def pair(upstream: float, port: float, elements: int, name: str = "y") -> ErrorPair:
    return ErrorPair(name, Error(upstream, upstream, elements), Error(port, port, elements))


def test_the_bound_is_a_ratio_to_upstreams_own_error() -> None:
    assert why_not_rounding([pair(1e-3, 1.9e-3, 100)], [], torch.float32) == ""
    assert "outputs are 2.1 times" in why_not_rounding([pair(1e-3, 2.1e-3, 100)], [], torch.float32)
    assert "gradients are 3 times" in why_not_rounding([pair(1e-3, 1e-3, 9)], [pair(1e-3, 3e-3, 9)], torch.float32)


def test_one_bad_output_is_not_hidden_by_a_large_good_one() -> None:
    outputs = [pair(1e-3, 1e-3, 100_000), pair(1e-3, 9e-3, ENOUGH, "small")]
    assert "the port's `small` is 9 times" in why_not_rounding(outputs, [], torch.float32)


def test_a_number_that_upstream_rounds_by_luck_condemns_nothing() -> None:
    outputs = [pair(1e-3, 1e-3, 1000), pair(1e-9, 1e-3, 1, "lucky")]
    assert why_not_rounding(outputs, [], torch.float32) == ""
    assert worst_output_ratio([pair(1e-9, 1e-3, 1)], torch.float32) == (0.0, "")


def test_no_port_has_to_be_better_than_half_a_unit_in_the_last_place() -> None:
    assert joint_ratio([pair(0.0, 2**-10, 10)], torch.bfloat16) == 1.0
    assert joint_ratio([pair(0.0, 2**-7, 10)], torch.bfloat16) > 1.9
    assert joint_ratio([pair(0.0, float("inf"), 10)], torch.bfloat16) > ERROR_RATIO
    assert joint_ratio([], torch.bfloat16) == 1.0
