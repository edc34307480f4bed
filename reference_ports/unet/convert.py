"""Published weights of UNets in the diffusers layout, for the trees of `reference_ports.unet.model`.

The key maps follow the state dict of `UNet2DConditionModel` of diffusers 0.42.1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from reference_ports.unet.config import UNetConfig, from_config
from reference_ports.unet.model import SD1UNet, SD2UNet, SDXLRefinerUNet, SDXLUNet, UNet
from reference_ports.unet.stages import DownBlock
from reference_ports.unet.transformer import LinearCrossAttention2d, TextOnlyTransformerBlock
from refiners.conversion import KeyMap, Port

_TIME, _CLASS, _SIZE = (
    f"TimestepEncoder.EmbeddingSum.{name}" for name in ("TimeEmbedding", "ClassEmbedding", "TextTimeEmbedding")
)
_RESIDUAL = {
    "norm1": "Convolutions.GroupNorm_1",
    "conv1": "Convolutions.Conv2d_1",
    "time_emb_proj": "Convolutions.TimestepShift.TimestepProjection",
    "norm2": "Convolutions.GroupNorm_2",
    "conv2": "Convolutions.Conv2d_2",
    "conv_shortcut": "Shortcut.Conv2d",
}
_PLACES = {
    "down_blocks.{i}": "DownBlocks.DownBlock_{i+1}",
    "mid_block": "MiddleBlock",
    "up_blocks.{i}": "UpBlocks.UpBlock_{i+1}",
}


def _attention(upstream: str, port: str, projections: str) -> dict[str, str]:
    names = {"to_q": "Query", "to_k": "Key", "to_v": "Value"}
    return {
        **{f"{upstream}.{key}": f"{port}.{projections}.{name}" for key, name in names.items()},
        f"{upstream}.to_out.0": f"{port}.Linear",
    }


_AFTER_SELF_ATTENTION = {
    **_attention("attn2", "CrossAttentionResidual.CrossAttention", "TextProjections"),
    "norm1": "SelfAttentionResidual.LayerNorm",
    "norm2": "CrossAttentionResidual.LayerNorm",
    "norm3": "FeedForwardResidual.LayerNorm",
    "ff.net.0.proj": "FeedForwardResidual.GEGLUFeedForward.Linear_1",
    "ff.net.2": "FeedForwardResidual.GEGLUFeedForward.Linear_2",
}
_BLOCK = {**_attention("attn1", "SelfAttentionResidual.SelfAttention", "Projections"), **_AFTER_SELF_ATTENTION}
_TEXT_ONLY_BLOCK = {
    **_attention("attn1", "SelfAttentionResidual.UnmaskedCrossAttention", "TextProjections"),
    **_AFTER_SELF_ATTENTION,
}


def _transformer(upstream: str, port: str, block: str, lines: Mapping[str, str]) -> dict[str, str]:
    """The lines of the transformer blocks at one place."""
    place = f"{upstream}.attentions.{{j}}.transformer_blocks.{{k}}"
    return {f"{place}.{key}": f"{port}_{{j+1}}.{block}_{{k+1}}.{name}" for key, name in lines.items()}


def _lines(attention: str, projection: str) -> dict[str, str]:
    lines = {
        "conv_in": "InputBlock.InputConvolution",
        "time_embedding.cond_proj": f"{_TIME}.TimeCondition",
        "time_embedding.linear_{i}": f"{_TIME}.Linear_{{i}}",
        "class_embedding": f"{_CLASS}.Embedding",
        "class_embedding.linear_{i}": f"{_CLASS}.Linear_{{i}}",
        "add_embedding.linear_1": f"{_SIZE}.TextTimeProjection",
        "add_embedding.linear_2": f"{_SIZE}.Linear",
        "encoder_hid_proj": "TextProjection.Linear",
        "down_blocks.{i}.downsamplers.0.conv": "DownBlocks.DownBlock_{i+1}.Downsample",
        "up_blocks.{i}.upsamplers.0.conv": "UpBlocks.UpBlock_{i+1}.Upsample.Conv2d",
        "conv_norm_out": "OutputBlock.GroupNorm",
        "conv_out": "OutputBlock.Conv2d",
    }
    for upstream, port in _PLACES.items():
        lines |= {
            f"{upstream}.resnets.{{j}}.{k}": f"{port}.TimedResidualBlock_{{j+1}}.{v}" for k, v in _RESIDUAL.items()
        }
        transformer = f"{port}.{attention}_{{j+1}}"
        lines |= {
            f"{upstream}.attentions.{{j}}.norm": f"{transformer}.GroupNorm",
            f"{upstream}.attentions.{{j}}.proj_in": f"{transformer}.{projection}_1",
            f"{upstream}.attentions.{{j}}.proj_out": f"{transformer}.{projection}_2",
            **_transformer(upstream, f"{port}.{attention}", "TransformerBlock", _BLOCK),
        }
    return lines


KEYS = KeyMap(_lines("CrossAttention2d", "Conv2d"), name="a UNet")
"""The keys of `UNet2DConditionModel` with `use_linear_projection=False`: Stable Diffusion 1."""

LINEAR_KEYS = KeyMap(_lines("LinearCrossAttention2d", "Linear"), name="a UNet with linear projections")
"""The keys of `UNet2DConditionModel` with `use_linear_projection=True`: Stable Diffusion 2 and XL."""

KEY_MAPS = {"unet": KEYS, "unet-linear": LINEAR_KEYS}


def key_map_for(config: Mapping[str, Any]) -> KeyMap:
    """The map from the keys of `UNet2DConditionModel` of this configuration to those of `from_config(config)`.

    Raises:
        ConversionError: the port cannot honour the configuration.
    """
    read = UNetConfig(config)
    return _key_map(read.is_linear, read.is_text_only)


def key_map_of(unet: UNet) -> KeyMap:
    """The map from the keys of `UNet2DConditionModel` to those of this tree, whatever adapters are in it."""
    is_text_only = [block.find(TextOnlyTransformerBlock) is not None for block in unet.layers(DownBlock)]
    return _key_map(unet.find(LinearCrossAttention2d) is not None, is_text_only)


def _key_map(is_linear: bool, is_text_only: Sequence[bool]) -> KeyMap:
    """Receives: how transformers are entered, and for each level whether they attend to the text alone."""
    keys, attention = (LINEAR_KEYS, "LinearCrossAttention2d") if is_linear else (KEYS, "CrossAttention2d")
    last = len(is_text_only) - 1
    lines: dict[str, str] = {}
    for i, has_text_only in enumerate(is_text_only):
        if has_text_only:
            for side, number in (("down", i), ("up", last - i)):
                block = f"{side.title()}Blocks.{side.title()}Block" + (f"_{number + 1}" if last else "")
                upstream, port = f"{side}_blocks.{number}", f"{block}.{attention}"
                lines |= _transformer(upstream, port, "TextOnlyTransformerBlock", _TEXT_ONLY_BLOCK)
    return (keys | KeyMap(lines)).named(keys.name) if lines else keys


_SUMMARIES = (
    ("unet-sd1", SD1UNet, KEYS, "the UNet of Stable Diffusion 1"),
    ("unet-sd2", SD2UNet, LINEAR_KEYS, "the UNet of Stable Diffusion 2"),
    ("unet-sdxl", SDXLUNet, LINEAR_KEYS, "the UNet of Stable Diffusion XL"),
    ("unet-sdxl-refiner", SDXLRefinerUNet, LINEAR_KEYS, "the UNet of Stable Diffusion XL's refiner"),
)
PORTS: Mapping[str, Port] = {
    name: Port(name=name, build=build, key_map=keys, from_config=from_config, summary=summary)
    for name, build, keys, summary in _SUMMARIES
}
