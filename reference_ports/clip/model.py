"""CLIP: a text encoder and an image encoder, trained to give a picture and its caption the same direction.

Both are the same transformer, normalised before each residual. The text encoder is causal and is read at the end of
the text; the image encoder cuts the picture in patches, adds a token of its own in front, and is read there.

Follows: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv:2103.00020);
Cherti et al., "Reproducible scaling laws for contrastive language-image learning" (arXiv:2212.07143), for H and bigG.
Upstream: `transformers.CLIPTextModel`, `CLIPTextModelWithProjection`, `CLIPVisionModel`,
`CLIPVisionModelWithProjection`, `CLIPModel` 5.23.0 with `attn_implementation="sdpa"`.

Differs from upstream:
- A model returns tensors, not a record; hidden state i is `encoder[: i + 1](x)`, all of them
  `encoder.with_hidden_states()(x)`, and skipping the last n layers (clip skip) is `encoder[: -1 - n]`.
- The encoders (last hidden state only) are trees of their own, which the models with a pooled output hold.
- Masks and positions are set before the forward and hold for that one.
- Pictures of another size are a choice made at construction (`interpolate_positions`), not at each call.
- There is no dropout.
"""

from typing import Unpack

import refiners.fluxion.layers as fl
from reference_ports.clip.image import CLIPImageEncoder as CLIPImageEncoder
from reference_ports.clip.image import CLIPImageModel as CLIPImageModel
from reference_ports.clip.image import CLIPImageModelWithProjection, CLIPImageNumbers
from reference_ports.clip.text import CLIPTextEncoder as CLIPTextEncoder
from reference_ports.clip.text import CLIPTextModel as CLIPTextModel
from reference_ports.clip.text import CLIPTextModelWithProjection, CLIPTextNumbers

TEXT_B: CLIPTextNumbers = {"embedding_dim": 512, "num_layers": 12, "num_heads": 8, "feedforward_dim": 2048}
TEXT_L: CLIPTextNumbers = {"embedding_dim": 768, "num_layers": 12, "num_heads": 12, "feedforward_dim": 3072}
TEXT_H: CLIPTextNumbers = {
    "embedding_dim": 1024,
    "num_layers": 24,
    "num_heads": 16,
    "feedforward_dim": 4096,
    "activation": fl.GeLU,
}
TEXT_BIG_G: CLIPTextNumbers = {
    "embedding_dim": 1280,
    "num_layers": 32,
    "num_heads": 20,
    "feedforward_dim": 5120,
    "activation": fl.GeLU,
}
IMAGE_B: CLIPImageNumbers = {
    "embedding_dim": 768,
    "num_layers": 12,
    "num_heads": 12,
    "feedforward_dim": 3072,
    "patch_size": 32,
}
IMAGE_L: CLIPImageNumbers = {"embedding_dim": 1024, "num_layers": 24, "num_heads": 16, "feedforward_dim": 4096}
IMAGE_H: CLIPImageNumbers = {
    "embedding_dim": 1280,
    "num_layers": 32,
    "num_heads": 16,
    "feedforward_dim": 5120,
    "activation": fl.GeLU,
}
IMAGE_BIG_G: CLIPImageNumbers = {
    "embedding_dim": 1664,
    "num_layers": 48,
    "num_heads": 16,
    "feedforward_dim": 8192,
    "activation": fl.GeLU,
}


class CLIPTextEncoderL(CLIPTextEncoder):
    """The text encoder of CLIP ViT-L/14, and of Stable Diffusion 1: last hidden state only."""

    def __init__(self, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(**TEXT_L, **factory)


class CLIPTextEncoderH(CLIPTextEncoder):
    """The text encoder of OpenCLIP ViT-H/14. Stable Diffusion 2 drops its last layer."""

    def __init__(self, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(**TEXT_H, **factory)


class CLIPTextEncoderBigG(CLIPTextEncoder):
    """The text encoder of OpenCLIP ViT-bigG/14, the second one of Stable Diffusion XL."""

    def __init__(self, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(**TEXT_BIG_G, **factory)


class CLIPImageEncoderL(CLIPImageEncoder):
    """The image encoder of CLIP ViT-L/14."""

    def __init__(self, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(**IMAGE_L, **factory)


class CLIPImageEncoderH(CLIPImageEncoder):
    """The image encoder of OpenCLIP ViT-H/14, which IP-Adapter reads."""

    def __init__(self, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(**IMAGE_H, **factory)


class CLIPImageEncoderBigG(CLIPImageEncoder):
    """The image encoder of OpenCLIP ViT-bigG/14, which IP-Adapter for Stable Diffusion XL reads."""

    def __init__(self, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(**IMAGE_BIG_G, **factory)


def clip_text_b(**factory: Unpack[fl.Factory]) -> CLIPTextModelWithProjection:
    """The text half of `clip-vit-base-patch32` and `clip-vit-base-patch16`."""
    return CLIPTextModelWithProjection(512, **TEXT_B, **factory)


def clip_text_l(**factory: Unpack[fl.Factory]) -> CLIPTextModelWithProjection:
    """The text half of `clip-vit-large-patch14`."""
    return CLIPTextModelWithProjection(768, **TEXT_L, **factory)


def clip_text_h(**factory: Unpack[fl.Factory]) -> CLIPTextModelWithProjection:
    """The text half of `CLIP-ViT-H-14-laion2B-s32B-b79K`."""
    return CLIPTextModelWithProjection(1024, **TEXT_H, **factory)


def clip_text_big_g(**factory: Unpack[fl.Factory]) -> CLIPTextModelWithProjection:
    """The text half of `CLIP-ViT-bigG-14-laion2B-39B-b160k`."""
    return CLIPTextModelWithProjection(1280, **TEXT_BIG_G, **factory)


def clip_image_b(**factory: Unpack[fl.Factory]) -> CLIPImageModelWithProjection:
    """The image half of `clip-vit-base-patch32`."""
    return CLIPImageModelWithProjection(512, **IMAGE_B, **factory)


def clip_image_l(**factory: Unpack[fl.Factory]) -> CLIPImageModelWithProjection:
    """The image half of `clip-vit-large-patch14`."""
    return CLIPImageModelWithProjection(768, **IMAGE_L, **factory)


def clip_image_h(**factory: Unpack[fl.Factory]) -> CLIPImageModelWithProjection:
    """The image half of `CLIP-ViT-H-14-laion2B-s32B-b79K`."""
    return CLIPImageModelWithProjection(1024, **IMAGE_H, **factory)


def clip_image_big_g(**factory: Unpack[fl.Factory]) -> CLIPImageModelWithProjection:
    """The image half of `CLIP-ViT-bigG-14-laion2B-39B-b160k`."""
    return CLIPImageModelWithProjection(1280, **IMAGE_BIG_G, **factory)
