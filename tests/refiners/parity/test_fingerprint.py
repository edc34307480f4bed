"""A fingerprint changes with every bit and its place, and with nothing else."""

import pytest
import torch
from torch import Tensor

from refiners.parity.fingerprint import Values, fingerprint


def image() -> Tensor:
    return torch.randn(1000, 37, generator=torch.Generator().manual_seed(0))


def changed(change: str) -> Tensor:
    x = image()
    match change:
        case "one sign":
            x[3, 3] *= -1
        case "two signs":
            x[0, 1] *= -1
            x[0, 3] *= -1
        case "two other signs":
            x[0, 5] *= -1
            x[0, 7] *= -1
        case "two elements exchanged":
            x[5, 6], x[7, 8] = image()[7, 8], image()[5, 6]
        case "rows exchanged":
            x = x.flip(0)
        case "one unit in the last place":
            x[9, 9] = torch.nextafter(x[9, 9], torch.tensor(torch.inf))
        case "another shape":
            x = x.reshape(37, 1000)
        case "transposed":
            x = x.T
        case "another dtype":
            x = x.view(torch.int32)
        case "one element less":
            x = x[:, :-1]
        case _:
            pass
    return x


CHANGES = [
    "one sign",
    "two signs",
    "two other signs",
    "two elements exchanged",
    "rows exchanged",
    "one unit in the last place",
    "another shape",
    "transposed",
    "another dtype",
    "one element less",
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_changes_the_fingerprint(change: str) -> None:
    assert fingerprint(changed(change)) != fingerprint(image())


def test_no_two_changes_have_one_fingerprint() -> None:
    assert len({fingerprint(changed(change)) for change in CHANGES}) == len(CHANGES)


def test_strides_and_storage_do_not_count() -> None:
    x = image()
    assert fingerprint(x.T.contiguous().T) == fingerprint(x)
    assert fingerprint(torch.cat((x[:1], x))[1:]) == fingerprint(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_signs_together_and_signs_of_a_rectangle_count(dtype: torch.dtype) -> None:
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    some, rows = x.clone(), x.clone()
    some[0:512:256, 0:1024:512] *= -1
    rows[:2] *= -1
    assert len({fingerprint(t) for t in (x, -x, some, rows, x.abs(), -x.abs())}) == 6


def test_minus_zero_is_not_zero() -> None:
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0]))


def test_the_payload_of_a_nan_counts() -> None:
    quiet, other = (torch.tensor([0x7FF8 << 48 | payload]) for payload in (0, 1))
    assert quiet.view(torch.float64).isnan()
    assert other.view(torch.float64).isnan()
    assert fingerprint(quiet.view(torch.float64)) != fingerprint(other.view(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.int8, torch.complex64])
@pytest.mark.parametrize("size", [0, 1, 3, 8, 1 << 19])
def test_all_dtypes_and_sizes_have_fingerprints(dtype: torch.dtype, size: int) -> None:
    x = (torch.arange(size) % 2).to(dtype)
    assert fingerprint(x) == fingerprint(x.clone())
    if size > 1:
        assert fingerprint(x) != fingerprint(x.roll(1))


def test_close_values_are_one_only_when_asked_for() -> None:
    x = image().double()
    near, far = x * (1 + 1e-14), x * (1 + 1e-8)
    exact, close = Values(), Values(by_closeness=True)
    assert exact.number_of(x) != exact.number_of(near)
    assert close.number_of(x) == close.number_of(near) != close.number_of(far)


def test_a_permutation_is_never_close() -> None:
    x = image().double()
    close = Values(by_closeness=True)
    assert close.number_of(x) != close.number_of(x.flip(0))


def test_large_weights_are_known_by_their_place_and_copies_by_their_values() -> None:
    values = Values()
    weight = torch.randn(512, 1024)
    number = values.number_of_weight(weight)
    assert values.number_of_weight(weight.view_as(weight)) == number
    assert values.number_of_weight(weight.clone()) == number
    other = weight.clone()
    other[3, 3] *= -1
    assert values.number_of_weight(other) != number
    weight.mul_(2)
    assert values.number_of_weight(weight) != number
