"""Attaching LoRAs that come from files: by name where keys are paths, in walk order otherwise, and all or none."""

import pytest
import torch

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError
from refiners.fluxion.adapters import Conv2dLora, LinearLora, Lora, LoraAdapter, auto_attach_loras, inject_loras


class Attention(fl.Chain):
    pass


class Encoder(fl.Chain):
    pass


def model() -> fl.Chain:
    return fl.Chain(
        Encoder(Attention(fl.Linear(4, 4), fl.Linear(4, 4)), fl.Linear(4, 4)),
        Attention(fl.Linear(4, 4), fl.Linear(4, 8)),
        fl.Conv2d(1, 1, kernel_size=3, padding=1),
    )


def loras(*keys: str, out_features: int = 4) -> dict[str, Lora]:
    return {key: LinearLora("style", 4, out_features, rank=1) for key in keys}


def adapted(tree: fl.Chain) -> list[str]:
    return [adapter.get_path() for adapter in tree.layers(LoraAdapter)]


def test_keys_that_say_nothing_attach_in_walk_order() -> None:
    tree, debug_map = model(), []
    assert auto_attach_loras(loras("k0", "k1", "k2", "k3"), tree, debug_map=debug_map) == []
    assert debug_map == [
        ("k0", "Encoder.Attention.LoraAdapter_1"),
        ("k1", "Encoder.Attention.LoraAdapter_2"),
        ("k2", "Encoder.LoraAdapter"),
        ("k3", "Attention.LoraAdapter"),
    ]


def test_each_lora_goes_to_a_layer_of_its_shape() -> None:
    tree = model()
    given = {"wide": LinearLora("style", 4, 8), "image": Conv2dLora("style", 1, 1), **loras("first")}
    assert auto_attach_loras(given, tree, sanity_check=False) == []
    assert given["wide"].parent is tree.layer(("Attention", "LoraAdapter"))
    assert given["image"].parent is tree["LoraAdapter"]


@pytest.mark.parametrize("prefix", ["", "Chain."])
def test_keys_that_are_paths_attach_by_name(prefix: str) -> None:
    tree = model()
    given = loras(f"{prefix}Attention.Linear_1", f"{prefix}Encoder.Linear")
    assert auto_attach_loras(given, tree) == []
    assert adapted(tree) == ["Chain.Encoder.LoraAdapter", "Chain.Attention.LoraAdapter"]
    assert given[f"{prefix}Encoder.Linear"].parent is tree.layer(("Encoder", "LoraAdapter"))


def test_names_are_those_of_the_base_while_other_adapters_are_in() -> None:
    tree = model()
    others = inject_loras(tree, name="other", rank=1)
    given = loras("Encoder.Attention.Linear_2")
    assert auto_attach_loras(given, tree) == []
    assert tree.layer(("Encoder", "Attention", "LoraAdapter_2"), LoraAdapter).names == ["other", "style"]
    others.eject()
    assert adapted(tree) == ["Chain.Encoder.Attention.LoraAdapter"]


def test_the_first_layers_are_not_taken_for_those_that_are_named() -> None:
    # Of layers 1, 3 and 4 the original attached to 1, 2 and 3.
    tree = fl.Chain(fl.Linear(4, 4) for _ in range(4))
    auto_attach_loras(loras("Linear_1", "Linear_3", "Linear_4"), tree)
    assert [type(child) for child in tree] == [LoraAdapter, fl.Linear, LoraAdapter, LoraAdapter]


def test_the_sanity_check_refuses_what_order_cannot_tell_and_leaves_the_model_alone() -> None:
    tree = model()
    before = repr(tree)
    with pytest.raises(ValueError, match="get none, and would fit too: Attention.Linear_1") as error:
        auto_attach_loras(loras("k0", "k1", "k2"), tree)
    assert "was not touched" in str(error.value)
    with pytest.raises(AdapterError, match="fit nowhere: k4"):
        auto_attach_loras(loras("k0", "k1", "k2", "k3", "k4"), tree)
    with pytest.raises(AdapterError, match="fit nowhere: Encoder.Nowhere"):
        auto_attach_loras(loras("Encoder.Linear", "Encoder.Nowhere"), tree)
    with pytest.raises(AdapterError, match="fit nowhere: Attention.Linear_2"):
        auto_attach_loras(loras("Attention.Linear_2"), tree)
    assert repr(tree) == before


def test_without_the_sanity_check_the_failed_keys_are_returned() -> None:
    tree = model()
    assert auto_attach_loras(loras("k0", "k1", "k2", "k3", "k4"), tree, sanity_check=False) == ["k4"]
    assert auto_attach_loras(loras("k0"), tree, sanity_check=False) == ["k0"]
    assert len(adapted(tree)) == 4


def test_include_and_exclude_name_classes_above() -> None:
    tree = model()
    assert auto_attach_loras(loras("k0", "k1", "k2"), tree, include=["Attention"]) == []
    assert auto_attach_loras(loras("k3"), tree, exclude=["Attention"]) == []
    assert len(adapted(tree)) == 4
    other = {key: LinearLora("other", 4, 4) for key in ("k0",)}
    assert auto_attach_loras(other, tree, include=["Attention"], exclude=["Encoder"]) == []
    assert tree.layer(("Attention", "LoraAdapter"), LoraAdapter).names == ["style", "other"]
    assert auto_attach_loras(loras("k4"), tree, include=["Decoder"], sanity_check=False) == ["k4"]


def test_two_names_share_the_adapter_of_a_layer() -> None:
    tree = fl.Chain(fl.Linear(4, 4), fl.Linear(4, 4))
    auto_attach_loras(loras("k0", "k1"), tree)
    auto_attach_loras({key: LinearLora("other", 4, 4) for key in ("k0", "k1")}, tree)
    assert [child.names for child in tree] == [["style", "other"], ["style", "other"]]


def test_two_names_in_one_call_share_the_adapter_of_a_layer() -> None:
    tree = fl.Chain(fl.Linear(4, 4))
    auto_attach_loras({"a": LinearLora("a", 4, 4), "b": LinearLora("b", 4, 4)}, tree)
    assert tree["LoraAdapter"].names == ["a", "b"]


def test_a_layer_in_two_places_takes_one_lora() -> None:
    shared = fl.Linear(4, 4)
    tree = fl.Chain(shared, fl.Chain(shared), fl.Linear(4, 4))
    auto_attach_loras(loras("k0", "k1"), tree)
    assert [adapter.names for adapter in tree.layers(LoraAdapter)] == [["style"]] * 3
    assert tree[0].loras["style"].down is tree[1][0].loras["style"].down


def test_auto_attach_gives_the_adapter_and_where_to_inject_it() -> None:
    tree = model()
    lora = LinearLora("style", 4, 8)
    adapter, parent = lora.auto_attach(tree)
    assert adapter.target is tree.layer(("Attention", "Linear_2"))
    assert parent is tree["Attention"]
    assert adapted(tree) == []
    adapter.inject(parent)
    assert LinearLora("style", 4, 8).auto_attach(tree) is None
    second = LinearLora("second", 4, 8)
    assert second.auto_attach(tree) == (adapter, None)
    assert adapter.names == ["style", "second"]
    assert LinearLora("third", 4, 8).auto_attach(tree, include=["Encoder"]) is None
    assert LinearLora("third", 4, 8).auto_attach(tree, exclude=["Attention"]) is None


def test_a_failure_while_attaching_undoes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = model()
    before = repr(tree)
    calls = 0
    inject = LoraAdapter.inject

    def fail_at_the_third(self: LoraAdapter, parent: fl.Chain | None = None) -> LoraAdapter:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("stop")
        return inject(self, parent)

    monkeypatch.setattr(LoraAdapter, "inject", fail_at_the_third)
    with pytest.raises(RuntimeError, match="stop"):
        auto_attach_loras(loras("k0", "k1", "k2", "k3"), tree)
    assert repr(tree) == before


def test_the_number_of_steps_is_linear_in_the_number_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    is_compatible = LinearLora.is_compatible

    def count(self: LinearLora, layer: torch.nn.Module, /) -> bool:
        nonlocal asked
        asked += 1
        return is_compatible(self, layer)

    monkeypatch.setattr(LinearLora, "is_compatible", count)

    def steps(n: int) -> int:
        nonlocal asked
        asked = 0
        tree = fl.Chain(fl.Linear(4, 4, device="meta") for _ in range(n))
        auto_attach_loras({f"k{i}": LinearLora("style", 4, 4, device="meta") for i in range(n)}, tree)
        return asked

    assert steps(100) == 2 * steps(50)


def test_a_tree_without_layers_takes_none() -> None:
    assert auto_attach_loras(loras("k0"), fl.Chain(), sanity_check=False) == ["k0"]
    with pytest.raises(AdapterError, match="0 of 1 LoRAs"):
        auto_attach_loras(loras("k0"), fl.Chain())
