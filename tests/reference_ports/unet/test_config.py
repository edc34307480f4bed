import pytest

from reference_ports import unet
from reference_ports.unet import CrossAttention2d, MiddleBlock
from reference_ports.unet.transformer import (
    LinearCrossAttention2d,
    TextOnlyTransformerBlock,
    TextProjection,
    TransformerBlock,
)
from refiners.errors import ConversionError
from refiners.fluxion.selectors import select

TINY = {
    "block_out_channels": [8, 12],
    "norm_num_groups": 4,
    "cross_attention_dim": 10,
    "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}


def test_all_that_cannot_be_honoured_is_told_at_once() -> None:
    config = {
        **TINY,
        "act_fn": "mish",
        "class_embed_type": "simple_projection",
        "down_block_types": ["CrossAttnDownBlock2D", "KDownBlock2D"],
        "encoder_hid_dim_type": "image_proj",
        "layers_per_block": [1, 2, 3],
        "attention_type": "gated",
        "rope": True,
    }
    with pytest.raises(ConversionError, match="7 of its attributes do not fit") as caught:
        unet.from_config(config)
    for name in ("act_fn", "class_embed_type", "down_block_types", "encoder_hid_dim_type", "layers_per_block", "rope"):
        assert f"  {name}: " in str(caught.value)


@pytest.mark.parametrize("name", ["addition_embed_type", "class_embed_type"])
def test_a_projection_without_its_width_is_refused(name: str) -> None:
    kind = {"addition_embed_type": "text_time", "class_embed_type": "projection"}[name]
    config = {**TINY, name: kind, "addition_time_embed_dim": 6}
    with pytest.raises(ConversionError, match="projection_class_embeddings_input_dim is required"):
        unet.from_config(config)


def test_a_projection_of_the_text_without_its_width_is_refused() -> None:
    with pytest.raises(ConversionError, match="encoder_hid_dim is required"):
        unet.from_config({**TINY, "encoder_hid_dim_type": "text_proj"})


def test_depths_are_those_of_each_stage_and_turn_round_on_the_way_up() -> None:
    model = unet.from_config({**TINY, "layers_per_block": 1, "transformer_layers_per_block": [1, 2]})
    depths = [node.num_layers for node in select(model).of(CrossAttention2d)]
    assert depths == [1, 2, 2, 2, 2, 1, 1]


def test_nested_depths_need_their_own_order_on_the_way_up() -> None:
    nested = {**TINY, "layers_per_block": 1, "transformer_layers_per_block": [1, [2]]}
    with pytest.raises(ConversionError, match="gives 1 depths where there are 2 layers"):
        unet.from_config(nested)
    model = unet.from_config({**nested, "reverse_transformer_layers_per_block": [[3, 0], 1]})
    assert [node.num_layers for node in select(model).of(CrossAttention2d)] == [1, 2, 2, 3, 0, 1, 1]


def test_the_middle_may_be_whole_bare_or_missing() -> None:
    counts = {
        kind: len(unet.from_config({**TINY, "mid_block_type": kind}).find(MiddleBlock) or ())
        for kind in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
    }
    assert counts == {"UNetMidBlock2DCrossAttn": 3, "UNetMidBlock2D": 1, None: 0}


def test_stages_that_attend_to_the_text_twice_are_the_same_on_both_sides() -> None:
    model = unet.from_config({**TINY, "layers_per_block": 1, "only_cross_attention": [True, False]})
    kinds = [type(node) for node in select(model).of(TransformerBlock)]
    assert [kind is TextOnlyTransformerBlock for kind in kinds] == [True, False, False, False, False, True, True]


def test_linear_projections_are_another_node() -> None:
    model = unet.from_config({**TINY, "use_linear_projection": True})
    assert select(model).of(LinearCrossAttention2d).count == select(model).of(CrossAttention2d).count > 0


def test_text_of_another_width_is_projected_first() -> None:
    model = unet.from_config({**TINY, "encoder_hid_dim": 6})
    assert isinstance(model[1], TextProjection)
    assert model.text_dims == (6,)
