"""CLIP as published: both halves of OpenAI's and OpenCLIP's models, whose keys and shapes are compared on `meta`."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from reference_ports import clip
from refiners.parity import FullSize


def text_size(width: int, layers: int, heads: int, port: Callable[[], nn.Module], act: str = "gelu") -> FullSize:
    """A published text half."""
    settings = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act=act,
    )
    return FullSize(upstream=lambda: CLIPTextModelWithProjection(settings), port=port)


def image_size(
    width: int, inner: int, layers: int, heads: int, projection: int, port: Callable[[], nn.Module], **more: Any
) -> FullSize:
    """A published image half."""
    settings = CLIPVisionConfig(
        **{
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "projection_dim": projection,
            "patch_size": 14,
            "hidden_act": "gelu",
            **more,
        }
    )
    return FullSize(upstream=lambda: CLIPVisionModelWithProjection(settings), port=port)


TEXT_SIZES = {
    "clip-text": FullSize(
        upstream=text_size(768, 12, 12, clip.clip_text_l).upstream,
        port=clip.CLIPTextEncoderL,
        key_map=clip.TEXT_ENCODER_KEYS,
    ),
    "clip-text-b": text_size(512, 12, 8, clip.clip_text_b, "quick_gelu"),
    "clip-text-l": text_size(768, 12, 12, clip.clip_text_l, "quick_gelu"),
    "clip-text-h": text_size(1024, 24, 16, clip.clip_text_h),
    "clip-text-bigg": text_size(1280, 32, 20, clip.clip_text_big_g),
}
IMAGE_SIZES = {
    "clip-image": FullSize(
        upstream=image_size(1024, 4096, 24, 16, 768, clip.clip_image_l).upstream,
        port=clip.CLIPImageEncoderL,
        key_map=clip.IMAGE_ENCODER_KEYS,
    ),
    "clip-image-b": image_size(768, 3072, 12, 12, 512, clip.clip_image_b, patch_size=32, hidden_act="quick_gelu"),
    "clip-image-l": image_size(1024, 4096, 24, 16, 768, clip.clip_image_l, hidden_act="quick_gelu"),
    "clip-image-h": image_size(1280, 5120, 32, 16, 1024, clip.clip_image_h),
    "clip-image-bigg": image_size(1664, 8192, 48, 16, 1280, clip.clip_image_big_g),
}
