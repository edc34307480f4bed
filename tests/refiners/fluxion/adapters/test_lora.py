"""LoRA: the change alone, the layer with its changes, and what the original's API promises of both."""

import math

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import AdapterTypeError, ConversionError, LoraNameError
from refiners.fluxion.adapters import Conv2dLora, LinearLora, Lora, LoraAdapter, base_state_dict


def whole(*shape: int) -> Tensor:
    """Whole numbers, so that float64 computes without any rounding."""
    return torch.randint(-4, 5, shape).double()


def filled(lora: Lora) -> Lora:
    lora.load_weights(whole(*lora.down.weight.shape), whole(*lora.up.weight.shape))
    return lora


# --- Lora ------------------------------------------------------------------------------------------------------------


def test_the_children_are_down_up_and_the_multiplication() -> None:
    lora = LinearLora("style", in_features=6, out_features=5, rank=2, scale=0.5)
    assert [type(child) for child in lora] == [fl.Linear, fl.Linear, fl.Multiply]
    assert (lora.name, lora.rank, lora.scale, lora.in_features, lora.out_features) == ("style", 2, 0.5, 6, 5)
    assert lora.down.weight.shape == (2, 6)
    assert lora.up.weight.shape == (5, 2)
    assert list(lora.state_dict()) == ["Linear_1.weight", "Linear_2.weight"]


def test_a_new_lora_changes_nothing_and_down_has_the_standard_deviation_of_its_rank() -> None:
    lora = LinearLora("style", in_features=1000, out_features=5, rank=10)
    assert not lora.up.weight.any()
    assert 0.095 < float(lora.down.weight.detach().std()) < 0.105
    assert not lora(torch.randn(3, 1000)).any()


def test_down_up_and_scale_are_what_is_computed() -> None:
    lora = filled(LinearLora("style", 6, 5, rank=2, dtype=torch.float64))
    x = whole(3, 6)
    lora.scale = 0.25
    assert torch.equal(lora(x), x @ lora.down.weight.T @ lora.up.weight.T / 4)


def test_an_alpha_scales_by_alpha_over_rank() -> None:
    lora = LinearLora("style", 6, 5, rank=4, alpha=3)
    assert (lora.scale, lora.scaling, lora.alpha) == (1.0, 0.75, 3)
    lora.scale = 0.8
    assert (lora.scale, lora.scaling) == (0.8, 0.8 * 3 / 4)
    assert "Multiply(scale=0.6000000000000001)" in repr(lora)
    assert LinearLora("style", 6, 5, rank=4).scaling == 1.0


def test_a_copy_tells_the_scale_that_it_shares() -> None:
    lora = LinearLora("style", 6, 5, rank=4, alpha=3)
    copied = lora.structural_copy()
    lora.scale = 0.5
    assert copied.scale == 0.5
    assert copied.down is lora.down


def test_lora_itself_is_abstract() -> None:
    with pytest.raises(TypeError, match="Lora is abstract"):
        Lora("style")


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_1_is_refused(rank: int) -> None:
    with pytest.raises(AdapterTypeError, match="rank is 1 or more"):
        LinearLora("style", 1, 1, rank=rank)


def test_device_and_dtype_are_those_of_the_weights() -> None:
    lora = LinearLora("style", 6, 5, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in lora.parameters()} == {("meta", torch.bfloat16)}


# --- for a layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_for_target_takes_device_dtype_and_training_mode_from_the_layer(training: bool) -> None:
    layer = fl.Linear(6, 5, device="meta", dtype=torch.bfloat16).train(training)
    lora = Lora.for_target("style", layer, rank=3, alpha=2)
    assert isinstance(lora, LinearLora)
    assert {(p.device.type, p.dtype) for p in lora.parameters()} == {("meta", torch.bfloat16)}
    assert {module.training for module in lora.modules()} == {training}
    assert lora.is_compatible(layer)
    assert all(parameter.requires_grad for parameter in lora.parameters())
    assert Lora.for_target("style", layer, dtype=torch.float32).down.weight.dtype == torch.float32


def test_for_target_knows_plain_layers_of_torch() -> None:
    assert isinstance(Lora.for_target("style", nn.Linear(2, 3)), LinearLora)
    assert isinstance(Lora.for_target("style", nn.Conv2d(2, 3, 1)), Conv2dLora)


def test_for_target_of_a_subclass_gives_that_subclass() -> None:
    class Mine(LinearLora):
        pass

    assert type(Mine.for_target("style", fl.Linear(2, 3))) is Mine
    assert type(Mine.from_weights("style", torch.zeros(1, 2), torch.zeros(3, 1))) is Mine


def test_for_target_refuses_layers_without_a_form() -> None:
    with pytest.raises(AdapterTypeError, match="The kinds of LoRA are Conv1dLora, Conv2dLora, .*LinearLora"):
        Lora.for_target("style", fl.LayerNorm(4))
    with pytest.raises(AdapterTypeError, match="LinearLora is not made for Conv2d"):
        LinearLora.for_target("style", fl.Conv2d(1, 1, 1))


# Every geometry in which the layer gives an output for 12 × 11 pixels.
GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2},
    {"kernel_size": 4, "stride": (2, 3), "padding": 1},
    {"kernel_size": 5, "padding": 2, "dilation": 2},
    {"kernel_size": (1, 7), "padding": (0, 3)},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (3, 1)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "stride": 2},
    {"kernel_size": 3, "padding": (1, 0), "padding_mode": "replicate"},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_lora_of_a_convolution_is_a_change_of_its_weight_in_any_geometry(geometry: dict) -> None:
    layer = fl.Conv2d(3, 4, use_bias=False, dtype=torch.float64, **geometry)
    lora = filled(Lora.for_target("style", layer, rank=2))
    x = whole(2, 3, 12, 11)
    change = torch.einsum("orhw,rihw->oihw", lora.up.weight.expand(-1, -1, *layer.kernel_size), lora.down.weight)
    with torch.no_grad():
        layer.weight.copy_(change)
    assert lora.is_compatible(layer)
    assert torch.equal(lora(x), layer(x))
    loaded = Lora.from_weights("style", lora.down.weight, lora.up.weight)
    adapter = LoraAdapter(layer, loaded)
    assert torch.equal(adapter(x), 2 * layer(x))


def test_a_lora_of_a_grouped_convolution_leads_up_in_groups_as_in_peft() -> None:
    layer = fl.Conv2d(4, 6, kernel_size=3, padding=1, groups=2)
    lora = Lora.for_target("style", layer, rank=4)
    assert (lora.down.groups, lora.up.groups) == (1, 2)
    assert lora.up.weight.shape == (6, 2, 1, 1)
    assert LoraAdapter(layer, lora)(torch.randn(1, 4, 5, 5)).shape == (1, 6, 5, 5)
    assert Lora.from_weights("style", lora.down.weight, lora.up.weight).groups == 2
    with pytest.raises(AdapterTypeError, match="choose a multiple of 2"):
        Lora.for_target("style", layer, rank=3)


@pytest.mark.parametrize("kernel_size", [(1, 3), (3, 1), (5, 1), (1, 7), (3, 3), ((1, 5), 1), (1, (3, 1))])
def test_a_convolution_keeps_the_size_of_images_with_any_odd_kernel(kernel_size: tuple) -> None:
    lora = Conv2dLora("style", in_channels=3, out_channels=4, kernel_size=kernel_size, rank=2)
    assert lora(torch.randn(1, 3, 8, 9)).shape == (1, 4, 8, 9)
    loaded = Lora.from_weights("style", lora.down.weight, lora.up.weight)
    assert isinstance(loaded, Conv2dLora)
    assert (loaded.kernel_size, loaded.padding) == (lora.kernel_size, lora.padding)


def test_the_default_convolution_has_its_kernel_at_the_end() -> None:
    lora = Conv2dLora("style", in_channels=3, out_channels=4)
    assert (lora.kernel_size, lora.stride, lora.padding) == ((1, 3), (1, 1), (0, 1))
    assert (lora.down.kernel_size, lora.up.kernel_size, lora.up.padding) == ((1, 1), (3, 3), (1, 1))
    layer = fl.Conv2d(3, 4, kernel_size=3, stride=2, padding=1)
    assert not lora.is_compatible(layer)
    loaded = Lora.from_weights("style", lora.down.weight, lora.up.weight)
    assert LoraAdapter(layer, loaded)(torch.randn(1, 3, 8, 8)).shape == (1, 4, 4, 4)
    assert (loaded.down.stride, loaded.up.stride) == ((1, 1), (2, 2))


# --- weights ---------------------------------------------------------------------------------------------------------


def test_from_weights_takes_the_tensors_themselves() -> None:
    down, up = torch.randn(2, 6, dtype=torch.bfloat16), torch.randn(5, 2, dtype=torch.bfloat16)
    lora = Lora.from_weights("style", down=down, up=up, alpha=1.0)
    assert isinstance(lora, LinearLora)
    assert (lora.rank, lora.in_features, lora.out_features, lora.scaling) == (2, 6, 5, 0.5)
    assert lora.down.weight.data_ptr() == down.data_ptr()
    assert lora.up.weight.dtype == torch.bfloat16
    assert lora.up.weight.requires_grad


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (torch.zeros(2, 6), torch.zeros(5, 3)),
        (torch.zeros(2, 6), torch.zeros(5, 2, 1, 1)),
        (torch.zeros(2), torch.zeros(2)),
        (torch.zeros(2, 6, 1), torch.zeros(5, 3, 1)),
        (torch.zeros(3, 6, 1, 1), torch.zeros(5, 2, 1, 1)),
        (torch.zeros(2, 6, dtype=torch.int8), torch.zeros(5, 2, dtype=torch.int8)),
    ],
)
def test_from_weights_refuses_what_is_no_pair(down: Tensor, up: Tensor) -> None:
    with pytest.raises(ValueError, match="are no pair for Lora"):
        Lora.from_weights("style", down, up)


def test_load_weights_copies_into_the_parameters_that_are_there() -> None:
    lora = LinearLora("style", 6, 5, rank=2)
    before = list(lora.parameters())
    down, up = torch.randn(2, 6), torch.randn(5, 2)
    lora.load_weights(down, up)
    assert all(new is old for new, old in zip(lora.parameters(), before, strict=True))
    assert torch.equal(lora.down.weight, down)
    assert torch.equal(lora.up.weight, up)


def test_load_weights_refuses_other_shapes_and_loads_nothing() -> None:
    lora = LinearLora("style", 6, 5, rank=2)
    before = lora.down.weight.clone()
    with pytest.raises(AssertionError, match="For another rank build a new LoRA"):
        lora.load_weights(torch.zeros(2, 6), torch.zeros(5, 3))
    assert torch.equal(lora.down.weight, before)
    with pytest.raises(AdapterTypeError, match="meta device"):
        LinearLora("style", 6, 5, rank=2, device="meta").load_weights(torch.zeros(2, 6), torch.zeros(5, 2))


@pytest.mark.parametrize(
    "names", [("down", "up"), ("lora_down", "lora_up"), ("lora_A", "lora_B"), ("Linear_1", "Linear_2")]
)
def test_from_dict_finds_pairs_and_alphas_by_key(names: tuple[str, str]) -> None:
    down, up = names
    state = {
        f"a.b.{down}.weight": torch.ones(2, 6),
        f"a.b.{up}.weight": torch.ones(5, 2),
        "a.b.alpha": torch.tensor(4.0),
        f"c.{down}.weight": torch.ones(3, 6, 3, 3),
        f"c.{up}.weight": torch.ones(5, 3, 1, 1),
    }
    loras = Lora.from_dict("style", state)
    assert list(loras) == ["a.b", "c"]
    assert isinstance(loras["a.b"], LinearLora)
    assert isinstance(loras["c"], Conv2dLora)
    assert {lora.name for lora in loras.values()} == {"style"}
    assert (loras["a.b"].scaling, loras["c"].scaling) == (2.0, 1.0)


def test_from_dict_tells_up_from_down_by_name_not_by_order() -> None:
    state = {"a.lora_up.weight": torch.ones(5, 2), "a.lora_down.weight": torch.ones(2, 6)}
    assert Lora.from_dict("style", state)["a"].down.weight.shape == (2, 6)


def test_from_dict_lists_everything_that_is_no_lora() -> None:
    state = {
        "a.lora_up.weight": torch.ones(5, 2),
        "b.x.weight": torch.ones(5, 2),
        "c.dora_scale": torch.ones(5),
        "d.alpha": torch.tensor(1.0),
    }
    with pytest.raises(ConversionError, match="4 keys") as error:
        Lora.from_dict("style", state)
    for line in (
        "a: needs one down and one up, has up",
        "b: needs two weights",
        "c.dora_scale: neither",
        "d.alpha: an",
    ):
        assert line in str(error.value)


# --- LoraAdapter -----------------------------------------------------------------------------------------------------


def test_the_adapter_is_the_sum_of_the_layer_and_its_loras() -> None:
    model = fl.Chain(fl.Linear(6, 5, dtype=torch.float64), fl.Linear(5, 5, dtype=torch.float64))
    keys = list(model.state_dict())
    layer = model.layer("Linear_1", fl.Linear)
    x, loras = torch.randn(3, 6).double(), [filled(Lora.for_target(name, layer, rank=2)) for name in ("a", "b")]
    base = layer(x)
    adapter = LoraAdapter(layer, *loras).inject(model)
    assert torch.equal(adapter(x), base + loras[0](x) + loras[1](x))
    assert list(model.state_dict()) == [
        "LoraAdapter.Linear.weight",
        "LoraAdapter.Linear.bias",
        "LoraAdapter.LinearLora_1.Linear_1.weight",
        "LoraAdapter.LinearLora_1.Linear_2.weight",
        "LoraAdapter.LinearLora_2.Linear_1.weight",
        "LoraAdapter.LinearLora_2.Linear_2.weight",
        "Linear.weight",
        "Linear.bias",
    ]
    adapter.eject()
    assert list(model.state_dict()) == keys
    assert torch.equal(layer(x), base)


def test_names_loras_scales_and_scale() -> None:
    layer = fl.Linear(6, 5)
    adapter = LoraAdapter(layer, Lora.for_target("a", layer), Lora.for_target("b", layer, scale=0.5))
    assert adapter.names == ["a", "b"]
    assert list(adapter.loras.values()) == list(adapter.lora_layers)
    assert adapter.scales == adapter.scale == {"a": 1.0, "b": 0.5}
    adapter.scale = {"b": 2.0}
    assert adapter.scales == {"a": 1.0, "b": 2.0}
    with pytest.raises(KeyError, match="is called 'c', only \\['a', 'b'\\]"):
        adapter.scale = {"a": 3.0, "c": 1.0}
    assert adapter.scales == {"a": 1.0, "b": 2.0}


def test_add_and_remove() -> None:
    layer = fl.Linear(6, 5)
    adapter = LoraAdapter(layer, Lora.for_target("a", layer))
    second = Lora.for_target("b", layer)
    adapter.add_lora(second)
    assert adapter.names == ["a", "b"]
    with pytest.raises(AssertionError, match="'b' already"):
        adapter.add_lora(Lora.for_target("b", layer))
    assert adapter.remove_lora("b") is second
    assert second.parent is None
    assert adapter.remove_lora("b") is None
    assert adapter.names == ["a"]


def test_an_adapter_inside_another_keeps_its_loras_to_itself() -> None:
    layer = fl.Linear(6, 5)
    model = fl.Chain(layer)
    outer = LoraAdapter(layer, Lora.for_target("a", layer)).inject(model)
    inner = LoraAdapter(layer, Lora.for_target("b", layer)).inject(model)
    assert inner.parent is outer
    assert (outer.names, inner.names) == (["a"], ["b"])


@pytest.mark.parametrize("wrong", [fl.Linear(6, 4), fl.Linear(5, 5), fl.Conv2d(6, 5, 1)])
def test_a_lora_for_another_layer_is_refused(wrong: nn.Module) -> None:
    with pytest.raises(AdapterTypeError, match="does not fit"):
        LoraAdapter(wrong, LinearLora("style", 6, 5))
    with pytest.raises(AdapterTypeError, match="does not fit"):
        LoraAdapter(wrong).add_lora(LinearLora("style", 6, 5))


def test_two_loras_of_one_name_are_refused() -> None:
    with pytest.raises(LoraNameError):
        LoraAdapter(fl.Linear(6, 5), LinearLora("a", 6, 5), LinearLora("a", 6, 5))


@pytest.mark.parametrize("base", [torch.float64, torch.bfloat16, torch.float16])
def test_loras_of_another_dtype_leave_the_dtype_of_the_output(base: torch.dtype) -> None:
    layer = fl.Linear(6, 5, dtype=base)
    lora = Lora.for_target("style", layer, dtype=torch.float32)
    nn.init.normal_(lora.up.weight)
    x = torch.randn(3, 6).to(base)
    result = LoraAdapter(layer, lora)(x)
    assert result.dtype == base
    assert torch.equal(result, (layer(x) + lora(x.float())).to(base))


def test_a_layer_that_stands_in_two_places_is_adapted_in_both() -> None:
    shared = fl.Linear(4, 4)
    model = fl.Chain(shared, fl.Chain(shared))
    x = torch.randn(1, 4)
    before = model(x)
    adapter = LoraAdapter(shared, Lora.for_target("a", shared)).inject(model)
    adapter.add_lora(Lora.for_target("b", shared, scale=2.0))
    assert [place.names for place in model.layers(LoraAdapter)] == [["a", "b"], ["a", "b"]]
    adapter.scale = {"b": 0.5}
    assert [place.scales["b"] for place in model.layers(LoraAdapter)] == [0.5, 0.5]
    adapter.remove_lora("a")
    assert [place.names for place in model.layers(LoraAdapter)] == [["b"], ["b"]]
    adapter.eject()
    assert torch.equal(model(x), before)
    assert list(base_state_dict(model)) == list(model.state_dict())


def test_gradients_reach_the_lora_and_the_layer() -> None:
    layer = fl.Linear(6, 5)
    lora = Lora.for_target("style", layer, rank=2)
    LoraAdapter(layer, lora)(torch.randn(3, 6)).sum().backward()
    assert lora.up.weight.grad is not None
    assert layer.weight.grad is not None
    assert math.isfinite(float(lora.up.weight.grad.sum()))


def test_the_layers_of_a_lora_are_what_their_constructor_builds_and_share_nothing() -> None:
    lora, expected = LinearLora("style", 3, 5, rank=2), fl.Linear(3, 2, bias=False)
    down, up = vars(lora.down), vars(lora.up)
    assert down.keys() - {"_parent"} == vars(expected).keys() - {"_parent"}
    assert repr(lora.down) == repr(expected)
    assert all(down[name] is not up[name] for name, value in down.items() if isinstance(value, dict | set))
