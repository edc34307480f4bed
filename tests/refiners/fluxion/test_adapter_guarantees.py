"""Adapters of shared leaves, in transactions, in memory and in contexts: api.md §6, design.md §4."""

import gc
import itertools
from collections.abc import Iterator
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError
from refiners.fluxion.context import Contexts
from refiners.fluxion.layers.adapter import lookup_top_adapter
from refiners.fluxion.layers.journal import all_or_nothing
from tests.refiners.fluxion.toys import Deep, Instead, Plus, Wrap, model, state

# --- shared leaves -----------------------------------------------------------------------------------------------


def test_a_leaf_that_stands_in_several_places_is_adapted_in_all_of_them() -> None:
    leaf = fl.Linear(2, 2)
    root = fl.Chain(leaf, fl.Chain(leaf, fl.ReLU()), leaf, fl.Residual(leaf))
    before = state(root)
    adapter = Plus(leaf).inject(root)
    assert len(list(root.walk(Plus))) == 4
    adapter.eject()
    assert state(root) == before


def test_adapters_of_a_shared_leaf_nest_and_are_ejected_in_any_order() -> None:
    for order in itertools.permutations(range(2)):
        leaf = fl.Linear(2, 2)
        root = fl.Chain(leaf, fl.Chain(leaf))
        before = state(root)
        adapters = [Plus(leaf).inject(root), Wrap(leaf).inject(root)]
        assert [len(list(root.walk(cls, recurse=True))) for cls in (Plus, Wrap)] == [2, 2]
        for i in order:
            adapters[i].eject()
        assert state(root) == before, order


def test_the_places_of_a_shared_leaf_share_the_weights_of_its_adapter() -> None:
    leaf = fl.Linear(2, 2)
    root = fl.Chain(leaf, fl.Chain(leaf))
    adapter = Plus(leaf).inject(root)
    weights = {id(module) for found in root.layers(Plus) for module in found}
    assert weights == {id(module) for module in adapter}


def test_a_leaf_in_two_trees_is_adapted_in_the_one_that_is_given() -> None:
    leaf = fl.Linear(2, 2)
    first, second = fl.Chain(leaf), fl.Chain(leaf)
    adapter = Plus(leaf).inject(first)
    assert (first[0], second[0]) == (adapter, leaf)
    Wrap(leaf).inject(second).eject()
    adapter.eject()
    assert (first[0], second[0]) == (leaf, leaf)


# --- transactions ------------------------------------------------------------------------------------------------


class Many(fl.Chain, fl.Adapter[fl.Chain]):
    """Adapts every Linear of its target with it, and may fail half-way."""

    def __init__(self, target: fl.Chain, fail_at: int | None = None) -> None:
        with self.setup_adapter(target):
            super().__init__(target)
        self.parts = [Plus(linear) for linear in target.layers(fl.Linear)]
        self.fail_at = fail_at

    def inject(self, parent: fl.Chain | None = None) -> Any:
        for i, part in enumerate(self.parts):
            if i == self.fail_at:
                raise KeyError("on purpose")
            part.inject(self.target)
        return super().inject(parent)

    def eject(self) -> None:
        for i, part in enumerate(self.parts):
            if i == self.fail_at:
                raise KeyError("on purpose")
            part.eject()
        super().eject()


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_an_injection_that_fails_half_way_leaves_everything_as_it_was(fail_at: int) -> None:
    root = model()
    before = state(root)
    adapter = Many(root, fail_at)
    with pytest.raises(KeyError, match="on purpose"):
        adapter.inject()
    assert state(root) == before
    assert not adapter.is_injected
    assert [(part.is_injected, part.parent) for part in adapter.parts] == [(False, None)] * 3
    adapter.fail_at = None
    adapter.inject()
    assert len(list(root.walk(Plus))) == 3
    adapter.eject()
    assert state(root) == before


def test_an_ejection_that_fails_half_way_leaves_everything_injected() -> None:
    root = model()
    adapter = Many(root).inject()
    before = state(root)
    adapter.fail_at = 2
    with pytest.raises(KeyError, match="on purpose"):
        adapter.eject()
    assert state(root) == before
    assert adapter.is_injected
    assert all(part.is_injected for part in adapter.parts)
    adapter.fail_at = None
    adapter.eject()


def test_injections_in_one_transaction_are_all_done_or_none() -> None:
    root = model()
    before = state(root)
    adapters = [Plus(linear) for linear in root.layers(fl.Linear)]

    @all_or_nothing
    def inject_all() -> None:
        for adapter in (*adapters, Plus(fl.Linear(2, 2))):
            adapter.inject(root)

    with pytest.raises(AdapterError, match="not in"):
        inject_all()
    assert state(root) == before
    assert not any(adapter.is_injected for adapter in adapters)


def test_an_adapter_of_a_deeper_adapter_that_fails_is_undone_by_the_outermost() -> None:
    class Outer(fl.Chain, fl.Adapter[fl.Chain]):
        def __init__(self, target: fl.Chain, inner: Many) -> None:
            self.inner = [inner]
            with self.setup_adapter(target):
                super().__init__(target)

        def inject(self, parent: fl.Chain | None = None) -> Any:
            super().inject(parent)
            self.inner[0].inject()
            return self

    root = model()
    before = state(root)
    inner = Many(root.Chain, fail_at=0)
    outer = Outer(root.Residual, inner)
    with pytest.raises(KeyError):
        outer.inject()
    assert state(root) == before
    assert not outer.is_injected


# --- modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_an_injected_adapter_has_the_training_mode_of_its_target(training: bool) -> None:
    root = model().train(training)
    adapter = Plus(root[1]).train(not training)
    adapter.target.train(training)
    adapter.inject(root)
    assert [module.training for module in root.modules()] == [training] * len(list(root.modules()))


def test_an_adapter_with_a_call_of_its_own_is_called_by_it() -> None:
    class Loud(fl.Chain, fl.Adapter[nn.Module]):
        def __init__(self, target: nn.Module) -> None:
            with self.setup_adapter(target):
                super().__init__(target)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) * 5

    root = fl.Chain(fl.Identity())
    adapter = Loud(root[0]).inject(root)
    assert root(torch.ones(1)).item() == 5
    adapter.eject()
    assert root(torch.ones(1)).item() == 1


def test_gradients_reach_the_adapter_and_its_target() -> None:
    root = model()
    adapter = Plus(root[1]).inject(root)
    root(torch.randn(3, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


# --- lookup_top_adapter ------------------------------------------------------------------------------------------


def test_lookup_top_adapter_finds_the_outermost_adapter_of_a_target() -> None:
    root = model()
    linear = root[1]
    assert lookup_top_adapter(root, linear) is linear
    outer = Wrap(linear).inject(root)
    inner = Plus(linear).inject(root)
    assert lookup_top_adapter(root, linear) is outer
    assert lookup_top_adapter(outer, linear) is inner


def test_lookup_top_adapter_leaves_out_adapters_that_merely_hold_the_target() -> None:
    root = model()
    linear = root.Chain.Linear
    Wrap(root.Chain).inject()
    assert lookup_top_adapter(root, linear) is linear


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
def test_a_model_dies_with_its_last_reference() -> None:
    root = model()
    root.set_context("a", {"b": torch.ones(1)})
    root(torch.ones(1, 2))
    repr(root)
    list(root.walk())
    dying = [ref(module) for module in root.modules()]
    del root
    assert [weak() for weak in dying] == [None] * len(dying)


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("cls", [Plus, Wrap, Deep, Instead])
def test_a_model_with_an_injected_adapter_dies_with_its_last_reference(cls: Any) -> None:
    root = model()
    cls(root[1]).inject(root)
    dying = [ref(module) for module in root.modules()]
    del root
    assert [weak() for weak in dying] == [None] * len(dying)


@pytest.mark.usefixtures("no_gc")
def test_a_hundred_injections_and_ejections_leave_no_module_behind() -> None:
    root = model()
    dying: list[ref[Any]] = []
    for _ in range(100):
        adapters = [Plus(linear).inject(root) for linear in list(root.layers(fl.Linear))]
        adapters.append(Wrap(root.Chain).inject())
        for adapter in adapters:
            adapter.eject()
            dying += [ref(module) for module in adapter.modules() if module is not adapter.target][:1]
    del adapters, adapter
    assert [weak() for weak in dying if weak() is not None] == []
    assert len(list(root.modules())) == 7


@pytest.mark.usefixtures("no_gc")
def test_a_failed_injection_leaves_no_module_behind() -> None:
    root = model()
    dying = []
    for _ in range(5):
        adapter = Plus(fl.Linear(2, 2))
        dying.append(ref(adapter))
        with pytest.raises(AdapterError):
            adapter.inject(root)
        del adapter
    gc.collect()  # the traceback that pytest holds
    assert [weak() for weak in dying] == [None] * 5


# --- contexts of adapters ----------------------------------------------------------------------------------------


def test_an_adapter_that_declares_a_context_gives_it_to_its_target_and_takes_it_away() -> None:
    class Gives(fl.Chain, fl.Adapter[fl.Chain]):
        def __init__(self, target: fl.Chain) -> None:
            with self.setup_adapter(target):
                super().__init__(target)

        def init_context(self) -> Contexts:
            return {"given": {"value": 7}}

    root = fl.Chain(fl.Chain(fl.UseContext("given", "value")))
    adapter = Gives(root.Chain).inject()
    assert [root(), root()] == [7, 7]
    adapter.eject()
    with pytest.raises(fl.ChainError, match="given"):
        root()
