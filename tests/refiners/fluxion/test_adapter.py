"""Adapters are exact inverses: api.md §6, design.md §4."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError, AdapterTypeError
from tests.refiners.fluxion.toys import Deep, Instead, Plus, Wrap, model, state


class FromTheLeft(fl.Adapter[fl.Linear], fl.Chain):
    """Has its bases in the other order."""

    def __init__(self, target: fl.Linear) -> None:
        with self.setup_adapter(target):
            super().__init__(target)


# --- making ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bases", [(fl.Adapter,), (fl.Adapter, nn.Module), (fl.Module, fl.Adapter)], ids=str)
def test_an_adapter_that_is_no_chain_is_refused_when_its_class_is_made(bases: Any) -> None:
    with pytest.raises(AssertionError, match="Chain") as error:
        type("Wrong", bases, {})
    assert isinstance(error.value, AdapterTypeError)


def test_the_bases_of_an_adapter_may_come_in_any_order() -> None:
    root = model()
    before = state(root)
    adapter = FromTheLeft(root[1]).inject(root)
    assert list(root._modules) == ["Chain", "FromTheLeft", "Residual"]
    adapter.eject()
    assert state(root) == before


def test_an_adapter_knows_its_target() -> None:
    linear = fl.Linear(2, 2)
    assert Plus(linear).target is linear
    assert Instead(linear).target is linear
    assert list(Instead(linear).parameters()) == []


def test_setup_adapter_lets_a_target_become_a_child_without_changing_its_parent() -> None:
    root = model()
    target = root.Chain
    adapter = Wrap(target)
    assert target.parent is root
    assert adapter[0] is target
    assert adapter.parent is None


def test_an_exception_inside_setup_adapter_leaves_the_target_as_it_was() -> None:
    class Broken(fl.Chain, fl.Adapter[fl.Chain]):
        def __init__(self, target: fl.Chain) -> None:
            with self.setup_adapter(target):
                super().__init__(target)
                raise RuntimeError("on purpose")

    root = model()
    target, before = root.Chain, state(root)
    with pytest.raises(RuntimeError, match="on purpose"):
        Broken(target)
    assert state(root) == before
    root.remove(target)
    assert target.parent is None
    other = fl.Chain()
    other.append(target)
    assert target.parent is other


def test_what_is_no_module_cannot_be_adapted() -> None:
    with pytest.raises(TypeError) as error:
        Wrap(3)  # pyright: ignore[reportArgumentType] (the wrong type is the point)
    assert isinstance(error.value, AdapterTypeError)


# --- inject and eject --------------------------------------------------------------------------------------------


def test_inject_returns_the_adapter_in_the_place_of_its_target() -> None:
    root = model()
    linear = root.Chain.Linear
    adapter = Plus(linear)
    assert adapter.inject(root) is adapter
    assert root.Chain[0] is adapter
    assert adapter.parent is root.Chain
    assert next(iter(root.state_dict())) == "Chain.Plus.Linear_1.weight"
    assert adapter.is_injected


def test_the_parent_may_hold_the_leaf_at_any_depth() -> None:
    root = model()
    Plus(root.Residual.Linear).inject(root)
    assert root.Residual[0].__class__ is Plus


@pytest.mark.parametrize("cls", [Plus, Wrap, Deep, Instead, FromTheLeft])
@pytest.mark.parametrize("target", [(0, 0), (1,), (2, 0)], ids=str)
def test_eject_restores_everything(cls: Any, target: tuple[int, ...]) -> None:
    root = model().eval()
    linear = root.layer(target, fl.Linear)
    linear.weight.requires_grad_(False)
    linear.register_forward_hook(lambda *_: None)
    root.register_forward_pre_hook(lambda *_: None)
    root.set_context("a", {"b": 1})
    x = torch.randn(3, 2)
    before, outputs = state(root), root(x)
    adapter = cls(linear).inject(root)
    root(x)
    adapter.eject()
    assert state(root) == before
    assert torch.equal(root(x), outputs)
    assert adapter.parent is None


def test_an_adapter_may_be_injected_again_after_ejection() -> None:
    root = model()
    before = state(root)
    adapter = Plus(root[1])
    x = torch.randn(1, 2)
    adapter.inject(root)
    injected = root(x)
    adapter.eject()
    adapter.inject(root)
    assert torch.equal(root(x), injected)
    adapter.eject()
    assert state(root) == before


@pytest.mark.parametrize("cls", [Wrap, Deep, Instead])
def test_a_chain_knows_its_parent_so_its_adapter_needs_none(cls: Any) -> None:
    root = model()
    before = state(root)
    target = root.Chain
    adapter = cls(target).inject()
    assert root[0] is adapter
    assert adapter.parent is root
    holder = {Wrap: adapter, Deep: adapter.find_parent(target), Instead: None}[cls]
    assert target.parent is holder
    adapter.eject()
    assert target.parent is root
    assert state(root) == before


def test_an_adapter_of_a_root_becomes_its_parent() -> None:
    root = model()
    before = state(root)
    adapter = Wrap(root).inject()
    assert root.parent is adapter
    assert adapter.parent is None
    adapter.eject()
    assert root.parent is None
    assert state(root) == before


@pytest.mark.parametrize("first", [Wrap, Deep])
@pytest.mark.parametrize("second", [Wrap, Deep, Instead])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_two_adapters_of_a_root_are_ejected_in_any_order(first: Any, second: Any, order: tuple[int, int]) -> None:
    root = model()
    before = state(root)
    adapters = [first(root).inject(), second(root).inject()]
    for i in order:
        adapters[i].eject()
    assert state(root) == before
    assert [adapter.parent for adapter in adapters] == [None, None]


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
def test_three_adapters_of_a_root_are_ejected_in_any_order(order: tuple[int, ...]) -> None:
    root = model()
    before = state(root)
    adapters = [cls(root).inject() for cls in (Wrap, Deep, Wrap)]
    for i in order:
        adapters[i].eject()
    assert state(root) == before


def stacks(leaf: bool) -> Iterator[tuple[Any, ...]]:
    kinds = (Plus, Wrap, Deep) if leaf else (Wrap, Deep)
    for classes in itertools.product(kinds, repeat=3):
        for order in itertools.permutations(range(3)):
            yield classes, order


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "chain"])
def test_three_adapters_of_one_target_are_ejected_in_any_order(leaf: bool) -> None:
    root = model()
    x = torch.randn(1, 2)
    before, outputs = state(root), root(x)
    for classes, order in stacks(leaf):
        target = root.Chain[0] if leaf else root.Chain
        adapters = [cls(target).inject(root if leaf else None) for cls in classes]
        for step, i in enumerate(order):
            adapters[i].eject()
            inside = list(root.modules())
            for j in order[step + 1 :]:
                assert any(module is adapters[j] for module in inside), (classes, order, step)
            assert any(module is target for module in inside)
        assert state(root) == before, (classes, order)
        assert torch.equal(root(x), outputs)


def test_the_first_of_two_adapters_stands_outside() -> None:
    root = model()
    linear = root[1]
    outer, inner = Wrap(linear).inject(root), Plus(linear).inject(root)
    assert root[1] is outer
    assert outer[0] is inner
    assert inner[0] is linear


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
@pytest.mark.parametrize("at_root", [False, True], ids=["inside", "root"])
def test_adapters_of_adapters_are_ejected_in_any_order(order: tuple[int, ...], at_root: bool) -> None:
    root = model()
    before = state(root)
    first = Wrap(root).inject() if at_root else Wrap(root.Chain).inject()
    second = Wrap(first).inject()
    third = Deep(second).inject()
    adapters = [first, second, third]
    for i in order:
        adapters[i].eject()
    assert state(root) == before
    assert [adapter.parent for adapter in adapters] == [None] * 3


def test_an_adapter_of_an_adapter_of_a_leaf_is_exact_too() -> None:
    root = model()
    before = state(root)
    inner = Plus(root[1]).inject(root)
    outer = Wrap(inner).inject()
    inner.eject()
    outer.eject()
    assert state(root) == before
    inner.inject(root)
    inner.eject()
    assert state(root) == before


def test_adapters_of_different_targets_are_ejected_in_any_order() -> None:
    for order in itertools.permutations(range(4)):
        root = model()
        before = state(root)
        linears = list(root.layers(fl.Linear))
        adapters = [Wrap(root.Chain).inject(), *[Plus(linear).inject(root) for linear in linears]]
        for i in order:
            adapters[i].eject()
        assert state(root) == before


def test_an_adapter_inside_a_target_that_is_adapted_later_stays() -> None:
    root = model()
    before = state(root)
    inside = Plus(root.Chain.Linear).inject(root)
    around = Wrap(root.Chain).inject()
    inside.eject()
    assert around.find(Plus) is None
    inside.inject(root)
    around.eject()
    inside.eject()
    assert state(root) == before


def test_names_of_edited_neighbours_survive_eject() -> None:
    root = model()
    adapter = Plus(root[1]).inject(root)
    root.insert(0, fl.Linear(2, 2))
    adapter.eject()
    assert list(root._modules) == ["Linear_1", "Chain", "Linear_2", "Residual"]


# --- what cannot be done ---------------------------------------------------------------------------------------------


def refused(root: fl.Chain, edit: Any, match: str | None = None) -> None:
    before = state(root)
    with pytest.raises(ValueError, match=match) as error:
        edit()
    assert isinstance(error.value, AdapterError)
    assert isinstance(error.value, RuntimeError)
    assert state(root) == before


def test_a_second_injection_is_refused_and_the_first_stays() -> None:
    root = model()
    adapter = Plus(root[1]).inject(root)
    refused(root, lambda: adapter.inject(root), "injected already")
    adapter.eject()


def test_a_second_injection_of_a_root_adapter_is_refused() -> None:
    root = model()
    adapter = Wrap(root).inject()
    refused(root, adapter.inject)
    adapter.eject()
    assert root.parent is None


def test_a_second_ejection_is_refused() -> None:
    root = model()
    adapter = Plus(root[1]).inject(root)
    adapter.eject()
    refused(root, adapter.eject, "not in")


def test_ejecting_what_was_never_injected_is_refused() -> None:
    root = model()
    refused(root, Plus(root[1]).eject, "not in")


def test_a_leaf_without_a_parent_is_refused() -> None:
    root = model()
    refused(root, Plus(root[1]).inject, "parent")


def test_a_target_that_is_not_in_the_parent_is_refused() -> None:
    root = model()
    refused(root, lambda: Plus(fl.Linear(2, 2)).inject(root), "not in")
    refused(root, lambda: Plus(root[1]).inject(root.Chain), "not in")
    refused(root, lambda: Wrap(fl.Chain()).inject(root), "not in")


def test_a_target_that_another_adapter_has_replaced_is_refused_and_that_one_is_named() -> None:
    root = model()
    linear = root[1]
    other = Instead(linear).inject(root)
    refused(root, lambda: Plus(linear).inject(root), "Instead")
    other.eject()
    chain = root.Chain
    other = Instead(chain).inject()
    refused(root, lambda: Wrap(chain).inject(), "Instead")
    refused(root, lambda: Wrap(chain).inject(root), "Instead")
    other.eject()


def test_an_adapter_that_was_taken_out_by_hand_is_refused_until_it_is_back() -> None:
    root = model()
    before = state(root)
    adapter = Plus(root[1]).inject(root)
    root.remove(adapter)
    refused(root, adapter.eject, "not in")
    root.insert(1, adapter)
    adapter.eject()
    assert state(root) == before


def test_a_root_inside_of_another_kind_of_module_keeps_the_contexts_above_it() -> None:
    inner = fl.Chain(fl.UseContext("numbers", "x"))
    model = fl.Chain(nn.Sequential(inner))
    model.set_context("numbers", {"x": torch.ones(1)})
    first, second = Wrap(inner).inject(), Wrap(inner).inject()
    assert torch.equal(model(torch.zeros(1)), torch.ones(1))
    first.eject()
    assert torch.equal(model(torch.zeros(1)), torch.ones(1))
    second.eject()
    assert inner.parent is model
    assert not {"_root_adapter", "_replaced_by", "_is_root"} & set(inner.__dict__)
