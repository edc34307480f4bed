"""Access to children, and edits of a tree: api.md §2 and §9.1."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from refiners.errors import TreeError, TreeIndexError, TreeKeyError, TreeTypeError


def three() -> fl.Chain:
    return fl.Chain(fl.Identity(), fl.ReLU(), fl.SiLU())


def kinds(chain: fl.Chain) -> list[str]:
    return [type(module).__name__ for module in chain]


# --- access ------------------------------------------------------------------------------------------------------


def test_a_child_is_found_by_position_key_and_attribute() -> None:
    chain = fl.Chain(fl.Linear(1, 1), fl.Linear(1, 1))
    assert chain[1] is chain[-1] is chain["Linear_2"] is chain.Linear_2
    assert len(chain) == 2
    assert list(chain) == [chain.Linear_1, chain.Linear_2]


def test_a_missing_child_is_an_error_of_the_kind_that_access_has() -> None:
    chain = three()
    with pytest.raises(KeyError, match="Linear_2.*Identity, ReLU, SiLU") as key_error:
        chain["Linear_2"]
    assert isinstance(key_error.value, TreeKeyError)
    with pytest.raises(AttributeError, match="Linear_2"):
        _ = chain.Linear_2
    with pytest.raises(IndexError, match="out of range"):
        chain[3]


def test_membership_is_identity() -> None:
    linear = fl.Linear(1, 1)
    chain = fl.Chain(linear, fl.Chain(fl.ReLU()))
    assert linear in chain
    assert fl.Linear(1, 1) not in chain
    assert chain[1][0] not in chain
    assert "Linear" not in chain
    assert 1 not in chain


def test_children_can_neither_be_assigned_nor_deleted_by_position() -> None:
    chain: Any = three()
    with pytest.raises((TypeError, AttributeError)):
        chain[0] = fl.Identity()
    with pytest.raises((TypeError, AttributeError)):
        del chain[0]
    assert len(chain) == 3


@pytest.mark.parametrize("name", ["new", "ReLU"])
def test_assigning_a_module_says_to_use_an_edit_method(name: str) -> None:
    chain = three()
    with pytest.raises(ValueError, match="append") as error:
        setattr(chain, name, fl.Linear(1, 1))
    assert isinstance(error.value, TreeError)
    assert kinds(chain) == ["Identity", "ReLU", "SiLU"]


def test_a_child_cannot_be_deleted_overwritten_or_added_by_hand() -> None:
    chain: Any = three()
    for edit in (
        lambda: delattr(chain, "ReLU"),
        lambda: setattr(chain, "ReLU", None),
        lambda: chain.add_module("x", nn.Identity()),
        lambda: chain.register_module("x", nn.Identity()),
    ):
        with pytest.raises(ValueError):
            edit()
    assert kinds(chain) == ["Identity", "ReLU", "SiLU"]


def test_a_parameter_attribute_is_allowed_and_trained() -> None:
    class Scaled(fl.Chain):
        def __init__(self) -> None:
            super().__init__(fl.Identity())
            self.scale = nn.Parameter(torch.ones(1))
            self.register_buffer("shift", torch.zeros(1))

    assert list(Scaled().state_dict()) == ["scale", "shift"]
    assert [name for name, _ in Scaled().named_parameters()] == ["scale"]
    assert Scaled().structural_copy().scale.shape == (1,)


def test_a_module_in_a_list_is_no_child() -> None:
    class Holder(fl.Chain):
        def __init__(self) -> None:
            super().__init__(fl.Identity())
            self.others = [fl.Linear(1, 1)]

    assert list(Holder().parameters()) == []


# --- slices ------------------------------------------------------------------------------------------------------


class Block(fl.Chain):
    """Has an attribute and a context."""

    def __init__(self, depth: int = 4) -> None:
        self.depth = depth
        super().__init__(fl.Chain(fl.Linear(1, 1)) for _ in range(depth))
        self.notes = ["x"]

    def init_context(self) -> dict[str, dict[str, Any]]:
        return {"block": {"seen": 0}}


def test_a_slice_is_a_structural_copy_of_the_same_class() -> None:
    block = Block()
    part = block[1:3]
    assert type(part) is Block
    assert list(part._modules) == ["Chain_1", "Chain_2"]
    assert part.notes is block.notes
    assert part.depth == 4
    assert part[0] is not block[1]
    assert part[0][0] is block[1][0]
    assert part[0].parent is part
    assert part.parent is None
    assert block[1].parent is block
    assert part.use_context("block") == {"seen": 0}


def test_slices_follow_python() -> None:
    chain = three()
    assert kinds(chain[::-1]) == ["SiLU", "ReLU", "Identity"]
    assert kinds(chain[-1:]) == ["SiLU"]
    assert kinds(chain[5:]) == []
    assert kinds(chain[::2]) == ["Identity", "SiLU"]
    assert kinds(chain) == ["Identity", "ReLU", "SiLU"]
    assert chain[::-1][0] is chain[2]


def test_a_slice_can_be_edited_without_touching_its_source() -> None:
    chain = three()
    part = chain[:2]
    part.pop()
    part.append(fl.Linear(1, 1))
    assert kinds(chain) == ["Identity", "ReLU", "SiLU"]


# --- insert and append -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "position"),
    [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3), (100, 3), (-1, 3), (-2, 2), (-3, 1), (-4, 0), (-5, 0), (-100, 0)],
)
def test_insert_counts_from_the_end_with_minus_one_appending(index: int, position: int) -> None:
    chain = three()
    chain.insert(index, fl.Sigmoid())
    assert kinds(chain).index("Sigmoid") == position
    assert len(chain) == 4


def test_insert_into_an_empty_chain() -> None:
    for index in (0, 1, -1, -2):
        chain = fl.Chain()
        chain.insert(index, fl.ReLU())
        assert kinds(chain) == ["ReLU"]


def test_append_and_insert_make_the_chain_the_parent() -> None:
    chain, first, second = fl.Chain(fl.Identity()), fl.Chain(), fl.UseContext("a", "b")
    chain.append(first)
    chain.insert(0, second)
    assert first.parent is chain
    assert second.parent is chain


def test_insert_before_and_after_the_first_of_a_type() -> None:
    chain = fl.Chain(fl.Identity(), fl.ReLU(), fl.ReLU())
    chain.insert_before_type(fl.ReLU, fl.Sin())
    chain.insert_after_type(fl.ReLU, fl.Cos())
    assert kinds(chain) == ["Identity", "Sin", "ReLU", "Cos", "ReLU"]


@pytest.mark.parametrize("method", ["insert_before_type", "insert_after_type"])
def test_inserting_next_to_a_type_that_is_not_there_is_an_error(method: str) -> None:
    chain = fl.Chain(fl.Chain(fl.ReLU()))
    with pytest.raises(ValueError, match="ReLU"):
        getattr(chain, method)(fl.ReLU, fl.Sin())
    assert kinds(chain) == ["Chain"]


@pytest.mark.parametrize("edit", ["append", "insert", "replace"])
@pytest.mark.parametrize("not_a_module", [1, None, nn.Identity, len], ids=repr)
def test_an_edit_refuses_what_is_no_module(edit: str, not_a_module: Any) -> None:
    chain = three()
    edits: dict[str, Callable[[], None]] = {
        "append": lambda: chain.append(not_a_module),
        "insert": lambda: chain.insert(0, not_a_module),
        "replace": lambda: chain.replace(chain[0], not_a_module),
    }
    with pytest.raises(TypeError, match="takes modules") as error:
        edits[edit]()
    assert isinstance(error.value, TreeTypeError)
    assert kinds(chain) == ["Identity", "ReLU", "SiLU"]


@pytest.mark.parametrize("index", ["a", None, 1.5], ids=repr)
def test_an_insert_at_no_position_changes_nothing(index: Any) -> None:
    first, second = fl.Chain(fl.Chain()), three()
    with pytest.raises(TypeError):
        second.insert(index, first[0])
    assert kinds(first) == ["Chain"]
    assert kinds(second) == ["Identity", "ReLU", "SiLU"]


# --- pop, remove, replace ----------------------------------------------------------------------------------------


def test_pop_returns_the_child_and_takes_its_parent_from_it() -> None:
    child = fl.Chain()
    chain = fl.Chain(fl.Identity(), child)
    assert chain.pop() is child
    assert child.parent is None
    assert chain.pop(0).__class__ is fl.Identity
    assert len(chain) == 0


@pytest.mark.parametrize("index", [3, -4, 100])
def test_pop_out_of_range_is_an_index_error(index: int) -> None:
    chain = three()
    with pytest.raises(IndexError, match=r"Index out of range\.") as error:
        chain.pop(index)
    assert isinstance(error.value, TreeIndexError)
    assert len(chain) == 3


def test_pop_from_an_empty_chain_is_an_index_error() -> None:
    with pytest.raises(IndexError, match=r"Index out of range\."):
        fl.Chain().pop()


def test_remove_takes_the_child_out() -> None:
    child = fl.Chain()
    chain = fl.Chain(fl.Identity(), child, fl.ReLU())
    chain.remove(child)
    assert kinds(chain) == ["Identity", "ReLU"]
    assert child.parent is None
    with pytest.raises(ValueError, match="is not in"):
        chain.remove(child)


def test_remove_of_a_grandchild_is_an_error() -> None:
    chain = fl.Chain(fl.Chain(fl.ReLU()))
    with pytest.raises(ValueError, match="is not in"):
        chain.remove(chain[0][0])


def test_remove_of_a_child_that_occurs_twice_takes_the_first() -> None:
    leaf = fl.Linear(1, 1)
    chain = fl.Chain(leaf, fl.ReLU(), leaf)
    chain.remove(leaf)
    assert kinds(chain) == ["ReLU", "Linear"]


def test_a_node_that_occurs_twice_keeps_its_parent_until_its_last_place_is_gone() -> None:
    node = fl.Chain()
    chain = fl.Chain(node, node)
    chain.pop()
    assert node.parent is chain
    chain.pop()
    assert node.parent is None


def test_replace_changes_place_and_parents() -> None:
    old, new = fl.Chain(), fl.Residual()
    chain = fl.Chain(fl.Identity(), old)
    chain.replace(old, new)
    assert kinds(chain) == ["Identity", "Residual"]
    assert old.parent is None
    assert new.parent is chain


def test_replace_gives_the_old_module_the_parent_it_is_told() -> None:
    old, new = fl.Chain(), fl.Chain()
    chain, other = fl.Chain(old), fl.Chain()
    chain.replace(old, new, old_module_parent=other)
    assert old.parent is other


def test_replace_of_a_module_that_is_not_there_is_an_error() -> None:
    chain, new = three(), fl.Chain()
    with pytest.raises(ValueError, match="is not in"):
        chain.replace(fl.Identity(), new)
    assert new.parent is None


def test_contexts_reach_a_replacement() -> None:
    chain = fl.Chain(fl.Identity())
    chain.set_context("a", {"b": 5})
    chain.replace(chain[0], fl.Chain(fl.UseContext("a", "b")))
    assert chain(0) == 5


def test_replace_with_itself_changes_nothing() -> None:
    node = fl.Chain()
    chain = fl.Chain(node)
    chain.replace(node, node)
    assert list(chain) == [node]
    assert node.parent is chain


def test_replace_with_a_brother_puts_it_in_both_places() -> None:
    first, second = fl.Chain(), fl.Chain()
    chain = fl.Chain(first, second)
    chain.replace(first, second)
    assert list(chain) == [second, second]
    assert first.parent is None
    assert second.parent is chain


# --- moves and cycles --------------------------------------------------------------------------------------------


def test_a_module_that_is_appended_elsewhere_moves() -> None:
    node = fl.Chain(fl.Identity())
    first, second = fl.Chain(node, fl.ReLU()), fl.Chain()
    second.append(node)
    assert kinds(first) == ["ReLU"]
    assert node.parent is second
    first.insert(0, node)
    assert kinds(second) == []
    first.replace(first[1], first.pop(0))
    assert kinds(first) == ["Chain"]


def test_a_replacement_from_another_tree_moves() -> None:
    node = fl.Chain()
    first, second = fl.Chain(node), three()
    second.replace(second[1], node)
    assert kinds(first) == []
    assert node.parent is second


def test_a_child_may_move_up_and_down_in_its_own_tree() -> None:
    deep = fl.Chain(fl.ReLU())
    middle = fl.Chain(deep)
    root = fl.Chain(middle, fl.Chain())
    root.append(deep)
    assert kinds(middle) == []
    assert deep.parent is root
    root[1].append(middle)
    assert kinds(root) == ["Chain", "Chain"]


@pytest.mark.parametrize("above", [0, 1, 2])
def test_a_cycle_is_refused(above: int) -> None:
    leaf = fl.Chain(fl.Identity())
    parents = [leaf, fl.Chain(leaf)]
    parents.append(fl.Chain(parents[1]))
    for edit in (leaf.append, lambda m: leaf.insert(0, m), lambda m: leaf.replace(leaf[0], m)):
        with pytest.raises(ValueError, match="cycle"):
            edit(parents[above])
    assert kinds(leaf) == ["Identity"]
    assert leaf.parent is parents[1]


def test_a_cycle_through_a_plain_module_is_refused() -> None:
    chain = fl.Chain()
    with pytest.raises(ValueError, match="cycle"):
        chain.append(nn.Sequential(chain))
    assert len(chain) == 0


def test_two_thousand_appends_name_every_child_in_order() -> None:
    chain = fl.Chain()
    for _ in range(2000):
        chain.append(fl.Identity())
    assert list(chain._modules)[::999] == ["Identity_1", "Identity_1000", "Identity_1999"]


def test_a_chain_may_be_edited_while_it_is_iterated() -> None:
    chain = three()
    for module in chain:
        chain.remove(module)
    assert len(chain) == 0


def test_an_edit_during_a_forward_shows_in_the_next_one() -> None:
    def grow(x: int) -> int:
        if len(chain) < 3:
            chain.insert(0, fl.Lambda(lambda x: x + 10))
        return x + 1

    chain = fl.Chain(fl.Lambda(grow))
    chain(0)
    assert chain(0) == 11


def test_a_layer_may_append_to_the_chain_that_runs_it() -> None:
    chain = fl.Chain(fl.Lambda(lambda x: (chain.append(fl.Lambda(lambda x: x + 1)), x)[1]))
    assert [chain(0), chain(0), len(chain)] == [0, 1, 3]
