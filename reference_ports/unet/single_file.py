"""UNets as single files hold them: the names of the original code, brought to those of diffusers.

The code that Stable Diffusion was trained with (CompVis' latent-diffusion, Stability's generative-models) numbers its
blocks through: `input_blocks.4` is whatever comes fourth on the way down. diffusers 0.42.1 numbers them level by level:
`down_blocks.1.resnets.0`. Which number is what follows from the layers per level, so the table is made by a function.
Checked against `diffusers.loaders.single_file_utils.convert_ldm_unet_checkpoint`.

Differs from upstream: keys that it skips in silence are errors here, and the way back exists.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from refiners.conversion import KeyMap

_AROUND = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = {
    **{f"middle_block.{2 * i}.{old}": f"mid_block.resnets.{i}.{new}" for i in (0, 1) for old, new in _RESNET.items()},
    "middle_block.1": "mid_block.attentions.0",
}


def single_file_keys(config: Mapping[str, Any]) -> KeyMap:
    """The key map from a single file's UNet, without its prefix, to the keys of `UNet2DConditionModel`.

    Receives:
        config: the configuration of the UNet, as in its config.json.

    Example:
        >>> keys = single_file_keys({"block_out_channels": [32, 64], "layers_per_block": 2})
        >>> keys.lines["input_blocks.4.0.in_layers.0"], keys.lines["output_blocks.2.1"]
        ('down_blocks.1.resnets.0.norm1', 'up_blocks.0.upsamplers.0')
    """
    levels = len(config.get("block_out_channels", (320, 640, 1280, 1280)))
    layers: int | list[int] = config.get("layers_per_block", 2)
    per_level = [layers] * levels if isinstance(layers, int) else list(layers)
    lines = {
        **_AROUND,
        **_MIDDLE,
        **_label_embedding(config),
        **dict(_way_down(per_level, config)),
        **dict(_way_up(per_level[::-1], config)),
    }
    return KeyMap(lines, name="the UNet of the single file")


def _label_embedding(config: Mapping[str, Any]) -> dict[str, str]:
    """What is told beside the text: sizes and pooled text (SDXL), a vector, or the number of a class."""
    if config.get("addition_embed_type") == "text_time":
        return {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
    if config.get("class_embed_type") in ("timestep", "projection"):
        return {"label_emb.0.0": "class_embedding.linear_1", "label_emb.0.2": "class_embedding.linear_2"}
    return {"label_emb": "class_embedding"} if config.get("num_class_embeds") is not None else {}


def _resnet(old: str, new: str) -> Iterator[tuple[str, str]]:
    for before, after in _RESNET.items():
        yield f"{old}.{before}", f"{new}.{after}"


def _way_down(per_level: list[int], config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kinds = config.get("down_block_types", ("CrossAttnDownBlock2D",) * (len(per_level) - 1) + ("DownBlock2D",))
    number = 1
    for level, layers in enumerate(per_level):
        for layer in range(layers):
            yield from _resnet(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{layer}")
            if "CrossAttn" in kinds[level]:
                yield f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{layer}"
            number += 1
        if level < len(per_level) - 1:
            yield f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            number += 1


def _way_up(per_level: list[int], config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kinds = config.get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(per_level) - 1))
    number = 0
    for level, layers in enumerate(per_level):
        attends = "CrossAttn" in kinds[level]
        for layer in range(layers + 1):
            yield from _resnet(f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{layer}")
            if attends:
                yield f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{layer}"
            if layer == layers and level < len(per_level) - 1:
                # The upsampler is the next part of the same block.
                yield f"output_blocks.{number}.{2 if attends else 1}", f"up_blocks.{level}.upsamplers.0"
            number += 1
