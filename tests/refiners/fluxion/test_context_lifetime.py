"""How long the values of a context last, in forwards, scopes and adapters: api.md §3, §9.3-9.4, design.md §4."""

import gc
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.fluxion.context import Contexts


def push(values: list[Any], x: Any) -> None:
    values.append(x)


def raising(x: Any) -> Any:
    raise ValueError("on purpose")


class Declares(fl.Chain):
    """Declares a value that is unset, a list, and a number."""

    def init_context(self) -> Contexts:
        return {"own": {"value": None, "list": [], "number": 0}}


# --- how long ----------------------------------------------------------------------------------------------------


def test_what_was_set_from_outside_stays_for_many_forwards() -> None:
    root = fl.Chain(fl.UseContext("text", "embedding"))
    root.set_context("text", {"embedding": 1})
    assert [root() for _ in range(3)] == [1, 1, 1]


def test_a_declared_key_is_reset_at_the_end_of_the_forward_of_its_chain() -> None:
    root = Declares(fl.SetContext("own", "list", callback=push), fl.UseContext("own", "list"))
    assert root(1) == [1]
    assert root(2) == [2]
    assert root.use_context("own") == {"value": None, "list": [], "number": 0}


def test_a_declared_key_that_was_set_from_outside_lasts_one_forward() -> None:
    root = Declares(fl.UseContext("own", "number"))
    root.set_context("own", {"number": 7})
    assert [root(), root()] == [7, 0]


def test_a_declared_key_of_an_inner_chain_is_reset_when_that_chain_ends() -> None:
    inner = Declares(fl.SetContext("own", "list", callback=push), fl.UseContext("own", "list").compose(len))
    root = fl.Chain(fl.Parallel(inner, fl.Chain(inner.structural_copy())), fl.Lambda(lambda a, b: (a, b)))
    assert root(1) == (1, 1)
    assert root(1) == (1, 1)


@pytest.mark.parametrize(
    "base", [fl.Sum, fl.Parallel, fl.Concatenate, fl.Distribute, fl.Residual, fl.Passthrough, fl.Matmul]
)
def test_every_kind_of_chain_resets_what_it_declares(base: Any) -> None:
    class Counting(base):
        def init_context(self) -> Contexts:
            return {"own": {"list": []}}

    lengths: list[int] = []
    count = fl.Lambda(lambda x: (lengths.append(len(chain.use_context("own")["list"])), x)[1])
    chain = Counting(fl.SetContext("own", "list", callback=push), count)
    for _ in range(2):
        chain(*[torch.eye(2)] * (2 if base is fl.Distribute else 1))
    assert lengths == [1, 1]
    assert chain.use_context("own") == {"list": []}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_raises_leaves_its_contexts_clean(error: type[BaseException]) -> None:
    fails = [True]

    def fail_once(x: Any) -> Any:
        if fails.pop() if fails else False:
            raise error
        return x

    root = Declares(
        fl.Chain(fl.SetContext("own", "list", callback=push), fl.SetContext("own", "value")),
        fl.Lambda(fail_once),
        fl.UseContext("own", "list"),
    )
    root.set_context("text", {"embedding": 1})
    with pytest.raises((fl.ChainError, KeyboardInterrupt)):
        root(1)
    assert root.use_context("own") == {"value": None, "list": [], "number": 0}
    assert root.use_context("text") == {"embedding": 1}
    assert root(2) == [2]


def test_what_a_forward_writes_under_an_undeclared_key_is_released_too() -> None:
    root = fl.Chain(fl.SetContext("a", "b"), fl.UseContext("a", "b"))
    root.set_context("a", {"other": 1})
    assert root(5) == 5
    assert root.use_context("a") == {"other": 1}


def test_written_into_an_ancestor_that_is_not_running_it_stays_until_that_runs() -> None:
    inner = fl.Chain(fl.SetContext("own", "value"))
    root = Declares(fl.UseContext("own", "value"), inner)
    inner(5)
    assert root.use_context("own")["value"] == 5
    inner(6)
    assert root() == 6
    assert root.use_context("own")["value"] is None
    with pytest.raises(fl.ChainError, match="own.value"):
        root()


def test_written_into_an_ancestor_that_is_not_running_it_stays_until_that_is_reset() -> None:
    inner = fl.Chain(fl.SetContext("own", "value"))
    root = Declares(inner)
    inner(5)
    root.reset_contexts()
    assert root.use_context("own") == {"value": None, "list": [], "number": 0}


def test_a_model_that_calls_itself_gives_each_call_its_own_values() -> None:
    lengths: list[int] = []

    def again(x: int) -> int:
        result = root(x - 1) if x > 0 else 0
        lengths.append(len(root.use_context("own")["list"]))
        return result

    root = Declares(fl.SetContext("own", "list", callback=push), fl.Lambda(again))
    root(3)
    assert lengths == [1, 1, 1, 1]


def test_a_value_written_by_a_forward_dies_when_it_returns() -> None:
    dying: list[Any] = []

    def watch(x: Tensor) -> Tensor:
        dying.append(ref(x))
        return x.sum()

    root = Declares(fl.Linear(2, 2), fl.Lambda(lambda x: x * 1), fl.SetContext("own", "value"), fl.Lambda(watch))
    gc.disable()
    try:
        with torch.no_grad():
            root(torch.ones(1, 2))
        assert dying[0]() is None
    finally:
        gc.enable()


def test_a_value_written_by_a_forward_that_raises_dies_with_its_error() -> None:
    dying: list[Any] = []

    def watch(x: Tensor) -> Tensor:
        dying.append(ref(x))
        raise ValueError

    root = Declares(fl.Lambda(lambda x: x * 1), fl.SetContext("own", "value"), fl.Lambda(watch))
    with pytest.raises(fl.ChainError):
        root(torch.ones(1, 2))
    gc.collect()
    assert dying[0]() is None


# --- scopes ------------------------------------------------------------------------------------------------------


def test_values_set_inside_a_scope_are_dropped_after_it() -> None:
    root = fl.Chain(fl.UseContext("a", "b"))
    root.set_context("a", {"b": 1, "c": 5})
    with root.context_scope():
        assert root() == 1
        root.set_context("a", {"b": 2})
        assert root() == 2
        assert root.use_context("a") == {"b": 2, "c": 5}
    assert root() == 1


def test_scopes_nest() -> None:
    root = fl.Chain(fl.UseContext("a", "b"))
    with root.context_scope():
        root.set_context("a", {"b": 1})
        with root.context_scope():
            assert root() == 1
            root.set_context("a", {"b": 2})
            assert root() == 2
        assert root() == 1
    assert root.provider.get_context("a") is None


def test_a_scope_ends_when_an_exception_leaves_it() -> None:
    root = fl.Chain(fl.UseContext("a", "b"))
    root.set_context("a", {"b": 1})

    def fail_inside() -> None:
        with root.context_scope():
            root.set_context("a", {"b": 2})
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert root() == 1


def test_scopes_of_two_models_do_not_disturb_each_other() -> None:
    first, second = (fl.Chain(fl.UseContext("a", "b")) for _ in range(2))
    with first.context_scope(), second.context_scope():
        first.set_context("a", {"b": 1})
        second.set_context("a", {"b": 2})
        assert (first(), second()) == (1, 2)
    assert first.provider.get_context("a") is None
    assert second.provider.get_context("a") is None


def test_a_scope_of_one_model_leaves_another_alone() -> None:
    first, second = (fl.Chain(fl.UseContext("a", "b")) for _ in range(2))
    with first.context_scope():
        second.set_context("a", {"b": 2})
    assert second() == 2


def test_a_scope_opened_on_any_chain_is_one_for_the_whole_tree() -> None:
    root = fl.Chain(fl.Chain(fl.UseContext("a", "b")))
    root.set_context("a", {"b": 1})
    with root.Chain.context_scope():
        root.set_context("a", {"b": 2})
        assert (root(), root.Chain()) == (2, 2)
    assert root() == 1


def test_a_declared_key_set_in_a_scope_lasts_one_forward() -> None:
    root = Declares(fl.UseContext("own", "number"))
    with root.context_scope():
        root.set_context("own", {"number": 7})
        assert [root(), root()] == [7, 0]


def test_lists_that_a_forward_fills_in_a_scope_do_not_leak_out() -> None:
    root = Declares(fl.SetContext("own", "list", callback=push), fl.UseContext("own", "list").compose(len))
    with root.context_scope():
        assert root(1) == 1
    inner_list = root.use_context("own")["list"]
    assert inner_list == []
    assert root(1) == 1


def test_a_value_set_in_a_scope_dies_with_it() -> None:
    root = fl.Chain(fl.UseContext("a", "b"))
    gc.disable()
    try:
        with root.context_scope():
            value = torch.ones(1)
            dying = ref(value)
            root.set_context("a", {"b": value})
            root()
            del value
        assert dying() is None
    finally:
        gc.enable()


# --- contexts and adapters -----------------------------------------------------------------------------------------


class Reads(fl.Sum, fl.Adapter[nn.Module]):
    """Adds a value of the context."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Chain(fl.UseContext("a", "b")))


def test_an_adapter_injected_deep_in_a_live_tree_reads_the_context_at_once() -> None:
    root = fl.Chain(fl.Chain(fl.Residual(fl.Linear(1, 1))))
    root.set_context("a", {"b": 10.0})
    x = torch.zeros(1, 1)
    before = root(x)
    adapter = Reads(root.ensure_find(fl.Linear)).inject(root)
    assert torch.equal(root(x), before + 10)
    root.set_context("a", {"b": 20.0})
    assert torch.equal(root(x), before + 20)
    adapter.eject()
    assert torch.equal(root(x), before)


def test_an_ejected_adapter_keeps_nothing_of_its_old_contexts() -> None:
    root = fl.Chain(fl.Chain(fl.Identity()))
    root.set_context("a", {"b": 1.0})
    adapter = Reads(root.Chain).inject()
    adapter.eject()
    assert adapter.parent is None
    assert adapter.provider.contexts == {}
    with pytest.raises(fl.ChainError):
        adapter(torch.zeros(1))


def test_contexts_set_before_an_injection_survive_inject_and_eject() -> None:
    root = Declares(fl.Chain(fl.Linear(1, 1)))
    root.set_context("own", {"number": 3})
    root.set_context("a", {"b": 1.0})
    Reads(root.ensure_find(fl.Linear)).inject(root).eject()
    assert root.use_context("own")["number"] == 3
    assert root.use_context("a") == {"b": 1.0}


def test_contexts_set_on_a_chain_stay_with_it_through_an_adapter_of_it() -> None:
    root = fl.Chain(fl.Chain(fl.UseContext("mine", "x")))
    root.Chain.set_context("mine", {"x": 1.0})
    root.set_context("a", {"b": 2.0})
    adapter = Reads(root.Chain).inject()
    assert root() == 3.0
    adapter.eject()
    assert root() == 1.0


def test_set_context_on_a_target_while_it_is_adapted_is_seen_after_ejection() -> None:
    target = fl.Chain(fl.UseContext("a", "x"))
    root = fl.Chain(target)
    root.set_context("a", {"b": 1.0, "x": 0.0})
    adapter = Reads(target).inject()
    target.set_context("a", {"x": 5.0})
    assert root() == 6.0
    adapter.eject()
    assert root() == 5.0
