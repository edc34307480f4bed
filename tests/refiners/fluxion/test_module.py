"""What every node of a tree is: api.md §1."""

import gc
import inspect
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from refiners.errors import ContextError, ParentError, TreeError
from refiners.fluxion import save_to_safetensors
from refiners.fluxion.layers.module import ModuleTree


class Numbers(fl.Module):
    """Has attributes of all kinds."""

    def __init__(
        self, size: int, name: str = "x", ratio: float = 0.5, on: bool = True, dims: tuple[int, ...] = ()
    ) -> None:
        self.size = size
        super().__init__()
        self.on = on
        self.extra = 3
        self.name = name
        self.ratio = ratio
        self.dims = dims
        self._private = 1
        self.tensor = torch.zeros(1)
        self.nothing = None
        self.words = ["a", "b"]
        self.objects = [object()]
        self.mapping = {"a": 1}


class NeverBuilt(fl.Module):
    """Never calls its parent's constructor."""

    def __init__(self, size: int) -> None:
        self.size = size


class Tagged(fl.Module):
    """A leaf with a tag of its own."""

    _tag = "MINE"


def test_a_module_begins_with_what_torch_gives_each_and_shares_none_of_it() -> None:
    own, other, expected = vars(fl.Module()), vars(fl.Module()), vars(nn.Module())
    assert own == expected
    assert all(own[name] is not other[name] for name, value in own.items() if isinstance(value, dict | set))


def test_basic_attributes_are_the_public_scalars_and_their_sequences_in_the_order_they_were_set() -> None:
    assert list(Numbers(1).basic_attributes().items()) == [
        ("size", 1),
        ("on", True),
        ("extra", 3),
        ("name", "x"),
        ("ratio", 0.5),
        ("dims", ()),
        ("words", ["a", "b"]),
    ]


def test_basic_attributes_of_the_constructor_are_those_that_differ_from_their_default() -> None:
    assert Numbers(1).basic_attributes(init_attrs_only=True) == {"size": 1}
    changed = Numbers(1, on=False, dims=(1, 2))
    assert list(changed.basic_attributes(init_attrs_only=True).items()) == [
        ("size", 1),
        ("on", False),
        ("dims", (1, 2)),
    ]


def test_the_text_of_a_module_shows_its_constructor() -> None:
    assert str(Numbers(1, name="y")) == "Numbers(size=1, name=y)"
    assert repr(Numbers(1)) == "Numbers(size=1)"
    assert str(fl.Identity()) == "Identity()"


def test_a_subclass_that_never_calls_the_constructor_has_its_text_and_attributes() -> None:
    assert str(NeverBuilt(3)) == "NeverBuilt(size=3)"
    assert NeverBuilt(3).basic_attributes() == {"size": 3}


def test_the_tag_is_empty_unless_a_class_sets_one() -> None:
    assert fl.Module._tag == ""
    assert fl.Linear(1, 1)._tag == ""
    assert repr(Tagged()) == "(MINE) Tagged()"


def test_torch_state_is_no_attribute_of_a_layer() -> None:
    assert fl.Identity().basic_attributes() == {}


@pytest.mark.parametrize(
    "build",
    [
        lambda: fl.Linear(1, 2),
        lambda: fl.Conv2d(1, 1, 1),
        lambda: fl.ConvTranspose2d(1, 1, 1),
        lambda: fl.Embedding(1, 1),
        lambda: fl.LayerNorm(1),
        lambda: fl.GroupNorm(1, 1),
        lambda: fl.LayerNorm2d(1),
        lambda: fl.Parameter(1),
    ],
    ids=["Linear", "Conv2d", "ConvTranspose2d", "Embedding", "LayerNorm", "GroupNorm", "LayerNorm2d", "Parameter"],
)
def test_a_weighted_module_has_a_device_and_a_dtype_and_shows_them(build: Any) -> None:
    layer = build()
    assert isinstance(layer, fl.WeightedModule)
    assert (layer.device, layer.dtype) == (torch.device("cpu"), torch.float32)
    assert str(layer).endswith("device=cpu, dtype=float32)")
    assert layer.to(dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    "build",
    [
        lambda: fl.InstanceNorm2d(1),
        lambda: fl.MaxPool1d(1),
        lambda: fl.MaxPool2d(1),
        lambda: fl.ReflectionPad2d(1),
        lambda: fl.PixelUnshuffle(2),
        lambda: fl.ReLU(),
    ],
    ids=["InstanceNorm2d", "MaxPool1d", "MaxPool2d", "ReflectionPad2d", "PixelUnshuffle", "ReLU"],
)
def test_a_layer_without_weights_is_not_weighted(build: Any) -> None:
    assert not isinstance(build(), fl.WeightedModule)


def test_to_returns_the_module_and_takes_none() -> None:
    layer = fl.Linear(1, 1)
    assert layer.to() is layer
    assert layer.to(device=None, dtype=None) is layer
    assert layer.to(device=None, dtype=torch.float64) is layer
    assert layer.dtype == torch.float64


def test_to_takes_what_torch_takes() -> None:
    chain = fl.Chain(fl.Linear(1, 1), nn.Linear(1, 1))
    assert chain.to(torch.float64).to("cpu", torch.bfloat16) is chain
    assert {parameter.dtype for parameter in chain.parameters()} == {torch.bfloat16}
    assert chain.to(torch.zeros(1, dtype=torch.float16)).dtype == torch.float16
    assert chain.to("meta").device == torch.device("meta")


def test_load_from_safetensors_loads_and_returns_the_module(tmp_path: Any) -> None:
    source, target = fl.Chain(fl.Linear(2, 2)), fl.Chain(fl.Linear(2, 2))
    save_to_safetensors(tmp_path / "weights.safetensors", source.state_dict())
    assert target.load_from_safetensors(tmp_path / "weights.safetensors") is target
    assert torch.equal(target.Linear.weight, source.Linear.weight)


def test_load_from_safetensors_is_strict_unless_told_otherwise(tmp_path: Any) -> None:
    save_to_safetensors(tmp_path / "weights.safetensors", {"Linear.weight": torch.ones(2, 2)})
    chain = fl.Chain(fl.Linear(2, 2))
    with pytest.raises(RuntimeError, match="Linear.bias"):
        chain.load_from_safetensors(tmp_path / "weights.safetensors")
    chain.load_from_safetensors(tmp_path / "weights.safetensors", strict=False)
    assert torch.equal(chain.Linear.weight, torch.ones(2, 2))


def test_pretty_print_prints_the_tree(capsys: pytest.CaptureFixture[str]) -> None:
    fl.Chain(fl.Chain(fl.Identity())).pretty_print()
    printed = capsys.readouterr().out
    assert [line.strip(" │├└─") for line in printed.splitlines()] == ["(CHAIN)", "(CHAIN)", "Identity()"]


def test_pretty_print_is_cut_below_the_depth(capsys: pytest.CaptureFixture[str]) -> None:
    fl.Chain(fl.Chain(fl.Identity())).pretty_print(depth=1)
    printed = capsys.readouterr().out
    assert "Identity" not in printed
    assert "(CHAIN)" in printed


class Top(fl.Chain):
    """The root of a tree."""


def test_a_path_starts_with_the_class_of_the_root_and_goes_on_with_keys() -> None:
    inner = fl.Chain(fl.Linear(1, 1), fl.Linear(1, 1))
    root = Top(fl.Identity(), fl.Chain(inner))
    assert inner.get_path() == "Top.Chain.Chain"
    assert inner[1].get_path(parent=inner) == "Top.Chain.Chain.Linear_2"
    assert inner[1].get_path(parent=inner, top=root.Chain) == "Chain.Chain.Linear_2"
    assert root.get_path() == "Top"


def test_a_leaf_needs_its_parent_to_have_a_path() -> None:
    root = Top(fl.Linear(1, 1))
    assert root[0].get_path() == "Linear"
    assert root[0].get_path(root) == "Top.Linear"


def test_a_path_in_a_parent_that_does_not_hold_the_module_is_an_error() -> None:
    with pytest.raises(ValueError, match="not in") as error:
        fl.Linear(1, 1).get_path(parent=fl.Chain())
    assert isinstance(error.value, TreeError)


def test_a_node_knows_its_parent_without_registering_it() -> None:
    child = fl.UseContext("a", "b")
    assert child.parent is None
    chain = fl.Chain(child)
    assert child.parent is chain
    assert child.ensure_parent is chain
    assert list(child.modules()) == [child]
    assert list(child.children()) == []


def test_ensure_parent_of_a_root_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no parent") as error:
        _ = fl.Chain().ensure_parent
    assert isinstance(error.value, ParentError)


def test_get_parents_is_nearest_first() -> None:
    leaf = fl.UseContext("a", "b")
    inner = fl.Chain(leaf)
    middle = fl.Chain(inner)
    root = Top(middle)
    assert [id(parent) for parent in leaf.get_parents()] == [id(inner), id(middle), id(root)]
    assert root.get_parents() == []


def test_the_provider_of_a_node_is_its_parents() -> None:
    leaf = fl.UseContext("a", "b")
    chain = fl.Chain(leaf)
    assert leaf.provider is chain.provider


def test_use_context_of_a_node_gives_the_live_dict() -> None:
    leaf = fl.UseContext("a", "b")
    chain = fl.Chain(fl.Chain(leaf))
    chain.set_context("a", {"b": 1})
    assert leaf.use_context("a") == {"b": 1}
    assert chain.Chain.use_context("a") is chain.use_context("a")


def test_use_context_of_an_unknown_name_says_where_and_what_to_do() -> None:
    leaf = fl.UseContext("a", "b")
    chain = Top(leaf)
    with pytest.raises(AssertionError, match=r'"a".*Top.UseContext.*set_context') as error:
        leaf.use_context("a")
    assert isinstance(error.value, ContextError)
    assert chain is leaf.parent


class Node(fl.ContextModule):
    """A node with a number, which may become a child of many."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Any) -> Any:
        return x


def test_structural_copy_of_a_node_has_its_attributes_and_no_parent() -> None:
    node = Node(3)
    chain = fl.Chain(node)
    copied = node.structural_copy()
    assert type(copied) is Node
    assert copied.number == 3
    assert copied.parent is None
    assert node.parent is chain


def test_inside_no_parent_refresh_a_node_keeps_its_parent() -> None:
    node = Node(1)
    first = fl.Chain(node)
    with node.no_parent_refresh():
        second = fl.Chain(node)
        assert node.parent is first
    assert second[0] is node
    assert node.parent is first


def test_no_parent_refresh_ends_when_an_exception_leaves_it() -> None:
    node = Node(1)
    first = fl.Chain(node)
    with pytest.raises(KeyError), node.no_parent_refresh():
        raise KeyError
    first.remove(node)
    assert node.parent is None


def test_no_parent_refresh_nests() -> None:
    node = Node(1)
    first = fl.Chain(node)
    with node.no_parent_refresh():
        with node.no_parent_refresh():
            pass
        assert fl.Chain(node)[0].parent is first


def test_a_child_does_not_keep_its_parent_alive() -> None:
    gc.disable()
    try:
        child = fl.Chain()
        parent = fl.Chain(child)
        dying = ref(parent)
        del parent
        assert dying() is None
        assert child.parent is None
    finally:
        gc.enable()


def test_a_module_tree_has_a_root_and_iterates_over_its_children() -> None:
    tree = ModuleTree(fl.Chain(fl.Identity(), fl.ReLU()))
    assert set(tree.root) == {"value", "class_name", "children"}
    assert tree.root["value"] == "(CHAIN)"
    assert tree.root["class_name"] == "Chain"
    assert [child["class_name"] for child in tree] == ["Identity", "ReLU"]
    assert [child["value"] for child in tree] == ["Identity()", "ReLU()"]


def test_a_long_tree_is_shortened_around_a_line() -> None:
    lines = [str(i) for i in range(100)]
    shortened = ModuleTree.shorten_tree_repr("\n".join(lines), line_index=50, max_lines=20).splitlines()
    assert len(shortened) <= 20
    assert "50" in shortened
    assert ModuleTree.shorten_tree_repr("\n".join(lines[:20]), line_index=3) == "\n".join(lines[:20])
    assert "0" in ModuleTree.shorten_tree_repr("\n".join(lines)).splitlines()


def test_the_signature_of_shorten_tree_repr_is_the_published_one() -> None:
    parameters = inspect.signature(ModuleTree.shorten_tree_repr).parameters
    assert [(name, parameter.default) for name, parameter in parameters.items()][1:] == [
        ("line_index", 0),
        ("max_lines", 20),
    ]
