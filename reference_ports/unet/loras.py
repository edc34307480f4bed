"""What LoRA files call the layers of UNets.

Files of diffusers, of peft, and of kohya for Stable Diffusion 1 and 2 use the names of `UNet2DConditionModel`. Kohya's
scripts train Stable Diffusion XL on the original code, whose blocks are numbered through: `input_blocks_4_1_…`. All of
them are understood for every UNet; what is written for kohya is what its scripts write for that model. diffusers before
0.18 calls the last projection of an attention `to_out`, without the number of the layer in it.
"""

from collections.abc import Collection, Mapping
from typing import Any

from reference_ports.unet.convert import key_map_of
from reference_ports.unet.model import SD1UNet, SD2UNet, SDXLRefinerUNet, SDXLUNet, UNet
from reference_ports.unet.single_file import single_file_keys
from refiners.conversion.loras import LoraNames, LoraTarget, register


def lora_names(unet: UNet) -> LoraNames:
    """The names of the layers of a UNet."""
    names = LoraNames.of(unet, key_map_of(unet), title=_title(unet), part="unet")
    originals = _original_names(names.paths)
    aliases = {original: name for name, original in originals.items()}
    aliases |= {name.removesuffix(".0"): name for name in names.paths if name.endswith(".to_out.0")}
    return LoraNames(
        names.paths,
        aliases={**names.aliases, **aliases},
        kohya=originals if _is_xl(names.paths) else {},
        layers=names.layers,
        title=names.title,
        part=names.part,
    )


def _is_xl(names: Collection[str]) -> bool:
    return "add_embedding.linear_1" in names


def _title(unet: UNet) -> str:
    widths = " or ".join(map(str, unet.text_dims))
    return f"a UNet for texts of width {widths}" if widths else "a UNet without text"


def _original_names(names: Collection[str]) -> dict[str, str]:
    """What the original code calls the layers of these names."""
    keys = single_file_keys(_config_of(names))
    found = {name: keys.source_of(f"{name}.weight") for name in names}
    return {name: key.removesuffix(".weight") for name, key in found.items() if key is not None}


def _config_of(names: Collection[str]) -> Mapping[str, Any]:
    """What of its configuration the names of a UNet's layers tell."""
    resnets = {tuple(map(int, name.split(".")[1:4:2])) for name in names if _is_below(name, "down_blocks", "resnets")}
    levels = 1 + max((level for level, _ in resnets), default=0)
    attends = {side: _attending(names, f"{side}_blocks") for side in ("down", "up")}
    config: dict[str, Any] = {
        "block_out_channels": [0] * levels,
        "layers_per_block": [sum(level == i for level, _ in resnets) for i in range(levels)],
        "down_block_types": ["CrossAttn" if i in attends["down"] else "" for i in range(levels)],
        "up_block_types": ["CrossAttn" if i in attends["up"] else "" for i in range(levels)],
    }
    if _is_xl(names):
        config["addition_embed_type"] = "text_time"
    elif "class_embedding.linear_1" in names:
        config["class_embed_type"] = "projection"
    elif "class_embedding" in names:
        config["num_class_embeds"] = 1
    return config


def _attending(names: Collection[str], side: str) -> set[int]:
    return {int(name.split(".")[1]) for name in names if _is_below(name, side, "attentions")}


def _is_below(name: str, side: str, kind: str) -> bool:
    segments = name.split(".")
    return segments[0] == side and segments[2] == kind and name.endswith((".conv1", ".proj_in"))


TARGET = LoraTarget(
    title="a UNet of Stable Diffusion",
    tree=UNet,
    names=lora_names,
    published={
        "the UNet of Stable Diffusion 1": SD1UNet,
        "the UNet of Stable Diffusion 2": SD2UNet,
        "the UNet of Stable Diffusion XL": SDXLUNet,
        "the UNet of Stable Diffusion XL's refiner": SDXLRefinerUNet,
    },
)
register(TARGET)
