import pytest
import torch

from reference_ports import unet
from refiners.errors import ConversionError

CONFIG = {
    "block_out_channels": [8, 12],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 10,
    "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
CONFIGS = {
    "plain": CONFIG,
    "linear": {**CONFIG, "use_linear_projection": True},
    "text only": {**CONFIG, "only_cross_attention": True},
    "one stage, text only": {
        **CONFIG,
        "block_out_channels": [8],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "only_cross_attention": True,
        "up_block_types": ["CrossAttnUpBlock2D"],
    },
    "condition and class": {**CONFIG, "time_cond_proj_dim": 3, "num_class_embeds": 5},
    "vector class": {**CONFIG, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 3},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_tree_becomes_a_published_file_and_back(name: str) -> None:
    model = unet.from_config(CONFIGS[name])
    key_map = unet.key_map_for(CONFIGS[name])
    published = key_map.invert(model.state_dict())
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.weight" in published
    converted = key_map.convert(published, model)
    assert all(converted[key].data_ptr() == tensor.data_ptr() for key, tensor in model.state_dict().items())


def test_weights_with_linear_projections_are_no_weights_with_convolutions() -> None:
    published = unet.LINEAR_KEYS.invert(unet.from_config(CONFIGS["linear"]).state_dict())
    with pytest.raises(ConversionError, match=r"proj_in\.weight"):
        unet.KEYS.convert(published, unet.from_config(CONFIG))


def test_what_is_missing_and_what_is_too_much_is_told_together() -> None:
    model = unet.from_config(CONFIG)
    published = unet.KEYS.invert(model.state_dict())
    del published["conv_in.weight"]
    published["conv_in_2.weight"] = torch.ones(1)
    with pytest.raises(ConversionError) as caught:
        unet.KEYS.convert(published, model)
    assert "conv_in.weight" in str(caught.value)
    assert "conv_in_2.weight" in str(caught.value)
