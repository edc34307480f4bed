"""torch.export, strict and not, on Chains: design.md §4, api.md §8 "torch"."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from refiners.fluxion.context import Contexts

# Strict export says so whenever a forward changes anything; a running Chain keeps its context in such a place.
pytestmark = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
x = torch.linspace(-1, 1, 6).reshape(3, 2)


def push(values: list[Any], value: Any) -> None:
    values.append(value)


class Model(fl.Chain):
    """Has a node of each kind, and contexts that are declared, written and set from outside."""

    def __init__(self) -> None:
        super().__init__(
            fl.Linear(2, 2),
            fl.SetContext("own", "first"),
            fl.Residual(fl.Linear(2, 2), fl.Sum(fl.Identity(), fl.UseContext("own", "first"))),
            fl.SetContext("own", "list", callback=push),
            fl.Parallel(fl.Identity(), fl.UseContext("own", "list").compose(lambda values: values[0])),
            fl.Distribute(fl.Identity(), fl.Linear(2, 2)),
            fl.Concatenate(fl.GetArg(0), fl.GetArg(1), dim=-1),
            fl.Chain(fl.Passthrough(fl.Sin()), fl.Return(), fl.Lambda(lambda x: x * 100)),
            nn.Sequential(nn.Linear(4, 2), fl.Chain(fl.ReLU())),
            fl.Sum(fl.Identity(), fl.UseContext("outside", "embedding")),
        )
        self.set_context("outside", {"embedding": torch.ones(2)})

    def init_context(self) -> Contexts:
        return {"own": {"first": None, "list": []}}


class Reads(fl.Sum, fl.Adapter[fl.Linear]):
    """Adds a value of the context to its target's output."""

    def __init__(self, target: fl.Linear) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Chain(fl.UseContext("outside", "embedding"), fl.Sin()))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


strictness = pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])


@strictness
def test_a_model_with_every_kind_of_node_is_exported_with_equal_results(strict: bool) -> None:
    model = Model()
    exported = torch.export.export(model, (x,), strict=strict)
    assert torch.equal(exported.module()(x), model(x))
    assert list(exported.state_dict) == list(model.state_dict())
    assert model.use_context("own") == {"first": None, "list": []}


@strictness
def test_an_injected_adapter_is_exported(strict: bool) -> None:
    model = Model()
    before = model(x)
    adapter = Reads(model[0]).inject(model)
    exported = torch.export.export(model, (x,), strict=strict)
    assert torch.equal(exported.module()(x), model(x))
    adapter.eject()
    assert torch.equal(model(x), before)


@strictness
def test_a_tree_edited_just_before_is_exported(strict: bool) -> None:
    model = Model()
    model.insert(0, fl.Linear(2, 2))
    model.insert(0, fl.Sin())
    exported = torch.export.export(model, (x,), strict=strict)
    assert torch.equal(exported.module()(x), model(x))
    assert set(exported.state_dict) == set(model.state_dict())


@strictness
def test_a_size_may_be_dynamic(strict: bool) -> None:
    model = Model()
    exported = torch.export.export(model, (x,), dynamic_shapes=(({0: torch.export.Dim("batch")},),), strict=strict)
    other = torch.linspace(-2, 2, 10).reshape(5, 2)
    assert torch.equal(exported.module()(other), model(other))


def test_an_exported_model_is_saved_and_loaded(tmp_path: Any) -> None:
    model = Model()
    torch.export.save(torch.export.export(model, (x,), strict=True), tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


@strictness
def test_a_failing_export_leaves_the_model_usable(strict: bool) -> None:
    model = Model()
    before = model(x)
    with pytest.raises(Exception, match="mat1|size|shape|dim"):
        torch.export.export(model, (torch.ones(3, 5),), strict=strict)
    assert torch.equal(model(x), before)
