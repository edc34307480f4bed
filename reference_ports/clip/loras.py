"""What LoRA files call the layers of CLIP.

Files of all layouts use the names of transformers, most with `text_model.` in front, which transformers 5 has given up
for the encoder alone. diffusers before 0.18 calls the projections of an attention `to_q`, `to_k`, `to_v` and `to_out`.
"""

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from reference_ports.clip.convert import (
    CLIP_KEYS,
    IMAGE_ENCODER_KEYS,
    IMAGE_MODEL_KEYS,
    IMAGE_PROJECTION_KEYS,
    TEXT_ENCODER_KEYS,
    TEXT_MODEL_KEYS,
    TEXT_PROJECTION_KEYS,
)
from reference_ports.clip.image import CLIPImageEncoder, CLIPImageModel, CLIPImageModelWithProjection
from reference_ports.clip.model import (
    CLIPTextEncoderBigG,
    CLIPTextEncoderH,
    CLIPTextEncoderL,
    clip_image_h,
    clip_image_l,
    clip_text_big_g,
    clip_text_h,
    clip_text_l,
)
from reference_ports.clip.text import CLIPTextEncoder, CLIPTextModel, CLIPTextModelWithProjection
from reference_ports.clip.whole import CLIP
from refiners.conversion import KeyMap
from refiners.conversion.loras import LoraNames, LoraTarget, register

_OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def lora_names(model: nn.Module, keys: KeyMap, part: str = "") -> LoraNames:
    """The names of the layers of CLIP, or of a part of it."""
    names = LoraNames.of(model, keys, title=keys.name, part=part)
    known = {**{name: name for name in names.paths}, **names.aliases}
    aliases = {
        spelling.removesuffix(new) + old: name
        for spelling, name in known.items()
        for old, new in _OLD.items()
        if spelling.endswith(f".self_attn.{new}")
    }
    prefixed = {name: f"text_model.{name}" for name in names.paths if f"text_model.{name}" in names.aliases}
    return LoraNames(
        names.paths,
        aliases={**names.aliases, **aliases},
        kohya=prefixed,
        layers=names.layers,
        title=names.title,
        part=part,
    )


_L, _H, _BIG_G = "CLIP's text encoder L", "OpenCLIP's text encoder H", "OpenCLIP's text encoder bigG"
_TEXT_ENCODERS: Mapping[str, Callable[[], nn.Module]] = {
    f"{_L}, of SD 1 and SDXL": CLIPTextEncoderL,
    f"{_H}, of SD 2": CLIPTextEncoderH,
    _BIG_G: CLIPTextEncoderBigG,
}
_TEXT_MODELS = {_L: clip_text_l, _H: clip_text_h, f"{_BIG_G}, the second of SDXL": clip_text_big_g}
_IMAGE_MODELS = {"CLIP's image encoder L": clip_image_l, "OpenCLIP's image encoder H": clip_image_h}
_NONE: Mapping[str, Callable[[], nn.Module]] = {}
_KINDS: tuple[tuple[type[nn.Module], KeyMap, str, Mapping[str, Callable[[], nn.Module]]], ...] = (
    (CLIPTextEncoder, TEXT_ENCODER_KEYS, "text_encoder", _TEXT_ENCODERS),
    (CLIPTextModel, TEXT_MODEL_KEYS, "text_encoder", _NONE),
    (CLIPTextModelWithProjection, TEXT_PROJECTION_KEYS, "text_encoder_2", _TEXT_MODELS),
    (CLIPImageEncoder, IMAGE_ENCODER_KEYS, "", _NONE),
    (CLIPImageModel, IMAGE_MODEL_KEYS, "", _NONE),
    (CLIPImageModelWithProjection, IMAGE_PROJECTION_KEYS, "", _IMAGE_MODELS),
    (CLIP, CLIP_KEYS, "", _NONE),
)
TARGETS = tuple(
    LoraTarget(title=keys.name, tree=tree, names=partial(lora_names, keys=keys, part=part), published=published)
    for tree, keys, part, published in _KINDS
)
register(*TARGETS)
