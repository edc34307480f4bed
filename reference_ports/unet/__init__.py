"""The UNets of Stable Diffusion 1, 2 and XL. See README.md beside this file."""

from reference_ports.unet.config import from_config
from reference_ports.unet.convert import KEY_MAPS, KEYS, LINEAR_KEYS, PORTS, key_map_for
from reference_ports.unet.embeddings import TimestepEncoder
from reference_ports.unet.loras import lora_names
from reference_ports.unet.model import (
    DownBlocks,
    InputBlock,
    OutputBlock,
    SD1UNet,
    SD2UNet,
    SDXLRefinerUNet,
    SDXLUNet,
    UNet,
    UpBlocks,
)
from reference_ports.unet.stages import (
    ConcatenateSkip,
    DownBlock,
    MiddleBlock,
    Stage,
    StoreSkip,
    TimedResidualBlock,
    UpBlock,
    mirror,
)
from reference_ports.unet.transformer import (
    CrossAttention,
    CrossAttention2d,
    SelfAttention,
    TextAttention,
    TransformerBlock,
)

__all__ = [
    "KEYS",
    "KEY_MAPS",
    "LINEAR_KEYS",
    "PORTS",
    "ConcatenateSkip",
    "CrossAttention",
    "CrossAttention2d",
    "DownBlock",
    "DownBlocks",
    "InputBlock",
    "MiddleBlock",
    "OutputBlock",
    "SD1UNet",
    "SD2UNet",
    "SDXLRefinerUNet",
    "SDXLUNet",
    "SelfAttention",
    "Stage",
    "StoreSkip",
    "TextAttention",
    "TimedResidualBlock",
    "TimestepEncoder",
    "TransformerBlock",
    "UNet",
    "UpBlock",
    "UpBlocks",
    "from_config",
    "key_map_for",
    "lora_names",
    "mirror",
]
