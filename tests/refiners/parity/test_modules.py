"""The walk through a model is torch's own, only faster."""

from typing import Any

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from refiners.parity.modules import named_modules, own_state


class Odd(nn.Module):
    """Holds a module under two names, none under a third, and one deep below itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.again = self.first
        self.nothing = None
        self.register_module("empty", None)
        self.below = nn.ModuleDict({"chain": fl.Chain(fl.Linear(2, 2), fl.Linear(2, 2), self.first[0])})


@pytest.mark.parametrize("every_name", [False, True])
def test_modules_come_in_the_order_and_under_the_names_of_torch(every_name: bool) -> None:
    model = Odd()
    expected = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=not every_name)]
    assert [(name, id(module)) for name, module in named_modules(model, every_name=every_name)] == expected


def test_a_module_that_holds_itself_is_an_error_not_a_hang() -> None:
    model: Any = nn.Sequential(nn.ReLU())
    model.add_module("itself", model)
    assert len(named_modules(model)) == 2
    with pytest.raises(RecursionError):
        named_modules(model, every_name=True)


def test_the_own_state_is_what_stands_in_the_state_dict() -> None:
    norm = nn.BatchNorm1d(3)
    norm.register_buffer("cache", torch.zeros(2), persistent=False)
    norm.register_buffer("later", None)
    norm.register_parameter("none", None)
    assert [name for name, _ in own_state(norm)] == list(norm.state_dict())
    assert own_state(nn.Sequential(norm)) == []
