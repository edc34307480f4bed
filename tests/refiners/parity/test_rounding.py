"""The two constants: what has to stay below them, and what has to show above."""

import pytest
import torch

from refiners.parity import rounding
from refiners.parity.lanes import Lane
from refiners.parity.measured.measured_models import SUBJECTS, Convolutions, Subject
from refiners.parity.measured.rewrites import MISTAKES, REWRITES
from refiners.parity.measured.rounding_measured import Setting, measure, plant, spoil_one_element
from refiners.parity.pairing import Kind, Pair
from refiners.parity.result import Verdict
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
from refiners.parity.verdict import compare, judge


@pytest.mark.parametrize("way", REWRITES)
def test_a_legitimate_rewrite_is_no_false_alarm(way: str) -> None:
    found = [one for subject in SUBJECTS for one in measure(Setting(subject, 16, 3), {way: REWRITES[way]})]
    assert found, "no model has anything to do otherwise"
    assert [one.reason for one in found if one.verdict is Verdict.DIFFERENT] == []
    assert max(one.float64 for one in found if one.lane.is_truth) * 100 < FLOAT64_AGREEMENT


@pytest.mark.parametrize("way", MISTAKES)
def test_a_mistake_is_far_above_the_constant_of_float64(way: str) -> None:
    found = [
        one for subject in SUBJECTS for one in measure(Setting(subject, 16, 3), {way: MISTAKES[way]}, ("float64",))
    ]
    assert found
    assert {one.verdict for one in found} == {Verdict.DIFFERENT}
    assert min(one.float64 for one in found) > FLOAT64_AGREEMENT * 1000


@pytest.mark.parametrize("lane", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_one_element_of_the_other_sign_is_no_rounding_in_any_lane(subject: Subject, lane: str) -> None:
    assert spoil_one_element(Setting(subject, 16, 0), "of the other sign", Lane(lane)) is Verdict.DIFFERENT


def test_a_planted_mistake_is_never_called_rounding() -> None:
    found = [one for one in plant(Setting(Convolutions, 16, 0)) if one.shows and not one.is_of_precision]
    assert len(found) > 400
    assert [one for one in found if one.verdict is Verdict.ROUNDING] == []
    assert {one.verdict for one in found if one.lane == "float64"} == {Verdict.DIFFERENT}


def test_one_huge_value_does_not_hide_an_error_elsewhere() -> None:
    truth = torch.randn(100, dtype=torch.float64)
    truth[0] = -3e38
    wrong = truth.clone()
    wrong[1] += 1e-6
    magnitude = typical_magnitude(truth, gradient=False)
    assert not agrees_in_float64(relative_error(wrong, truth, magnitude))
    assert agrees_in_float64(relative_error(truth, truth, magnitude))


@pytest.mark.parametrize("odd", [1.0, 0.0, float("inf"), float("nan")])
def test_an_error_does_not_depend_on_whether_elements_are_picked_or_all_are_taken(odd: float) -> None:
    truth = torch.randn(4, 6, 5, dtype=torch.float64).mT
    truth[0, 0, 0], more = odd, torch.tensor([0.0, float("nan")], dtype=torch.float64)
    wrong = truth.to(torch.bfloat16)
    longer = torch.cat((truth.flatten(), more))  # of these, some have to be picked
    for gradient in (True, False):
        magnitude = typical_magnitude(truth, gradient=gradient)
        assert magnitude == typical_magnitude(longer, gradient=gradient)
        error = relative_error(wrong, truth, magnitude)
        assert (error.rms, error.worst) == _apart(wrong, truth, magnitude)
        assert relative_error(truth, truth, magnitude) == relative_error(truth.clone(), truth, magnitude)


def _apart(wrong: torch.Tensor, truth: torch.Tensor, magnitude: float) -> tuple[float, float]:
    """Root mean square and largest error, each element by itself."""
    finite = truth.isfinite()
    errors = (wrong.double() - truth)[finite].abs() / truth[finite].abs().clamp(min=magnitude)
    return float(errors.square().mean().sqrt()), float(errors.max())


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


def test_one_element_far_worse_than_any_of_upstreams_is_no_rounding() -> None:
    outputs = [ErrorPair("y", Error(1e-3, 4e-3, 100_000), Error(1.01e-3, 0.1, 100_000))]
    assert "one element of the port's `y` is 25 times" in why_not_rounding(outputs, [], torch.bfloat16)
    assert why_not_rounding([pair(1e-3, 1.9e-3, 100)], [], torch.bfloat16) == ""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_element_of_many_thousands_that_is_twice_too_large_is_no_rounding(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane, generator = Lane(dtype), torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=generator).to(lane.dtype) for rows in (512, 64))
    plain, truth = x @ weight.T, x.double() @ weight.double().T
    spoilt = plain.clone()
    at = int(truth.flatten().abs().sort().indices[plain.numel() // 2])
    spoilt.view(-1)[at] *= 2
    assert plain.numel() == 32_768

    def told() -> Verdict:
        compared = [compare(Pair("y", Kind.OUTPUT, plain, spoilt), truth)]
        return judge(compared, (), lane, float64_verdict=Verdict.BITWISE)[0]

    assert told() is Verdict.DIFFERENT
    monkeypatch.setattr(rounding, "ELEMENT_RATIO", float("inf"))
    assert told() is (Verdict.ROUNDING if dtype == "bfloat16" else Verdict.DIFFERENT)
