"""Sets of LoRAs: injected through a selection in one call, held as one object, ejected in any order."""

import gc

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError, ConversionError, LoraNameError, SelectionError
from refiners.fluxion.adapters import (
    LinearLora,
    Lora,
    LoraAdapter,
    LoraSet,
    auto_attach_loras,
    base_state_dict,
    inject_loras,
)
from refiners.fluxion.selectors import select


class Attention(fl.Chain):
    pass


def model() -> fl.Chain:
    return fl.Chain(
        fl.Residual(Attention(fl.Linear(4, 4), fl.ReLU(), fl.Linear(4, 4))),
        fl.Residual(Attention(fl.Linear(4, 4), fl.ReLU(), fl.Linear(4, 4))),
        fl.Linear(4, 4),
        fl.Unsqueeze(1),
        fl.Unsqueeze(1),
        fl.Conv2d(1, 2, kernel_size=3, padding=1),
    )


def train_a_little(loras: LoraSet) -> None:
    for lora in loras.loras:
        nn.init.normal_(lora.up.weight)


def test_a_model_stands_for_all_its_linear_layers() -> None:
    tree = model()
    loras = inject_loras(tree, name="style", rank=2)
    assert len(loras) == len(loras.adapters) == len(loras.loras) == 5
    assert all(adapter.parent is not None for adapter in loras.adapters)
    assert [adapter.target for adapter in loras.adapters] == list(select(tree).of(fl.Linear).outside(Lora))


def test_a_selection_says_which_layers() -> None:
    tree = model()
    loras = inject_loras(select(tree).of(fl.Linear, fl.Conv2d).outside(Attention).expect(2), name="style", rank=2)
    assert [type(lora).__name__ for lora in loras.loras] == ["LinearLora", "Conv2dLora"]


def test_outputs_change_with_the_scale_and_scale_0_is_the_base() -> None:
    tree, x = model(), torch.randn(3, 4)
    base = tree(x)
    loras = inject_loras(tree, name="style", rank=2, alpha=4)
    assert torch.equal(tree(x), base)
    train_a_little(loras)
    full = tree(x)
    assert not torch.equal(full, base)
    loras.scale = 0.0
    assert torch.equal(tree(x), base)
    loras.scale = 1.0
    assert torch.equal(tree(x), full)
    loras.eject()
    assert torch.equal(tree(x), base)


def test_loras_take_device_dtype_and_training_mode_of_each_layer() -> None:
    tree = fl.Chain(fl.Linear(4, 4, dtype=torch.bfloat16).eval(), fl.Linear(4, 4, device="meta"))
    first, second = inject_loras(tree, name="style", rank=2).loras
    assert (first.down.weight.dtype, first.training) == (torch.bfloat16, False)
    assert (second.up.weight.device.type, second.training) == ("meta", True)


def test_sets_share_the_adapter_of_a_layer_and_leave_in_any_order() -> None:
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1]):
        tree, x = model(), torch.randn(2, 4)
        picture, base = repr(tree), tree(x)
        sets = [inject_loras(tree, name=name, rank=1) for name in ("a", "b", "c")]
        assert {tuple(adapter.names) for adapter in tree.layers(LoraAdapter)} == {("a", "b", "c")}
        assert len(list(tree.layers(LoraAdapter, recurse=True))) == 5
        for i in order:
            sets[i].eject()
        assert repr(tree) == picture
        assert torch.equal(tree(x), base)


def test_an_adapter_built_by_hand_is_not_shared() -> None:
    tree, x = fl.Chain(fl.Linear(4, 4)), torch.randn(2, 4)
    mine = LoraAdapter(tree[0], LinearLora("mine", 4, 4)).inject(tree)
    loras = inject_loras(tree, name="style", rank=1)
    train_a_little(loras)
    mine.eject()
    assert tree["LoraAdapter"].names == ["style"]
    changed = tree(x)
    loras.eject()
    assert not torch.equal(tree(x), changed)


def test_a_set_joins_what_was_attached_from_a_file() -> None:
    tree = fl.Chain(fl.Linear(4, 4))
    auto_attach_loras({"Linear": LinearLora("file", 4, 4)}, tree)
    loras = inject_loras(tree, name="style", rank=1)
    assert tree[0].names == ["file", "style"]
    loras.eject()
    assert tree[0].names == ["file"]


def test_a_set_on_a_layer_in_two_places_adapts_both() -> None:
    shared = fl.Linear(4, 4)
    tree = fl.Chain(fl.Chain(shared), shared)
    first, second = inject_loras(tree, name="a", rank=1), inject_loras(tree, name="b", rank=1)
    assert (len(first), len(second)) == (1, 1)
    first.eject()
    assert [adapter.names for adapter in tree.layers(LoraAdapter)] == [["b"], ["b"]]
    second.eject()
    assert tree[0][0] is tree[1] is shared


def test_a_selection_of_one_place_adapts_that_place_only() -> None:
    shared = fl.Linear(4, 4)
    tree = fl.Chain(Attention(shared), shared)
    loras = inject_loras(select(tree).of(fl.Linear).inside(Attention), name="a", rank=1)
    assert isinstance(tree[0][0], LoraAdapter)
    assert tree[1] is shared
    loras.eject()


def test_a_selection_of_some_of_several_places_is_refused() -> None:
    shared = fl.Linear(4, 4)
    tree = fl.Chain(Attention(shared), Attention(shared), fl.Residual(shared))
    with pytest.raises(AdapterError, match="more Chains than are selected"):
        inject_loras(select(tree).of(fl.Linear).inside(Attention), name="a")
    inject_loras(tree, name="a").eject()


def test_a_name_that_is_taken_is_refused_and_nothing_changes() -> None:
    tree = model()
    inject_loras(select(tree).at("Linear"), name="style", rank=1)
    before = repr(tree)
    with pytest.raises(LoraNameError):
        inject_loras(tree, name="style", rank=1)
    assert repr(tree) == before


def test_layers_without_a_form_are_refused_and_nothing_changes() -> None:
    tree = model()
    before = repr(tree)
    with pytest.raises(AdapterError, match="is not made for ReLU"):
        inject_loras(select(tree).of(fl.Linear, fl.ReLU), name="style")
    with pytest.raises(SelectionError, match="found no modules"):
        inject_loras(select(tree).of(fl.Embedding), name="style")
    plain = fl.Chain(fl.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(AdapterError, match="stands in Sequential, which is no Chain"):
        inject_loras(plain, name="style")
    assert repr(tree) == before
    assert isinstance(plain[0], fl.Linear)


@pytest.mark.parametrize("step", range(5))
def test_a_failure_half_way_leaves_the_model_as_it_was(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = model()
    other = inject_loras(select(tree).inside(Attention).of(fl.Linear), name="other", rank=1)
    before = repr(tree), list(tree.state_dict()), [id(module) for module in tree.modules()]
    calls = 0
    for_target = Lora.for_target.__func__

    def fail(cls: type[Lora], *args: object, **kwargs: object) -> Lora:
        nonlocal calls
        calls += 1
        if calls > step:
            raise KeyboardInterrupt
        return for_target(cls, *args, **kwargs)

    monkeypatch.setattr(Lora, "for_target", classmethod(fail))
    with pytest.raises(KeyboardInterrupt):
        inject_loras(tree, name="style", rank=1)
    assert (repr(tree), list(tree.state_dict()), [id(module) for module in tree.modules()]) == before
    assert gc.isenabled()
    other.eject()


def test_ejecting_twice_is_refused() -> None:
    loras = inject_loras(model(), name="style", rank=1)
    loras.eject()
    with pytest.raises(AdapterError, match="not injected any more"):
        loras.eject()


def test_a_set_leaves_out_what_has_left_before() -> None:
    tree = model()
    picture = repr(tree)
    loras = inject_loras(tree, name="style", rank=1)
    loras.adapters[0].eject()
    loras.eject()
    assert repr(tree) == picture


def test_scales_that_differ_have_no_common_value() -> None:
    loras = inject_loras(model(), name="style", rank=1, scale=0.5)
    assert loras.scale == 0.5
    loras.loras[0].scale = 2.0
    with pytest.raises(AdapterError, match=r"several scales: \[0.5, 2.0\]"):
        _ = loras.scale
    loras.scale = 1.5
    assert loras.scale == 1.5


def test_the_state_has_the_paths_of_the_base_and_comes_back_by_name() -> None:
    tree, x = model(), torch.randn(2, 4)
    other = inject_loras(tree, name="other", rank=1)
    loras = inject_loras(tree, name="style", rank=2, alpha=3)
    train_a_little(loras)
    train_a_little(other)
    other.eject()
    expected, state = tree(x), loras.state_dict()
    assert list(state)[:3] == [
        f"Residual_1.Attention.Linear_1.{name}" for name in ("down.weight", "up.weight", "alpha")
    ]
    loras.eject()
    assert auto_attach_loras(Lora.from_dict("style", state), tree) == []
    assert torch.equal(tree(x), expected)


def test_other_weights_of_the_same_shapes_are_copied_in() -> None:
    tree, x = model(), torch.randn(2, 4)
    loras = inject_loras(tree, name="style", rank=2, alpha=3)
    train_a_little(loras)
    state = {key: tensor.clone() for key, tensor in loras.state_dict().items()}
    expected, parameters = tree(x), list(loras.parameters())
    for parameter in parameters:
        nn.init.normal_(parameter)
    loras.load_state_dict({key: tensor * 2 if key.endswith("alpha") else tensor for key, tensor in state.items()})
    loras.scale = 0.5
    assert torch.equal(tree(x), expected)
    assert all(new is old for new, old in zip(loras.parameters(), parameters, strict=True))


def test_a_state_that_does_not_fit_is_refused_with_all_its_faults() -> None:
    loras = inject_loras(model(), name="style", rank=2)
    state = {key: tensor.clone() for key, tensor in loras.state_dict().items()}
    before = [parameter.clone() for parameter in loras.parameters()]
    del state["Linear.down.weight"], state["Linear.up.weight"]
    state |= {"Extra.down.weight": torch.ones(1, 1), "Extra.up.weight": torch.ones(1, 1)}
    state["Residual_1.Attention.Linear_1.up.weight"] = torch.ones(7, 2)
    with pytest.raises(ConversionError, match="nothing was loaded") as error:
        loras.load_state_dict(state)
    for line in ("Linear: missing", "Extra: unexpected", "Residual_1.Attention.Linear_1: down and up of shapes"):
        assert line in str(error.value)
    assert all(torch.equal(new, old) for new, old in zip(loras.parameters(), before, strict=True))


def test_the_keys_of_the_base_do_not_change() -> None:
    tree = model()
    before = [(key, tensor.data_ptr()) for key, tensor in tree.state_dict().items()]
    inject_loras(select(tree).of(fl.Linear, fl.Conv2d), name="style", rank=2)
    assert [(key, tensor.data_ptr()) for key, tensor in base_state_dict(tree).items()] == before


def test_under_compile_neither_scales_nor_weights_need_a_new_graph() -> None:
    torch._dynamo.reset()
    graphs = 0

    def backend(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    tree, x = model(), torch.randn(2, 4)
    loras = inject_loras(select(tree).of(fl.Linear, fl.Conv2d), name="style", rank=2, alpha=3)
    stacked = inject_loras(tree, name="stacked", rank=1)
    compiled = torch.compile(tree, fullgraph=True, backend=backend)
    for scale in (1.0, 0.3, 0.0, -2.0):
        loras.scale, stacked.scale = scale, scale / 3
        train_a_little(loras)
        loras.load_state_dict({key: tensor + scale for key, tensor in loras.state_dict().items() if "alpha" not in key})
        assert torch.equal(compiled(x), tree(x))
    assert graphs == 1


def test_a_set_is_printed_with_its_name_and_its_model() -> None:
    assert repr(inject_loras(model(), name="style", rank=1)) == "LoraSet('style', 5 layers of Chain)"
