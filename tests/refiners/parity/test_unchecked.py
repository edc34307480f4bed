"""Guesses never reach operations of torch that write beyond their tensors where numbers or shapes do not fit."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiners.parity.fingerprint import Values
from refiners.parity.operations import Operation
from refiners.parity.reasons import edits
from refiners.parity.reasons.replay import as_it_is, scalars, with_arguments, with_scalar
from refiners.parity.trace import record

X = torch.linspace(-1, 1, 2 * 8 * 6).view(2, 8, 6)
LENGTH = torch.ones(1, 1, 6)


def operation_of(compute: Callable[[], Tensor], name: str) -> Operation:
    trace, _ = record(nn.Identity(), lambda: {"y": compute()}, Values())
    return next(operation for operation in trace.operations if name in operation.name)


def test_attention_on_shapes_that_do_not_fit_is_refused() -> None:
    q = torch.ones(2, 4, 5, 8)
    operation = operation_of(lambda: F.scaled_dot_product_attention(q, q, q), "scaled_dot_product")
    with pytest.raises(ValueError, match="do not fit attention"):
        as_it_is(operation, [q, torch.ones(2, 3, 5, 8), q])


@pytest.mark.parametrize(("place", "number"), [(3, 1), (3, 3), (4, 4), (5, 5), (5, 7), (6, 3), (6, 0)])
def test_a_group_norm_with_numbers_that_do_not_fit_is_refused(place: int, number: int) -> None:
    operation = operation_of(lambda: F.group_norm(X, 4), "group_norm")
    assert len(as_it_is(operation, [X])) == 3
    with pytest.raises(ValueError, match="do not fit a group norm"):
        with_arguments(operation, with_scalar(operation.template, (0, place), number), [X])


@pytest.mark.parametrize("axis", [1, -1, -2, 3])
def test_a_norm_of_weights_along_an_axis_that_does_not_fit_is_refused(axis: int) -> None:
    direction = X.clone()
    operation = operation_of(lambda: torch._weight_norm(direction, LENGTH, 2), "_weight_norm_interface")
    assert ((0, 2), 2) in list(scalars(operation.template))
    assert len(as_it_is(operation, [X, LENGTH])) == 2
    with pytest.raises(ValueError, match="do not fit a norm of weights"):
        with_arguments(operation, with_scalar(operation.template, (0, 2), axis), [X, LENGTH])


class Repeated(nn.Module):
    """A function of torch's own that asks for a view, and writes into the list of its sizes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1)


def test_a_view_with_another_number_of_axes_than_torch_asked_for_is_refused() -> None:
    model = Repeated()
    with edits.operation(model, 0, torch.ops.aten.unsqueeze.default, edits.left_out)():
        with pytest.raises(ValueError, match="another number of axes"):
            model(X)
    assert torch.equal(model(X), X.repeat_interleave(2, -1))
