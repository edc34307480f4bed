"""The shape checks of tests/conftest.py find a shape that is not the annotated one, and cover the leaves."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.errors import InputError


class Halve(fl.Module):
    """Says that it halves the last axis, and may not."""

    def forward(self, x: Float[Tensor, "batch {self.size}"], size: int) -> Float[Tensor, "batch {size}"]:
        if size == 0:
            raise InputError("half of nothing")
        return x[:, :size]

    size = 4


@pytest.fixture
def conftest(pytestconfig: pytest.Config) -> ModuleType:
    found = pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    assert isinstance(found, ModuleType)
    return found


def test_a_result_of_another_shape_is_found(conftest: ModuleType) -> None:
    forward = conftest.with_shapes_checked(Halve.forward)
    assert forward(Halve(), torch.zeros(3, 4), 2).shape == (3, 2)
    with pytest.raises(TypeCheckError, match="return"):
        forward(Halve(), torch.zeros(3, 4), 5)


def test_an_argument_of_another_shape_is_found(conftest: ModuleType) -> None:
    forward = conftest.with_shapes_checked(Halve.forward)
    with pytest.raises(TypeCheckError, match="x"):
        forward(Halve(), torch.zeros(3, 5), 2)


def test_an_error_of_the_leaf_itself_comes_first(conftest: ModuleType) -> None:
    forward = conftest.with_shapes_checked(Halve.forward)
    with pytest.raises(InputError, match="half of nothing"):
        forward(Halve(), torch.zeros(3, 5), 0)


def test_the_leaves_are_checked(conftest: ModuleType) -> None:
    leaves = {leaf.__name__: leaf for leaf in conftest.leaves()}
    assert all(hasattr(leaves[name].forward, "__wrapped__") for name in ("ScaledDotProductAttention", "LayerNorm2d"))
