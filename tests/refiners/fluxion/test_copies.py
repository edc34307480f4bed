"""Copies of a tree: structural_copy, deepcopy, pickle, torch.save. api.md §2, §6, §8; design.md §4."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import SerializationError
from refiners.fluxion.context import Contexts


def double(x: Any) -> Any:
    return x * 2


def push(values: list[Any], x: Any) -> None:
    values.append(x)


class Block(fl.Chain):
    """A Chain with attributes, a context, a bound method and a hook."""

    def __init__(self, depth: int = 2) -> None:
        self.depth = depth
        super().__init__(
            *[fl.Residual(fl.Linear(2, 2)) for _ in range(depth)],
            fl.SetContext("block", "seen", callback=push),
            fl.Lambda(self.scaled),
        )
        self.notes = ["x"]
        self.factor = 1.0

    def init_context(self) -> Contexts:
        return {"block": {"seen": []}}

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.factor + len(self.use_context("block")["seen"])


class Plus(fl.Sum, fl.Adapter[nn.Module]):
    """Adds a second Linear to its target."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Linear(2, 2))


x = torch.linspace(-1, 1, 6).reshape(3, 2)


# --- structural copies ---------------------------------------------------------------------------------------------


def test_a_structural_copy_has_nodes_of_its_own_and_shares_the_leaves() -> None:
    block = Block()
    copied = block.structural_copy()
    assert type(copied) is Block
    assert copied is not block
    assert copied[0] is not block[0]
    assert copied[0].parent is copied
    assert block[0].parent is block
    assert [id(p) for p in copied.parameters()] == [id(p) for p in block.parameters()]
    assert list(copied.state_dict()) == list(block.state_dict())
    assert repr(copied) == repr(block)


def test_a_structural_copy_of_a_child_has_no_parent() -> None:
    root = fl.Chain(Block())
    assert root[0].structural_copy().parent is None


def test_a_structural_copy_computes_the_same() -> None:
    block = Block()
    assert torch.equal(block.structural_copy()(x), block(x))


def test_a_structural_copy_shares_its_public_attributes_by_reference() -> None:
    block = Block()
    copied = block.structural_copy()
    assert copied.notes is block.notes
    assert copied.depth == block.depth


def test_editing_a_structural_copy_leaves_its_source_alone() -> None:
    block = Block()
    before = block(x)
    copied = block.structural_copy()
    copied.pop(0)
    copied[0].append(fl.Linear(2, 2))
    assert list(block._modules) == ["Residual_1", "Residual_2", "SetContext", "Lambda"]
    assert torch.equal(block(x), before)


def test_contexts_of_a_structural_copy_start_from_their_initial_values() -> None:
    block = Block()
    block.set_context("block", {"seen": [1, 2]})
    block.set_context("outside", {"a": 1})
    copied = block.structural_copy()
    assert copied.use_context("block") == {"seen": []}
    assert copied.provider.get_context("outside") is None
    copied.set_context("block", {"seen": [1, 2, 3]})
    assert block.use_context("block") == {"seen": [1, 2]}


def test_a_bound_method_in_a_lambda_is_bound_to_the_copy() -> None:
    block = Block()
    copied = block.structural_copy()
    copied.factor = 0.0
    assert torch.equal(copied(x), torch.ones(3, 2))
    assert not torch.equal(block(x), torch.ones(3, 2))


def test_a_bound_method_in_a_callback_and_in_compose_is_bound_to_the_copy() -> None:
    class Counts(fl.Chain):
        def __init__(self) -> None:
            super().__init__(
                fl.Chain(fl.SetContext("own", "list", callback=self.note)),
                fl.UseContext("own", "list").compose(self.read),
            )
            self.notes: Any = []

        def init_context(self) -> Contexts:
            return {"own": {"list": []}}

        def note(self, values: list[Any], x: Any) -> None:
            self.notes = [*self.notes, x]
            values.append(x)

        def read(self, values: list[Any]) -> Any:
            return (id(self), len(values), self.notes)

    model = Counts()
    copied = model.structural_copy()
    assert copied(5) == (id(copied), 1, [5])
    assert model.notes == []
    assert model(6) == (id(model), 1, [6])


def test_a_bound_method_of_an_inner_chain_is_bound_to_the_copy_of_that_chain() -> None:
    root = fl.Chain(fl.Chain(Block(depth=0)))
    copied = root.structural_copy()
    copied[0][0].factor = 0.0
    assert torch.equal(copied(x), torch.ones(3, 2))
    assert torch.equal(root(x), x + 1)


def test_a_structural_copy_keeps_training_flags_and_hooks() -> None:
    calls: list[int] = []
    block = Block().eval()
    block.train(False)
    block.register_forward_hook(lambda *_: calls.append(1))
    block[0].register_forward_pre_hook(lambda *_: calls.append(2))
    copied = block.structural_copy()
    assert [module.training for module in copied.modules()] == [False] * len(list(copied.modules()))
    copied(x)
    assert calls == [2, 1]


def test_hooks_added_to_a_structural_copy_are_its_own() -> None:
    calls: list[int] = []
    block = Block()
    copied = block.structural_copy()
    copied.register_forward_hook(lambda *_: calls.append(1))
    block(x)
    assert calls == []


def test_a_subclass_is_told_before_and_after_a_structural_copy() -> None:
    events: list[Any] = []

    class Told(fl.Chain):
        def _pre_structural_copy(self) -> None:
            events.append(("pre", self))

        def _post_structural_copy(self, source: Any) -> None:
            events.append(("post", self, source))

    told = Told(fl.Identity())
    copied = told.structural_copy()
    assert events == [("pre", told), ("post", copied, told)]


def test_a_node_that_stands_twice_is_one_node_in_the_copy_too() -> None:
    node = fl.Chain(fl.Linear(2, 2))
    copied = fl.Chain(node, node).structural_copy()
    assert copied[0] is copied[1]
    assert copied[0] is not node


def test_a_structural_copy_of_use_context_has_its_own_parent() -> None:
    root = fl.Chain(fl.UseContext("a", "b"))
    copied = root.structural_copy()
    assert copied[0] is not root[0]
    root.set_context("a", {"b": 1})
    copied.set_context("a", {"b": 2})
    assert (root(), copied()) == (1, 2)


def test_a_structural_copy_keeps_the_adapters_of_leaves_and_shares_their_targets() -> None:
    root = fl.Chain(fl.Linear(2, 2), fl.Chain(fl.Linear(2, 2)))
    adapters = [Plus(linear).inject(parent) for linear, parent in list(root.walk(fl.Linear))]
    copied = root.structural_copy()
    found = list(copied.layers(Plus))
    assert [adapter.target is original.target for adapter, original in zip(found, adapters, strict=True)] == [
        True,
        True,
    ]
    assert [adapter is original for adapter, original in zip(found, adapters, strict=True)] == [False, False]
    assert torch.equal(copied(x), root(x))
    for adapter in found:
        adapter.eject()
    assert list(copied.layers(Plus)) == []
    assert len(list(root.layers(Plus))) == 2
    for adapter in adapters:
        adapter.eject()


def test_a_copied_adapter_reads_the_contexts_of_the_copy() -> None:
    class Reads(fl.Sum, fl.Adapter[fl.Linear]):
        def __init__(self, target: fl.Linear) -> None:
            with self.setup_adapter(target):
                super().__init__(target, fl.UseContext("a", "b"))

    root = fl.Chain(fl.Linear(2, 2))
    before = root(x)
    Reads(root[0]).inject(root)
    copied = root.structural_copy()
    copied.set_context("a", {"b": 1.0})
    assert torch.equal(copied(x), before + 1)


@pytest.mark.parametrize("recurse", [False, True])
def test_a_structural_copy_refuses_adapters_of_chains(recurse: bool) -> None:
    root = fl.Chain(fl.Chain(fl.Linear(2, 2)))
    adapter = Plus(root[0]).inject()
    holder = fl.Chain(root) if recurse else root
    with pytest.raises(RuntimeError, match="eject them first"):
        holder.structural_copy()
    assert torch.equal(root(x), root(x))
    adapter.eject()
    holder.structural_copy()


# --- deepcopy ----------------------------------------------------------------------------------------------------


def test_a_deepcopy_shares_nothing() -> None:
    block = Block()
    copied = copy.deepcopy(block)
    assert torch.equal(copied(x), block(x))
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in block.parameters()}
    assert [child.parent is copied for child in copied if isinstance(child, fl.ContextModule)] == [True] * 3
    copied.pop(0)
    assert len(block) == 4


def test_a_deepcopy_of_a_child_does_not_drag_its_parents_along() -> None:
    root = fl.Chain(Block(), fl.Linear(100, 100))
    copied = copy.deepcopy(root[0])
    assert copied.parent is None
    assert root[0].parent is root


def test_a_deepcopy_works_with_lambdas_and_binds_methods_to_the_copy() -> None:
    block = fl.Chain(fl.Lambda(lambda x: x + 1), Block(depth=0))
    copied = copy.deepcopy(block)
    copied[1].factor = 0.0
    assert torch.equal(copied(x), torch.ones(3, 2))
    assert torch.equal(block(x), x + 2)


def test_a_deepcopy_after_a_forward_with_gradients_works() -> None:
    root = fl.Chain(fl.Linear(2, 2), fl.SetContext("a", "b"))
    root.set_context("a", {"b": root.Linear(x)})
    root(x)
    copied = copy.deepcopy(root)
    assert torch.equal(copied(x), root(x))


def test_a_deepcopy_keeps_contexts_of_its_own() -> None:
    root = fl.Chain(fl.Chain(fl.UseContext("a", "b")))
    root.set_context("a", {"b": [1]})
    copied = copy.deepcopy(root)
    copied.use_context("a")["b"].append(2)
    assert (root(), copied()) == ([1], [1, 2])


@pytest.mark.parametrize("target", [0, 1], ids=["leaf", "chain"])
def test_a_deepcopy_of_an_adapted_model_can_be_ejected_on_its_own(target: int) -> None:
    root = fl.Chain(fl.Linear(2, 2), fl.Chain(fl.Linear(2, 2)))
    before = root(x)
    adapter = Plus(root[target]).inject(root)
    copied = copy.deepcopy(root)
    assert torch.equal(copied(x), root(x))
    copied_adapter = copied.ensure_find(Plus)
    assert copied_adapter.target is copied_adapter[0]
    copied_adapter.eject()
    assert torch.equal(copied(x), before)
    assert root.find(Plus) is adapter
    adapter.eject()
    assert torch.equal(root(x), before)


def test_a_deepcopy_of_a_leaf_shared_by_two_places_shares_it_too() -> None:
    leaf = fl.Linear(2, 2)
    copied = copy.deepcopy(fl.Chain(leaf, fl.Chain(leaf)))
    assert copied[0] is copied[1][0]
    assert copied.find_parent(copied[0]) is copied


def test_a_shallow_copy_leaves_its_source_alone() -> None:
    root = fl.Chain(fl.Linear(2, 2), fl.Chain(fl.UseContext("a", "b")))
    root.set_context("a", {"b": 1})
    copied = copy.copy(root)
    copied.append(fl.ReLU())
    assert len(root) == 2
    assert root[1].parent is root
    assert root(x) == 1


def test_a_lambda_and_a_leaf_can_be_copied_alone() -> None:
    for layer in (fl.Lambda(lambda x: x + 1), fl.UseContext("a", "b").compose(lambda x: x)):
        assert type(copy.copy(layer)) is type(layer)
        assert type(copy.deepcopy(layer)) is type(layer)


# --- pickle ------------------------------------------------------------------------------------------------------


def build() -> fl.Chain:
    return fl.Chain(
        Block(),
        nn.Sequential(nn.Linear(2, 2), fl.Chain(fl.Lambda(torch.tanh))),
        fl.Sum(fl.Lambda(double), fl.UseContext("a", "b").compose(double).compose(torch.sin)),
    )


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_tree_with_functions_of_modules_is_pickled(protocol: int) -> None:
    root = build()
    root.set_context("a", {"b": torch.ones(2)})
    loaded = pickle.loads(pickle.dumps(root, protocol))
    assert torch.equal(loaded(x), root(x))
    assert repr(loaded) == repr(root)
    assert loaded[0].parent is loaded
    assert loaded[0][0].parent is loaded[0]
    loaded.append(fl.Linear(2, 2))
    assert list(loaded._modules) == ["Block", "Sequential", "Sum", "Linear"]


def test_a_child_is_pickled_without_its_parents() -> None:
    root = fl.Chain(fl.Chain(fl.ReLU()), fl.Linear(300, 300))
    data = pickle.dumps(root[0])
    assert len(data) < 20_000
    assert pickle.loads(data).parent is None


def test_a_dirty_tree_is_pickled_with_its_names() -> None:
    root = fl.Chain(fl.Linear(2, 2))
    root.append(fl.Linear(2, 2))
    root.insert(0, fl.ReLU())
    loaded = pickle.loads(pickle.dumps(root))
    assert list(loaded.state_dict()) == ["Linear_1.weight", "Linear_1.bias", "Linear_2.weight", "Linear_2.bias"]


@pytest.mark.parametrize(
    "chain",
    [
        fl.Chain(fl.Chain(fl.Lambda(lambda x: x))),
        fl.Chain(fl.UseContext("a", "b").compose(lambda x: x)),
        fl.Chain(fl.UseContext("a", "b").compose(double).compose(lambda x: x)),
        fl.Chain(fl.SetContext("a", "b", callback=lambda values, x: None)),
    ],
    ids=["Lambda", "compose", "second compose", "callback"],
)
def test_a_users_lambda_is_a_clear_error(chain: fl.Chain) -> None:
    with pytest.raises(pickle.PicklingError, match=r"lambda.*state_dict") as error:
        pickle.dumps(chain)
    assert isinstance(error.value, SerializationError)
    with pytest.raises(SerializationError):
        torch.save(chain, io.BytesIO())


def test_a_whole_tree_is_saved_and_loaded_by_torch() -> None:
    root = build()
    root.set_context("a", {"b": torch.ones(2)})
    buffer = io.BytesIO()
    torch.save(root, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(x), root(x))
    loaded[0].pop(0)
    loaded[0].insert(0, fl.Linear(2, 2))
    assert loaded[0][0] in loaded[0]


def test_an_adapted_tree_is_pickled_and_can_be_ejected() -> None:
    root = fl.Chain(fl.Linear(2, 2), fl.Chain(fl.Linear(2, 2)))
    before = root(x)
    for target in (root[0], root[1]):
        Plus(target).inject(root)
    loaded = pickle.loads(pickle.dumps(root))
    assert torch.equal(loaded(x), root(x))
    for adapter in list(loaded.layers(Plus)):
        adapter.eject()
    assert torch.equal(loaded(x), before)
    assert list(loaded._modules) == ["Linear", "Chain"]


def test_weights_saved_by_torch_are_loaded_with_weights_only() -> None:
    root, other = build(), build()
    buffer = io.BytesIO()
    torch.save(root.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for chain in (root, other):
        chain.set_context("a", {"b": torch.ones(2)})
    assert torch.equal(root(x), other(x))
