"""What a running Chain keeps alive: no more than its children still need."""

from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.errors import ChainError, InputError

x = torch.ones(2, 3)


class Make(fl.Module):
    """Makes a tensor, and remembers whether it is still there."""

    made: Any = None

    def forward(self, x: Tensor) -> Tensor:
        output = x + 1
        self.made = ref(output)
        return output


class Look(fl.Module):
    """Looks whether what another layer made is still there."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.watched = [make]
        self.is_alive: bool | None = None

    def forward(self, *args: Any) -> Any:
        self.is_alive = self.watched[0].made() is not None
        return args[0]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_input_of_nested_chains_is_gone_when_their_first_child_has_run(depth: int) -> None:
    make = Make()
    look = Look(make)
    nested = fl.Chain(Make(), look)
    for _ in range(depth - 1):
        nested = fl.Chain(nested)
    fl.Chain(make, nested)(x)
    assert look.is_alive is False


def test_an_output_that_was_added_is_gone_while_the_next_term_is_made() -> None:
    first, second = Make(), Make()
    looks = [Look(first), Look(second)]
    fl.Sum(first, second, fl.Chain(*looks))(x)
    assert [look.is_alive for look in looks] == [False, False]


def test_a_residual_keeps_its_input_to_the_end() -> None:
    make = Make()
    look = Look(make)
    output = fl.Chain(make, fl.Residual(Make(), look))(x)
    assert look.is_alive
    assert torch.equal(output, x + 2 + x + 1)


def fail(*_: Any) -> Any:
    raise KeyError("told")


class OwnForward(fl.Chain):
    """Fails before any child runs."""

    def forward(self, *args: Any) -> Any:
        raise KeyError("told")


class Mixed:
    def forward(self, *args: Any) -> Any:
        raise KeyError("told")


class MixedIn(Mixed, fl.Chain):
    """Has the forward of another class."""


class OfOwnForward(OwnForward):
    """Has the forward of its base."""


class BadContext(fl.Chain):
    """Cannot say what its contexts are at first."""

    is_built = False

    def init_context(self) -> dict[str, dict[str, Any]]:
        if self.is_built:
            raise KeyError("told")
        self.is_built = True
        return {"a": {"b": None}}


@pytest.mark.parametrize(
    "child",
    [
        fl.Chain(fl.Lambda(fail)),
        fl.Residual(fl.Lambda(fail)),
        fl.Sum(fl.Lambda(fail)),
        fl.Lambda(fail),
        OwnForward(),
        OfOwnForward(),
        MixedIn(),
        BadContext(),
    ],
    ids=lambda child: type(child).__name__,
)
def test_a_failure_tells_the_input_of_the_child(child: Any) -> None:
    with pytest.raises(ChainError, match="told") as error:
        fl.Chain(fl.Identity(), child)(x)
    assert "0: Tensor(shape=(2, 3)" in str(error.value)


@pytest.mark.parametrize("kind", [fl.Distribute, type("Renamed", (fl.Distribute,), {})])
def test_a_wrong_number_of_inputs_tells_them(kind: type[fl.Distribute]) -> None:
    with pytest.raises(ChainError) as error:
        fl.Chain(fl.Identity(), kind(fl.Identity(), fl.Identity()))(x)
    assert isinstance(error.value.__cause__, InputError)
    assert "0: Tensor(shape=(2, 3)" in str(error.value)
