"""Contexts as one thread sees them: api.md §3, §9.2-9.4, design.md §4 "Context is scoped"."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import ContextError
from refiners.fluxion.context import ContextProvider, Contexts


def push(values: list[Any], x: Any) -> None:
    values.append(x)


def raising(x: Any) -> Any:
    raise ValueError("on purpose")


class Declares(fl.Chain):
    """Declares a value that is unset, a list, and a number."""

    def init_context(self) -> Contexts:
        return {"own": {"value": None, "list": [], "number": 0}}


# --- providers ---------------------------------------------------------------------------------------------------


def test_a_provider_holds_contexts_by_name() -> None:
    provider = ContextProvider()
    assert provider.get_context("a") is None
    provider.set_context("a", {"x": 1})
    provider.update_contexts({"b": {"y": 2}})
    assert provider.contexts == {"a": {"x": 1}, "b": {"y": 2}}
    assert provider.get_context("a") == {"x": 1}


def test_a_provider_is_created_from_contexts() -> None:
    assert ContextProvider.create({"a": {"x": 1}}).contexts == {"a": {"x": 1}}


def test_the_text_of_a_provider_shows_tensors_by_shape_dtype_and_device() -> None:
    text = repr(ContextProvider.create({"a": {"x": torch.zeros(2, 3), "y": [torch.zeros(1), 5], "z": "w"}}))
    assert all(part in text for part in ("(2, 3)", "float32", "cpu", "'z': 'w'", "5"))
    assert "tensor(" not in text


def test_get_context_gives_the_live_dict() -> None:
    chain = fl.Chain()
    chain.set_context("a", {"x": 1})
    chain.provider.get_context("a")["x"] = 2
    assert chain.use_context("a") == {"x": 2}


# --- use and set -------------------------------------------------------------------------------------------------


def test_the_example_of_the_talk_prints_6() -> None:
    chain = fl.Chain(fl.UseContext("numbers", "four"), fl.Lambda(lambda x: x + 2))
    chain.set_context("numbers", {"four": 4})
    assert chain() == 6


def test_use_context_ignores_its_inputs() -> None:
    chain = fl.Chain(fl.UseContext("a", "b"))
    chain.set_context("a", {"b": 5})
    assert (chain(), chain(1), chain(1, 2)) == (5, 5, 5)


def test_compose_returns_the_layer_and_chains_functions_in_order() -> None:
    use = fl.UseContext("a", "b")
    assert use.compose(lambda x: x + 1).compose(lambda x: x * 10) is use
    chain = fl.Chain(use)
    chain.set_context("a", {"b": 1})
    assert chain() == 20


@pytest.mark.parametrize("context", [None, {}, {"other": 1}, {"key": None}], ids=str)
def test_an_unset_value_is_an_error_that_names_reader_key_and_setter(context: dict[str, Any] | None) -> None:
    class Root(fl.Chain):
        pass

    root = Root(fl.Chain(fl.UseContext("name", "key")))
    if context is not None:
        root.set_context("name", context)
    with pytest.raises(fl.ChainError) as error:
        root()
    cause = error.value.__cause__
    assert isinstance(cause, ContextError)
    assert isinstance(cause, AssertionError)
    assert all(part in str(cause) for part in ("name", "Root.Chain.UseContext", "set_context"))
    if context is not None:
        assert "name.key" in str(cause)


def test_the_setter_method_of_the_model_is_named_when_it_has_one() -> None:
    class Model(fl.Chain):
        def init_context(self) -> Contexts:
            return {"diffusion": {"timestep": None}}

        def set_timestep(self, timestep: Tensor) -> None:
            self.set_context("diffusion", {"timestep": timestep})

    model = Model(fl.UseContext("diffusion", "timestep"))
    with pytest.raises(fl.ChainError, match=r"diffusion\.timestep.*unset.*Model\.UseContext.*set_timestep\(\)"):
        model()


@pytest.mark.parametrize("value", [0, 0.0, False, "", [], torch.zeros(1)], ids=repr)
def test_a_value_that_counts_as_false_is_set(value: Any) -> None:
    chain = fl.Chain(fl.UseContext("a", "b"))
    chain.set_context("a", {"b": value})
    assert chain() is value


def test_set_context_stores_its_input_and_returns_it() -> None:
    x = torch.ones(1)
    root = Declares(fl.SetContext("own", "value"), fl.Lambda(lambda x: x + 1), fl.UseContext("own", "value"))
    assert root(x) is x
    assert root[:1](x) is x


def test_set_context_with_a_callback_gives_it_the_current_value_and_returns_its_input() -> None:
    root = Declares(
        fl.SetContext("own", "list", callback=push), fl.Parallel(fl.Lambda(lambda x: x), fl.UseContext("own", "list"))
    )
    assert root(7) == (7, [7])


def test_a_layer_outside_of_any_chain_has_no_context() -> None:
    for layer in (fl.UseContext("a", "b"), fl.SetContext("a", "b")):
        with pytest.raises(AssertionError, match="set_context"):
            layer(1)


def test_set_context_into_a_context_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(fl.ChainError) as error:
        fl.Chain(fl.SetContext("a", "b"))(1)
    assert isinstance(error.value.__cause__, ContextError)


def test_set_context_into_an_existing_but_empty_context_stores() -> None:
    chain = fl.Chain(fl.SetContext("a", "b"), fl.Lambda(lambda x: x + 1), fl.UseContext("a", "b"))
    chain.set_context("a", {})
    assert chain(1) == 1


def test_set_context_with_a_callback_on_an_unset_key_is_an_error() -> None:
    chain = fl.Chain(fl.SetContext("a", "b", callback=push))
    chain.set_context("a", {})
    with pytest.raises(fl.ChainError, match="a.b"):
        chain(1)


# --- who sees what -----------------------------------------------------------------------------------------------


def test_what_a_parent_declares_is_seen_by_all_its_descendants() -> None:
    root = fl.Chain(fl.Chain(fl.Residual(fl.Chain(fl.UseContext("a", "b")))))
    root.set_context("a", {"b": 1})
    assert root(1) == 2


def test_a_context_reaches_what_is_inserted_later() -> None:
    root = fl.Chain(fl.Chain(fl.Identity()))
    root.set_context("a", {"b": 3})
    root.Chain.append(fl.Chain(fl.UseContext("a", "b")))
    assert root(torch.zeros(1)) == 3


def test_a_context_set_later_reaches_what_was_inserted_before() -> None:
    leaf = fl.UseContext("a", "b")
    root = fl.Chain(fl.Chain(leaf))
    leaf_provider = leaf.provider
    root.set_context("a", {"b": 3})
    assert leaf_provider.get_context("a") == {"b": 3}
    assert root() == 3


def test_what_a_descendant_writes_is_seen_by_the_ancestor_and_its_other_descendants() -> None:
    seen: list[Any] = []
    root = Declares(
        fl.Chain(fl.Chain(fl.SetContext("own", "value"))),
        fl.Lambda(lambda x: seen.append(root.use_context("own")["value"])),
        fl.Chain(fl.UseContext("own", "value")),
    )
    assert root(8) == 8
    assert seen == [8]


class Child(fl.Chain):
    """Has defaults of its own for a context that its parents may declare too."""

    def init_context(self) -> Contexts:
        return {"own": {"number": 100, "mine": 5}}


def test_the_ancestors_value_wins_over_a_childs_default() -> None:
    child = Child(fl.UseContext("own", "number"))
    assert child() == 100
    root = Declares(child)
    assert root() == 0
    root.set_context("own", {"number": 3})
    assert root() == 3


def test_a_key_that_only_the_child_has_is_the_childs() -> None:
    root = Declares(Child(fl.UseContext("own", "mine")))
    assert root() == 5


def test_contexts_of_one_name_in_several_ancestors_give_all_their_keys() -> None:
    class Outer(fl.Chain):
        def init_context(self) -> Contexts:
            return {"own": {"outer": 1}}

    leaf = fl.Parallel(*[fl.UseContext("own", key) for key in ("outer", "number", "mine")])
    root = Outer(Declares(Child(leaf)))
    assert root() == (1, 0, 5)
    assert leaf.use_context("own") == {"outer": 1, "value": None, "list": [], "number": 0, "mine": 5}


def test_a_write_into_a_context_that_two_ancestors_share_is_seen() -> None:
    root = Declares(Child(fl.Parallel(fl.UseContext("own", "mine"), fl.UseContext("own", "number"))))
    root.Child.use_context("own")["mine"] = 6
    root.Child.use_context("own")["number"] = 7
    assert root() == (6, 7)


def test_a_child_never_creates_a_name_in_its_parent() -> None:
    root = fl.Chain(Child(fl.Identity()), fl.Chain())
    root.Child.set_context("new", {"x": 1})
    assert root.provider.get_context("own") is None
    assert root.provider.get_context("new") is None
    assert root.Chain.provider.get_context("new") is None
    assert root.Child.use_context("new") == {"x": 1}


def test_set_context_on_a_child_reaches_the_ancestor_that_has_the_name() -> None:
    root = fl.Chain(fl.Chain(fl.Identity()), fl.UseContext("a", "b"))
    root.set_context("a", {"b": 1})
    root.Chain.set_context("a", {"b": 2})
    assert root(torch.zeros(1)) == 2


def test_set_context_keeps_the_other_keys_at_the_root_and_below_alike() -> None:
    root = fl.Chain(fl.Chain(fl.Chain(fl.Parallel(fl.UseContext("a", "x"), fl.UseContext("a", "y")))))
    root.set_context("a", {"x": 1})
    root.set_context("a", {"y": 2})
    assert root() == (1, 2)
    root.Chain.Chain.set_context("a", {"y": 3})
    assert root() == (1, 3)
    assert root.use_context("a") == root.Chain.Chain.use_context("a") == {"x": 1, "y": 3}


def test_a_moved_subtree_reads_the_contexts_of_its_new_place_only() -> None:
    moved = fl.Chain(fl.UseContext("a", "b"))
    first, second = fl.Chain(moved), fl.Chain()
    first.set_context("a", {"b": 1})
    first.set_context("only first", {"b": 1})
    second.set_context("a", {"b": 2})
    second.append(moved)
    assert second() == 2
    assert moved.provider.get_context("only first") is None


def test_a_chain_that_was_taken_out_keeps_nothing_of_its_parents_contexts() -> None:
    moved = fl.Chain(fl.UseContext("a", "b"))
    root = fl.Chain(moved)
    root.set_context("a", {"b": 1})
    assert root() == 1
    root.pop()
    with pytest.raises(fl.ChainError, match='"a"'):
        moved()
    assert moved.provider.contexts == {}


def test_init_context_may_use_attributes_set_before_the_constructor() -> None:
    class Sized(fl.Chain):
        def __init__(self, size: int) -> None:
            self.size = size
            super().__init__(fl.UseContext("a", "size"))

        def init_context(self) -> Contexts:
            return {"a": {"size": self.size}}

    assert Sized(4)() == 4


def test_a_chain_inside_of_another_kind_of_module_sees_the_contexts_above_that() -> None:
    inner = fl.Chain(fl.UseContext("numbers", "x"), fl.Lambda(double))
    model = fl.Chain(nn.Sequential(nn.Sequential(inner)))
    model.set_context("numbers", {"x": torch.ones(1)})
    assert torch.equal(model(torch.zeros(1)), torch.full((1,), 2.0))
    assert inner[0].get_path() == "Chain.Sequential.0.0.UseContext"
    assert torch.equal(copy.deepcopy(model)(torch.zeros(1)), torch.full((1,), 2.0))
    model.pop()
    assert inner.parent is None


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2
