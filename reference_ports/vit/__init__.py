"""ViT: a transformer over the patches of a picture. See README.md beside this file."""

from reference_ports.vit.convert import (
    ENCODER_KEYS,
    KEY_MAPS,
    MASKED_ENCODER_KEYS,
    PORTS,
    VIT_KEYS,
    encoder_from_config,
    masked_encoder_from_config,
    vit_from_config,
)
from reference_ports.vit.model import MaskedViTEncoder, ViT, ViTEncoder, vit_b16, vit_b32, vit_l16, vit_l32

__all__ = [
    "ENCODER_KEYS",
    "KEY_MAPS",
    "MASKED_ENCODER_KEYS",
    "PORTS",
    "VIT_KEYS",
    "MaskedViTEncoder",
    "ViT",
    "ViTEncoder",
    "encoder_from_config",
    "masked_encoder_from_config",
    "vit_b16",
    "vit_b32",
    "vit_from_config",
    "vit_l16",
    "vit_l32",
]
