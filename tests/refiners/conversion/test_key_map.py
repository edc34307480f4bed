import gc
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refiners.conversion import KeyMap, Merge, Recomputed, Rule, Split, Transpose
from refiners.errors import ConversionError


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)


class Upstream(nn.Module):
    def __init__(self, count: int, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(count))
        self.head = nn.Linear(width, 7, bias=False)
        self.register_buffer("position_ids", torch.arange(5).expand(1, 5))


def port_of(count: int, width: int = 4) -> nn.Module:
    def node(**children: nn.Module) -> nn.Module:
        module = nn.Module()
        for name, child in children.items():
            module.add_module(name, child)
        return module

    def layer() -> nn.Module:
        heads = node(Query=nn.Linear(width, width), Key=nn.Linear(width, width), Value=nn.Linear(width, width))
        return node(Norm=nn.LayerNorm(width), Heads=heads, Out=nn.Linear(width, width, bias=False))

    layers = {"Layer" if count == 1 else f"Layer_{i + 1}": layer() for i in range(count)}
    return node(Tokens=nn.Embedding(7, width), Encoder=node(**layers), Head=nn.Linear(width, 7, bias=False))


KEY_MAP = KeyMap(
    {
        "embedding": "Tokens",
        "layers.{i}.norm": "Encoder.Layer_{i+1}.Norm",
        "layers.{i}.qkv": Split(
            "Encoder.Layer_{i+1}.Heads.Query", "Encoder.Layer_{i+1}.Heads.Key", "Encoder.Layer_{i+1}.Heads.Value"
        ),
        "layers.{i}.out": "Encoder.Layer_{i+1}.Out",
        "head": "Head",
    },
    ignore={"position_ids": Recomputed("it counts", lambda shape: torch.arange(shape[-1]).expand(shape))},
    aliases={"model.{rest}": "{rest}"},
    name="the toy",
)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        key: value if not value.is_floating_point() else torch.randn(value.shape, generator=generator)
        for key, value in module.state_dict().items()
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


@pytest.mark.parametrize("count", [1, 2, 11])
def test_conversion_fills_the_port_and_its_inverse_gives_back_every_byte(count: int) -> None:
    upstream, port = Upstream(count), port_of(count)
    weights = weights_of(upstream)
    converted = KEY_MAP.convert(weights, port)
    assert list(converted) == list(port.state_dict())
    port.load_state_dict(converted)
    assert_same(KEY_MAP.invert(converted, upstream), weights)


def test_renames_and_pieces_share_their_storage_with_upstream() -> None:
    weights = weights_of(Upstream(2))
    converted = KEY_MAP.convert(weights, port_of(2))
    assert converted["Tokens.weight"] is weights["embedding.weight"]
    key = converted["Encoder.Layer_2.Heads.Key.weight"]
    assert key.untyped_storage().data_ptr() == weights["layers.1.qkv.weight"].untyped_storage().data_ptr()
    assert key.is_contiguous()


def test_the_pieces_of_a_fused_weight_come_in_order() -> None:
    weights = weights_of(Upstream(1))
    converted = KEY_MAP.convert(weights, port_of(1))
    pieces = [converted[f"Encoder.Layer.Heads.{name}.bias"] for name in ("Query", "Key", "Value")]
    assert torch.equal(torch.cat(pieces), weights["layers.0.qkv.bias"])


def test_dtypes_stay_what_they_are() -> None:
    weights = {key: v.bfloat16() if v.is_floating_point() else v for key, v in weights_of(Upstream(1)).items()}
    assert {tensor.dtype for tensor in KEY_MAP.convert(weights, port_of(1)).values()} == {torch.bfloat16}


def test_the_inverse_needs_no_upstream_model() -> None:
    weights = weights_of(Upstream(3))
    back = KEY_MAP.invert(KEY_MAP.convert(weights, port_of(3)))
    assert set(back) == set(weights) - {"position_ids"}
    assert all(torch.equal(back[key], weights[key]) for key in back)


def test_another_spelling_converts_and_inverts_to_itself() -> None:
    weights = {f"model.{key}": value for key, value in weights_of(Upstream(2)).items()}
    converted = KEY_MAP.convert(weights, port_of(2))
    assert_same(KEY_MAP.invert(converted, weights), weights)


def test_gradients_of_the_port_become_gradients_of_upstream() -> None:
    gradients = weights_of(port_of(2))
    back = KEY_MAP.invert(gradients, {k: v.shape for k, v in Upstream(2).state_dict().items()})
    joined = [gradients[f"Encoder.Layer_2.Heads.{name}.weight"] for name in ("Query", "Key", "Value")]
    assert torch.equal(back["layers.1.qkv.weight"], torch.cat(joined))
    assert back["position_ids"].dtype == torch.int64


def test_pairs_name_both_sides_and_the_rule_between_them() -> None:
    pairs = {pair.upstream: pair for pair in KEY_MAP.pairs(Upstream(1), port_of(1))}
    pair = pairs[("layers.0.qkv.bias",)]
    assert pair.port == tuple(f"Encoder.Layer.Heads.{name}.bias" for name in ("Query", "Key", "Value"))
    pieces = pair.to_port([torch.arange(12)])
    assert [piece.tolist()[0] for piece in pieces] == [0, 4, 8]
    assert torch.equal(pair.to_upstream(pieces)[0], torch.arange(12))


def test_meta_models_are_compared_by_shape_only() -> None:
    with torch.device("meta"):
        upstream, port, wider = Upstream(2), port_of(2), port_of(2, width=8)
    KEY_MAP.check_shapes(upstream, port)
    KEY_MAP.check_shapes({k: v.shape for k, v in upstream.state_dict().items()}, port)
    assert all(tensor.is_meta for tensor in KEY_MAP.convert(upstream.state_dict(), port).values())
    with pytest.raises(ConversionError, match=r"needs \(7, 8\), 'embedding.weight' gives \(7, 4\)"):
        KEY_MAP.check_shapes(upstream, wider)


def test_one_error_lists_all_that_is_missing_unexpected_and_of_another_shape() -> None:
    weights = weights_of(Upstream(2))
    weights["embeding.weight"] = weights.pop("embedding.weight")
    weights["layers.2.out.weight"] = torch.zeros(4, 4)
    weights["layers.0.norm.bias"] = torch.zeros(5)
    weights["layers.1.qkv.bias"] = torch.zeros(7)
    weights["head.weight"] = torch.zeros(7, 4, dtype=torch.int8)
    with pytest.raises(ConversionError) as caught:
        KEY_MAP.convert(weights, port_of(2))
    message = str(caught.value)
    assert message.startswith("the toy cannot be converted: ")
    for line in (
        "Tokens.weight: is filled from 'embedding.weight', which is not there; nearest: 'embeding.weight'",
        "embeding.weight: no line of the key map covers it; nearest: 'embedding.weight'",
        "layers.2.out.weight: goes to 'Encoder.Layer_3.Out.weight', which the port does not have",
        "Encoder.Layer_1.Norm.bias: needs (4,), 'layers.0.norm.bias' gives (5,)",
        "layers.1.qkv.bias: axis 0 of (7,) cannot be cut in 3 equal pieces",
        "Head.weight: needs torch.float32, 'head.weight' gives torch.int8",
    ):
        assert line in message
    assert "Nothing was converted." in message
    problems = KEY_MAP.problems(weights, port_of(2))
    assert problems.keys("missing") == ["Tokens.weight"]
    assert problems.keys("unexpected") == ["layers.2.out.weight", "embeding.weight"]


def test_hundreds_of_problems_are_counted_and_the_first_shown() -> None:
    weights = {f"layer_{i}.weight_of_{i % 7}": torch.zeros(1) for i in range(900)}
    start = time.process_time()
    with pytest.raises(ConversionError) as caught:
        KEY_MAP.convert(weights, port_of(100))
    assert time.process_time() - start < 2
    assert "(900)" in str(caught.value)
    assert "… and 888 more" in str(caught.value)
    assert len(str(caught.value)) < 8000


def test_a_key_given_in_two_spellings_is_refused() -> None:
    weights = weights_of(Upstream(1))
    weights["model.head.weight"] = weights["head.weight"]
    with pytest.raises(ConversionError, match="another spelling of 'head.weight'"):
        KEY_MAP.convert(weights, port_of(1))


def test_two_upstream_keys_for_one_port_key_are_refused() -> None:
    key_map = KeyMap({"a": "X", "b": "X"})
    with pytest.raises(ConversionError, match="X: is filled from 'a' and from 'b'"):
        key_map.convert({"a": torch.zeros(1), "b": torch.zeros(1)}, {"X": (1,)})


def test_a_key_that_two_lines_cover_equally_well_is_refused() -> None:
    key_map = KeyMap({"a.{p}": "X.{p}", "a.{name}": "Y.{name}"})
    with pytest.raises(ConversionError, match=r"a.bias: is covered by .*a.\{p\}"):
        key_map.convert({"a.bias": torch.zeros(1)}, {"X.bias": (1,)})


def test_merging_names_the_part_that_is_not_there() -> None:
    key_map = KeyMap({("q.{p}", "k.{p}"): Merge("qk.{p}")})
    target = {"qk.weight": (4, 2)}
    converted = key_map.convert({"k.weight": torch.ones(2, 2), "q.weight": torch.zeros(2, 2)}, target)
    assert converted["qk.weight"][:, 0].tolist() == [0, 0, 1, 1]
    back = key_map.invert(converted)
    assert back["q.weight"].tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ConversionError, match=r"k.weight: is joined with 'q.weight', which is not there"):
        key_map.convert({"k.weight": torch.ones(2, 2)}, target)


def test_ignored_keys_need_a_reason() -> None:
    with pytest.raises(ConversionError, match="has no reason"):
        KeyMap({"a": "X"}, ignore={"b": " "})


def test_ignored_keys_are_left_out_of_the_inverse() -> None:
    key_map = KeyMap({"a": "X"}, ignore={"b": "b is a cache"})
    weights = {"a": torch.zeros(1), "b.c": torch.zeros(1)}
    converted = key_map.convert(weights, {"X": (1,)})
    assert list(key_map.invert(converted, weights)) == ["a"]


def test_recomputed_bytes_are_checked_before_they_are_dropped() -> None:
    weights = weights_of(Upstream(1))
    weights["position_ids"] = weights["position_ids"].flip(1)
    with pytest.raises(ConversionError, match=r"position_ids: is recomputed \(it counts\) and has other bytes"):
        KEY_MAP.convert(weights, port_of(1))


TIED = KeyMap({"embedding": "Tokens"}, tied={"head.weight": "embedding.weight"})


@pytest.mark.parametrize("keys", [["embedding.weight"], ["head.weight"], ["embedding.weight", "head.weight"]])
def test_a_tied_upstream_tensor_may_be_given_under_either_key_or_both(keys: list[str]) -> None:
    tensor = torch.randn(7, 4)
    weights = {key: tensor.clone() for key in keys}
    converted = TIED.convert(weights, {"Tokens.weight": (7, 4)})
    assert torch.equal(converted["Tokens.weight"], tensor)
    assert_same(TIED.invert(converted, weights), weights)


def test_tied_tensors_with_other_bytes_are_refused() -> None:
    weights = {"embedding.weight": torch.zeros(7, 4), "head.weight": -torch.zeros(7, 4)}
    with pytest.raises(ConversionError, match="declared to repeat 'embedding.weight' and has other bytes"):
        TIED.convert(weights, {"Tokens.weight": (7, 4)})


def test_memory_shared_by_two_upstream_keys_has_to_be_declared() -> None:
    tensor = torch.zeros(7, 4)
    with pytest.raises(ConversionError, match="declare it in tied="):
        KeyMap({"a": "X"}).convert({"a": tensor, "b": tensor}, {"X": (7, 4)})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_parameter_that_the_port_holds_twice_is_filled_once(device: str) -> None:
    linear = nn.Linear(2, 2, device=device)
    port = nn.ModuleDict({"First": linear, "Second": linear})
    weights = {"fc.weight": torch.randn(2, 2), "fc.bias": torch.randn(2)}
    for name in ("First", "Second"):
        key_map = KeyMap({"fc": name})
        converted = key_map.convert(weights, port)
        assert converted["First.weight"] is converted["Second.weight"] is weights["fc.weight"]
        assert_same(key_map.invert(converted, weights), weights)


def test_two_tensors_for_one_parameter_have_to_be_equal() -> None:
    linear = nn.Linear(2, 2, bias=False)
    port = nn.ModuleDict({"First": linear, "Second": linear})
    key_map = KeyMap({"a": "First", "b": "Second"})
    one = torch.randn(2, 2)
    converted = key_map.convert({"a.weight": one, "b.weight": one.clone()}, port)
    assert converted["First.weight"] is converted["Second.weight"]
    with pytest.raises(ConversionError, match="upstream's tensors for them differ"):
        key_map.convert({"a.weight": one, "b.weight": one + 1}, port)


def test_a_map_goes_under_prefixes_and_joins_another() -> None:
    tower = KeyMap(
        {"fc.{i}": "Linear_{i+1}", ("q", "k"): Merge(Transpose("QK"))},
        ignore={"ids": "a cache"},
        aliases={"old.{rest}": "{rest}"},
        tied={"twin": "fc.0"},
    )
    both = tower.under("text", "Text") | tower.under("image", "Image") | KeyMap({"scale": "Scale"})
    tensors = {name: torch.randn(2, 3) for name in ("fc.0", "fc.1", "q", "k", "old.ids", "scale")}
    weights = {f"{side}.{k}": v for side in ("text", "image") for k, v in tensors.items() if k != "scale"}
    weights["scale"] = tensors["scale"]
    target = {f"{side}.{key}": (2, 3) for side in ("Text", "Image") for key in ("Linear_1", "Linear_2")}
    target |= {"Text.QK": (3, 4), "Image.QK": (3, 4), "Scale": (2, 3)}
    converted = both.convert(weights, target)
    assert converted["Image.Linear_2"] is weights["image.fc.1"]
    back = both.invert(converted, weights)
    assert all(torch.equal(back[key], weights[key]) for key in back)
    assert set(weights) - set(back) == {"text.old.ids", "image.old.ids"}


def test_maps_that_contradict_each_other_do_not_join() -> None:
    assert len((KeyMap({"a": "X"}) | KeyMap({"a": "X"})).lines) == 1
    with pytest.raises(ConversionError, match="different things about 'a'"):
        KeyMap({"a": "X"}) | KeyMap({"a": "Y"})


@pytest.mark.parametrize(
    ("upstream", "value"),
    [
        ("a.{i}", "X"),
        ("a", "X_{i}"),
        (("a.{i}", "b.{j}"), Merge("X_{i}")),
        ("a.{i}", Split("X_{i}", "Y")),
        (("a", "b"), "X"),
        (("a", "b"), Split("X", "Y")),
    ],
)
def test_a_line_that_has_no_inverse_is_refused(upstream: str | tuple[str, ...], value: str | Rule) -> None:
    with pytest.raises(ConversionError, match="he line"):
        KeyMap({upstream: value})


def test_several_aliases_apply_to_one_key_each_once() -> None:
    aliases = {"model.{rest}": "{rest}", "{rest}.gamma": "{rest}.weight", "norm.{p}": "norm.inner.{p}"}
    key_map = KeyMap({"norm.inner": "Norm"}, aliases=aliases)
    weights = {"model.norm.gamma": torch.ones(1)}
    assert key_map.convert(weights, {"Norm.weight": (1,)})["Norm.weight"] is weights["model.norm.gamma"]
    assert list(KeyMap({"x": "X"}, aliases={"{rest}": "{rest}"}).convert({"x": torch.ones(1)}, {"X": (1,)})) == ["X"]


def test_an_alias_with_other_names_on_each_side_is_refused() -> None:
    with pytest.raises(ConversionError, match="aliases="):
        KeyMap({"a": "X"}, aliases={"old.{rest}": "new"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"state_dict": {"a": torch.zeros(1)}}, "state_dict: dict"),
        ({"a": torch.zeros(1), "epoch": 3}, "epoch: int"),
        ({0: torch.zeros(1)}, "0: a key of type int"),
        ({"a": torch.Size((1,))}, "1 entries, 'a' first, are shapes"),
    ],
)
def test_what_is_no_state_dict_is_refused_with_its_entries(given: Any, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        KeyMap({"a": "X"}).convert(given, {"X": (1,)})


def test_weights_that_are_the_ports_own_are_recognised() -> None:
    converted = KEY_MAP.convert(weights_of(Upstream(2)), port_of(2))
    with pytest.raises(ConversionError, match="These are the port's own keys already: load them as they are."):
        KEY_MAP.convert(converted, port_of(2))


def test_a_numbered_name_is_preferred_to_the_bare_one() -> None:
    key_map = KeyMap({"a.{i}.{p}": "Block_{i+1}.Layer_{i+1}.{p}"})
    target = {"Block_1.Layer.weight": (1,), "Block_2.Layer_2.weight": (1,)}
    weights = {"a.0.weight": torch.zeros(1), "a.1.weight": torch.ones(1)}
    assert key_map.convert(weights, target)["Block_2.Layer_2.weight"] is weights["a.1.weight"]


def test_the_time_of_a_conversion_is_linear_in_the_number_of_keys() -> None:
    key_map = KeyMap({f"blocks.{{i}}.{name}.{{p}}": f"Blocks.Block_{{i+1}}.{name}.{{p}}" for name in "abcdefgh"})
    tensor = torch.empty(4, 4, device="meta")

    def seconds(count: int) -> float:
        weights = {f"blocks.{i}.{name}.weight": tensor.clone() for i in range(count) for name in "abcdefgh"}
        target = {f"Blocks.Block_{i + 1}.{name}.weight": tensor.clone() for i in range(count) for name in "abcdefgh"}
        # A collection looks at all that the other tests have left, and takes longer than the conversion.
        gc.disable()
        try:
            start = time.process_time()
            key_map.convert(weights, target)
            return time.process_time() - start
        finally:
            gc.enable()

    times = [(seconds(210), seconds(420)) for _ in range(5)]
    as_many_as_sdxl, twice = (min(run[index] for run in times) for index in (0, 1))
    assert as_many_as_sdxl < 0.1
    assert twice / as_many_as_sdxl < 3


def test_a_key_that_has_no_place_is_not_told_to_be_near_itself() -> None:
    with pytest.raises(ConversionError, match=r"surprise\.weight: no line of the key map covers it\n"):
        KeyMap({"fc": "Linear"}).convert(
            {"fc.bias": torch.ones(2), "surprise.weight": torch.ones(2)}, {"Linear.bias": (2,)}
        )
