"""Searching a tree: walk, layers, find, layer, find_parent. api.md §2."""

from typing import Any

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from refiners.errors import NotFoundError, TreeTypeError


class Inner(fl.Chain):
    """A Chain inside of others."""


def tree() -> fl.Chain:
    return fl.Chain(fl.Linear(1, 1), Inner(fl.Linear(1, 1), Inner(fl.ReLU())), fl.Residual(fl.Linear(1, 1)))


def kinds(found: Any) -> list[str]:
    return [type(module).__name__ for module, _ in found]


def test_walk_is_depth_first_and_pre_order() -> None:
    assert kinds(tree().walk(recurse=True)) == ["Linear", "Inner", "Linear", "Inner", "ReLU", "Residual", "Linear"]


def test_walk_without_a_predicate_matches_everything_and_so_does_not_descend() -> None:
    assert kinds(tree().walk()) == ["Linear", "Inner", "Residual"]


def test_walk_yields_the_direct_parent_of_each_module() -> None:
    root = tree()
    for module, parent in root.walk(recurse=True):
        assert module in parent
    assert next(parent for module, parent in root.walk(fl.ReLU)) is root.Inner.Inner


def test_walk_by_type_descends_where_nothing_matches() -> None:
    assert kinds(tree().walk(fl.Linear)) == ["Linear", "Linear", "Linear"]


def test_walk_does_not_descend_into_a_match_unless_told() -> None:
    assert kinds(tree().walk(Inner)) == ["Inner"]
    assert kinds(tree().walk(Inner, recurse=True)) == ["Inner", "Inner"]


def test_walk_never_yields_the_root_itself() -> None:
    root = Inner(Inner())
    assert [module for module, _ in root.walk(Inner, recurse=True)] == [root[0]]


def test_a_predicate_is_called_with_the_module_and_its_parent() -> None:
    root = tree()
    found = root.walk(lambda module, parent: isinstance(module, fl.Linear) and isinstance(parent, fl.Residual))
    assert [module for module, _ in found] == [root.Residual.Linear]


def test_a_predicate_that_raises_stop_iteration_skips_the_subtree() -> None:
    def outside_of_inner(module: nn.Module, parent: fl.Chain) -> bool:
        if isinstance(module, Inner):
            raise StopIteration
        return isinstance(module, fl.Linear)

    root = tree()
    assert [module for module, _ in root.walk(outside_of_inner)] == [root.Linear, root.Residual.Linear]


def test_another_exception_of_a_predicate_reaches_the_caller() -> None:
    def broken(module: nn.Module, parent: fl.Chain) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(tree().walk(broken))


@pytest.mark.parametrize("generic", [list[int], dict[str, int]], ids=str)
def test_a_parametrised_generic_is_refused(generic: Any) -> None:
    with pytest.raises(ValueError):
        next(tree().walk(generic))


def test_walk_is_lazy() -> None:
    root = tree()
    found = root.walk(fl.Linear)
    assert next(found)[0] is root.Linear
    root.Inner.append(fl.Linear(1, 1))
    assert len(list(found)) == 3


class Wrap(fl.Chain, fl.Adapter[nn.Module]):
    """Adapts anything, and computes the same."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target)


@pytest.mark.parametrize("recurse", [False, True])
def test_adapters_may_be_injected_while_walking(recurse: bool) -> None:
    root = tree()
    x = torch.randn(1, 1)
    before = root(x)
    for linear, parent in root.walk(fl.Linear, recurse=recurse):
        Wrap(linear).inject(parent)
    assert len(list(root.walk(Wrap))) == 3
    assert torch.equal(root(x), before)
    for adapter, _ in root.walk(Wrap):
        adapter.eject()
    assert list(root.walk(Wrap)) == []


def test_chains_may_be_adapted_while_walking() -> None:
    root = tree()
    for inner, _ in root.walk(Inner):
        Wrap(inner).inject()
    assert kinds(root.walk()) == ["Linear", "Wrap", "Residual"]


def test_a_module_that_was_removed_meanwhile_is_passed_over() -> None:
    root = fl.Chain(fl.Linear(1, 1), fl.Linear(1, 1), fl.Linear(1, 1))
    seen = []
    for linear, parent in root.walk(fl.Linear):
        seen.append(linear)
        if len(seen) == 1:
            parent.pop(1)
    assert len(seen) == 2


def test_walk_meets_a_leaf_at_each_of_its_places() -> None:
    leaf = fl.Linear(1, 1)
    root = fl.Chain(leaf, fl.Chain(leaf), leaf)
    assert kinds(root.walk(fl.Linear)) == ["Linear"] * 3


def test_layers_gives_the_modules_alone() -> None:
    root = tree()
    assert list(root.layers(fl.Linear)) == [module for module, _ in root.walk(fl.Linear)]
    assert len(list(root.layers(Inner))) == 1
    assert len(list(root.layers(Inner, recurse=True))) == 2


def test_find_gives_the_first_or_none() -> None:
    root = tree()
    assert root.find(fl.Linear) is root.Linear
    assert root.find(fl.ReLU) is root.Inner.Inner.ReLU
    assert root.find(fl.Conv2d) is None


def test_ensure_find_says_what_it_could_not_find() -> None:
    assert tree().ensure_find(fl.ReLU).__class__ is fl.ReLU
    with pytest.raises(AssertionError, match="could not find Conv2d") as error:
        tree().ensure_find(fl.Conv2d)
    assert isinstance(error.value, NotFoundError)


def test_layer_takes_a_key_a_position_or_a_path() -> None:
    root = tree()
    assert root.layer("Inner") is root[1]
    assert root.layer(1) is root[1]
    assert root.layer(-1, fl.Residual) is root[2]
    assert root.layer(("Inner", 1, "ReLU"), fl.ReLU) is root.Inner.Inner.ReLU
    assert root.layer(["Inner", "Linear"], fl.Linear) is root.Inner.Linear
    assert root.layer(()) is root


def test_layer_of_another_type_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"Linear.*ReLU|ReLU.*Linear") as error:
        tree().layer(("Inner", "Inner", "ReLU"), fl.Linear)
    assert isinstance(error.value, TreeTypeError)


def test_layer_that_is_not_there_is_an_error_of_its_access() -> None:
    with pytest.raises(KeyError):
        tree().layer("Conv2d")
    with pytest.raises(IndexError):
        tree().layer(9)


def test_find_parent_gives_the_direct_parent_in_the_tree() -> None:
    root = tree()
    assert root.find_parent(root.Linear) is root
    assert root.find_parent(root.Inner.Inner.ReLU) is root.Inner.Inner
    assert root.find_parent(root.Inner.Inner) is root.Inner
    assert root.find_parent(fl.Linear(1, 1)) is None
    assert root.find_parent(root) is None
    assert root.Inner.find_parent(root.Linear) is None


def test_find_parent_of_a_leaf_in_two_trees_answers_for_its_own_tree() -> None:
    leaf = fl.Linear(1, 1)
    first, second = fl.Chain(fl.Chain(leaf)), fl.Chain(fl.Residual(leaf))
    assert first.find_parent(leaf) is first[0]
    assert second.find_parent(leaf) is second[0]


def test_ensure_find_parent_says_what_it_could_not_find() -> None:
    root = tree()
    assert root.ensure_find_parent(root.Inner.Linear) is root.Inner
    with pytest.raises(AssertionError, match="could not find"):
        root.ensure_find_parent(fl.Linear(1, 1))


@pytest.mark.parametrize("move", ["pop", "remove", "replace", "move"])
def test_find_parent_follows_the_edits(move: str) -> None:
    leaf = fl.Linear(1, 1)
    root = fl.Chain(fl.Chain(leaf), fl.Chain())
    assert root.find_parent(leaf) is root[0]
    if move == "replace":
        root[0].replace(leaf, fl.ReLU())
    else:
        root[0].pop() if move == "pop" else root[0].remove(leaf)
    assert root.find_parent(leaf) is None
    root[1].append(leaf)
    assert root.find_parent(leaf) is root[1]
