"""Published weights and configurations of CLIP, for the trees of `reference_ports.clip.model`.

The key maps follow the state dicts of transformers 5.23.0, where the towers alone have no prefix and everything else
has `text_model.` or `vision_model.`. Each reads both spellings, files that hold position ids, and files that hold the
other half of CLIP, which is left out.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Unpack

from torch import nn

import refiners.fluxion.layers as fl
from reference_ports.blocks.activations import ACTIVATIONS
from reference_ports.clip.image import CLIPImageEncoder, CLIPImageModel, CLIPImageModelWithProjection, CLIPImageNumbers
from reference_ports.clip.model import (
    CLIPImageEncoderL,
    CLIPTextEncoderL,
    clip_image_b,
    clip_image_big_g,
    clip_image_h,
    clip_image_l,
    clip_text_b,
    clip_text_big_g,
    clip_text_h,
    clip_text_l,
)
from reference_ports.clip.single_file import OPEN_CLIP_PROJECTION_KEYS, OPEN_CLIP_TEXT_KEYS, POSITION_IDS
from reference_ports.clip.text import (
    CLIPTextEncoder,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTextNumbers,
    FirstId,
    HighestId,
)
from reference_ports.clip.whole import CLIP
from refiners.conversion import TRANSFORMERS_NEUTRAL, TRANSFORMERS_ONLY, ConfigReader, KeyMap, Port

_LAYER = "TransformerLayer_{i+1}"
_ATTENTION = f"{_LAYER}.AttentionResidual.SelfAttention"
_FEED_FORWARD = f"{_LAYER}.FeedForwardResidual.FeedForward"
_LAYERS = KeyMap(
    {
        "encoder.layers.{i}.layer_norm1": f"{_LAYER}.AttentionResidual.LayerNorm",
        "encoder.layers.{i}.self_attn.q_proj": f"{_ATTENTION}.Projections.Query",
        "encoder.layers.{i}.self_attn.k_proj": f"{_ATTENTION}.Projections.Key",
        "encoder.layers.{i}.self_attn.v_proj": f"{_ATTENTION}.Projections.Value",
        "encoder.layers.{i}.self_attn.out_proj": f"{_ATTENTION}.Linear",
        "encoder.layers.{i}.layer_norm2": f"{_LAYER}.FeedForwardResidual.LayerNorm",
        "encoder.layers.{i}.mlp.fc1": f"{_FEED_FORWARD}.Linear_1",
        "encoder.layers.{i}.mlp.fc2": f"{_FEED_FORWARD}.Linear_2",
    }
)

_OTHER_HALF = "belongs to the other half of CLIP"

_TEXT = _LAYERS | KeyMap(
    {
        "embeddings.token_embedding": "TextEmbeddings.TokenEncoder",
        "embeddings.position_embedding": "TextEmbeddings.PositionalEncoder.Embedding",
        "final_layer_norm": "LayerNorm",
    },
    ignore={"embeddings.position_ids": POSITION_IDS},
)
_IMAGE = _LAYERS | KeyMap(
    {
        "embeddings.class_embedding": "ImageEmbeddings.PlacedTokens.ClassTokenAndPatches.ClassToken.weight",
        "embeddings.patch_embedding": "ImageEmbeddings.PlacedTokens.ClassTokenAndPatches.PatchEncoder.Conv2d",
        "embeddings.position_embedding": "ImageEmbeddings.PlacedTokens.ImagePositions",
        "pre_layrnorm": "ImageEmbeddings.LayerNorm",
    },
    ignore={"embeddings.position_ids": POSITION_IDS},
)
_NO_IMAGE = KeyMap(
    {}, ignore={"vision_model": _OTHER_HALF, "visual_projection": _OTHER_HALF, "logit_scale": _OTHER_HALF}
)
_NO_TEXT = KeyMap({}, ignore={"text_model": _OTHER_HALF, "text_projection": _OTHER_HALF, "logit_scale": _OTHER_HALF})
_NO_TEXT_HEAD = KeyMap(
    {}, ignore={"text_projection": "comes after the last hidden state"}, aliases={"text_model.{rest}": "{rest}"}
)
_NO_IMAGE_HEAD = KeyMap(
    {}, ignore={"visual_projection": "comes after the last hidden state"}, aliases={"vision_model.{rest}": "{rest}"}
)

TEXT_ENCODER_KEYS = (_TEXT | _NO_TEXT_HEAD | _NO_IMAGE).named("CLIP's text encoder")
"""The keys of `CLIPTextModel`, for `CLIPTextEncoder`."""

TEXT_MODEL_KEYS = (_TEXT.under(port="CLIPTextEncoder") | _NO_TEXT_HEAD | _NO_IMAGE).named("CLIP's text model")
"""The keys of `CLIPTextModel`, for `CLIPTextModel`."""

TEXT_PROJECTION_KEYS = (
    _TEXT.under(upstream="text_model", port="CLIPTextEncoder")
    | KeyMap({"text_projection": "StatesAndPooled.TextEmbedding.Linear"})
    | _NO_IMAGE
).named("CLIP's text model with projection")
"""The keys of `CLIPTextModelWithProjection`, for the port of that name."""

IMAGE_ENCODER_KEYS = (
    _IMAGE | KeyMap({}, ignore={"post_layernorm": "comes after the last hidden state"}) | _NO_IMAGE_HEAD | _NO_TEXT
).named("CLIP's image encoder")
"""The keys of `CLIPVisionModel`, for `CLIPImageEncoder`."""

IMAGE_MODEL_KEYS = (
    _IMAGE.under(port="CLIPImageEncoder")
    | KeyMap({"post_layernorm": "StatesAndPooled.PooledClassToken.LayerNorm"})
    | _NO_IMAGE_HEAD
    | _NO_TEXT
).named("CLIP's image model")
"""The keys of `CLIPVisionModel`, for `CLIPImageModel`."""

IMAGE_PROJECTION_KEYS = (
    _IMAGE.under(upstream="vision_model", port="CLIPImageEncoder")
    | KeyMap(
        {
            "vision_model.post_layernorm": "StatesAndPooled.ImageEmbedding.PooledClassToken.LayerNorm",
            "visual_projection": "StatesAndPooled.ImageEmbedding.Linear",
        }
    )
    | _NO_TEXT
).named("CLIP's image model with projection")
"""The keys of `CLIPVisionModelWithProjection`, for `CLIPImageModelWithProjection`."""

_TEXT_HALF, _IMAGE_HALF = "Directions.TextDirection", "Directions.ImageDirection"
_IMAGE_HEAD = f"{_IMAGE_HALF}.CLIPImageModelWithProjection.StatesAndPooled.ImageEmbedding"
CLIP_KEYS = (
    _TEXT.under(upstream="text_model", port=f"{_TEXT_HALF}.CLIPTextModelWithProjection.CLIPTextEncoder")
    | _IMAGE.under(upstream="vision_model", port=f"{_IMAGE_HALF}.CLIPImageModelWithProjection.CLIPImageEncoder")
    | KeyMap(
        {
            "text_projection": f"{_TEXT_HALF}.CLIPTextModelWithProjection.StatesAndPooled.TextEmbedding.Linear",
            "vision_model.post_layernorm": f"{_IMAGE_HEAD}.PooledClassToken.LayerNorm",
            "visual_projection": f"{_IMAGE_HEAD}.Linear",
            "logit_scale": "Similarity.weight",
        }
    )
).named("CLIP")
"""The keys of `CLIPModel`, for `CLIP`."""

KEY_MAPS = {
    "clip": CLIP_KEYS,
    "clip-text-encoder": TEXT_ENCODER_KEYS,
    "clip-text-model": TEXT_MODEL_KEYS,
    "clip-text-projection": TEXT_PROJECTION_KEYS,
    "clip-image-encoder": IMAGE_ENCODER_KEYS,
    "clip-image-model": IMAGE_MODEL_KEYS,
    "clip-image-projection": IMAGE_PROJECTION_KEYS,
}

_NEUTRAL = {
    **TRANSFORMERS_NEUTRAL,
    "attention_dropout": "dropout acts in training only, and the port has none",
    "dropout": "dropout acts in training only, and the port has none",
    "bos_token_id": "the ids are given ready-made",
    "pad_token_id": "the ids are given ready-made, and its vector is trained like any other",
    "sep_token_id": "the ids are given ready-made",
    "tf_legacy_loss": "the port has no loss",
    "tie_word_embeddings": "the port has no language-modelling head",
}
_TEXT_ONLY = {**TRANSFORMERS_ONLY, "model_type": "clip_text_model"}
_IMAGE_ONLY = {**TRANSFORMERS_ONLY, "model_type": "clip_vision_model"}
_IMAGE_NEUTRAL = {**_NEUTRAL, "eos_token_id": "pictures have no such token"}
_WHOLE_ONLY = {**TRANSFORMERS_ONLY, "model_type": "clip"}
_WHOLE_NEUTRAL = {
    **_NEUTRAL,
    "logit_scale_init_value": "the scale comes with the weights",
    "text_config": "read by the text half",
    "text_config_dict": "repeats text_config",
    "vision_config": "read by the image half",
    "vision_config_dict": "repeats vision_config",
}


def _half(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The configuration of one half, which may stand by itself or in that of the whole CLIP."""
    if config.get("model_type") != "clip":
        return config
    half: Mapping[str, Any] = config.get(name) or {}
    # The whole model projects both halves to its own width, whatever theirs say.
    return {**half, "projection_dim": config.get("projection_dim", 512)}


def _read_text(config: Mapping[str, Any]) -> tuple[CLIPTextNumbers, int, Callable[[], nn.Module]]:
    """The numbers of the encoder, the width of the projection, and how the end of a text is found."""
    with ConfigReader(_half(config, "text_config"), "CLIP's text half", only=_TEXT_ONLY, neutral=_NEUTRAL) as read:
        numbers: CLIPTextNumbers = {
            "vocabulary_size": read.integer("vocab_size", 49_408),
            "embedding_dim": read.integer("hidden_size", 512),
            "num_layers": read.integer("num_hidden_layers", 12),
            "num_heads": read.integer("num_attention_heads", 8),
            "feedforward_dim": read.integer("intermediate_size", 2048),
            "num_positions": read.integer("max_position_embeddings", 77),
            "activation": read.choice("hidden_act", ACTIVATIONS, "quick_gelu"),
            "layer_norm_eps": read.number("layer_norm_eps", 1e-5),
        }
        projection_dim = read.integer("projection_dim", 512)
        end_of_text_id = read.integer("eos_token_id", 49_407)
    # Configurations written before 2023 say 2, which never was the id of the end: upstream then takes the highest id.
    return numbers, projection_dim, HighestId if end_of_text_id == 2 else partial(FirstId, end_of_text_id)


def _read_image(config: Mapping[str, Any]) -> tuple[CLIPImageNumbers, int]:
    """The numbers of the encoder, and the width of the projection."""
    half = _half(config, "vision_config")
    with ConfigReader(half, "CLIP's image half", only=_IMAGE_ONLY, neutral=_IMAGE_NEUTRAL) as read:
        numbers: CLIPImageNumbers = {
            "embedding_dim": read.integer("hidden_size", 768),
            "num_layers": read.integer("num_hidden_layers", 12),
            "num_heads": read.integer("num_attention_heads", 12),
            "feedforward_dim": read.integer("intermediate_size", 3072),
            "image_size": read.integer("image_size", 224),
            "patch_size": read.integer("patch_size", 32),
            "channels": read.integer("num_channels", 3),
            "activation": read.choice("hidden_act", ACTIVATIONS, "quick_gelu"),
            "layer_norm_eps": read.number("layer_norm_eps", 1e-5),
        }
        projection_dim = read.integer("projection_dim", 512)
    return numbers, projection_dim


def text_encoder_from_config(config: Mapping[str, Any], **factory: Unpack[fl.Factory]) -> CLIPTextEncoder:
    """`CLIPTextEncoder` (last hidden state only) of a `CLIPTextConfig`, or of a whole `CLIPConfig`, as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    return CLIPTextEncoder(**_read_text(config)[0], **factory)


def text_model_from_config(config: Mapping[str, Any], **factory: Unpack[fl.Factory]) -> CLIPTextModel:
    """`CLIPTextModel` of a `CLIPTextConfig`, or of a whole `CLIPConfig`, as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    numbers, _, end_of_text = _read_text(config)
    return CLIPTextModel(end_of_text, **numbers, **factory)


def text_projection_from_config(
    config: Mapping[str, Any], **factory: Unpack[fl.Factory]
) -> CLIPTextModelWithProjection:
    """`CLIPTextModelWithProjection` of a `CLIPTextConfig`, or of a whole `CLIPConfig`, as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    numbers, projection_dim, end_of_text = _read_text(config)
    return CLIPTextModelWithProjection(projection_dim, end_of_text, **numbers, **factory)


def image_encoder_from_config(
    config: Mapping[str, Any], interpolate_positions: bool = False, **factory: Unpack[fl.Factory]
) -> CLIPImageEncoder:
    """`CLIPImageEncoder` (last hidden state only) of a `CLIPVisionConfig`, or of a whole `CLIPConfig`, as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    return CLIPImageEncoder(**_read_image(config)[0], interpolate_positions=interpolate_positions, **factory)


def image_model_from_config(
    config: Mapping[str, Any], interpolate_positions: bool = False, **factory: Unpack[fl.Factory]
) -> CLIPImageModel:
    """`CLIPImageModel` of a `CLIPVisionConfig`, or of a whole `CLIPConfig`, as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    return CLIPImageModel(**_read_image(config)[0], interpolate_positions=interpolate_positions, **factory)


def image_projection_from_config(
    config: Mapping[str, Any], interpolate_positions: bool = False, **factory: Unpack[fl.Factory]
) -> CLIPImageModelWithProjection:
    """`CLIPImageModelWithProjection` of a `CLIPVisionConfig`, or of a whole `CLIPConfig`, as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    numbers, projection_dim = _read_image(config)
    return CLIPImageModelWithProjection(
        projection_dim, **numbers, interpolate_positions=interpolate_positions, **factory
    )


def clip_from_config(
    config: Mapping[str, Any], interpolate_positions: bool = False, **factory: Unpack[fl.Factory]
) -> CLIP:
    """`CLIP`, both halves, of a `CLIPConfig` as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    with ConfigReader(config, "CLIP", only=_WHOLE_ONLY, neutral=_WHOLE_NEUTRAL) as read:
        read.integer("projection_dim", 512)
    text = text_projection_from_config(config, **factory)
    image = image_projection_from_config(config, interpolate_positions, **factory)
    return CLIP(text, image)


def _text_port(name: str, build: Callable[[], nn.Module], summary: str) -> Port:
    return Port(
        name=name,
        build=build,
        key_map=TEXT_PROJECTION_KEYS,
        from_config=text_projection_from_config,
        summary=summary,
        layouts=(OPEN_CLIP_PROJECTION_KEYS,),
    )


def _image_port(name: str, build: Callable[[], nn.Module], summary: str) -> Port:
    return Port(
        name=name, build=build, key_map=IMAGE_PROJECTION_KEYS, from_config=image_projection_from_config, summary=summary
    )


PORTS: Mapping[str, Port] = {
    port.name: port
    for port in (
        Port(
            name="clip-text",
            build=CLIPTextEncoderL,
            key_map=TEXT_ENCODER_KEYS,
            from_config=text_encoder_from_config,
            summary="text encoder of CLIP without a head; that of ViT-L/14 unless a config says otherwise",
            layouts=(
                OPEN_CLIP_TEXT_KEYS | KeyMap({}, ignore={"text_projection": "comes after the last hidden state"}),
            ),
        ),
        Port(
            name="clip-image",
            build=CLIPImageEncoderL,
            key_map=IMAGE_ENCODER_KEYS,
            from_config=image_encoder_from_config,
            summary="image encoder of CLIP without a head; that of ViT-L/14 unless a config says otherwise",
        ),
        _text_port("clip-text-b", clip_text_b, "text half of CLIP ViT-B: 12 layers of 512"),
        _text_port("clip-text-l", clip_text_l, "text half of CLIP ViT-L/14: 12 layers of 768"),
        _text_port("clip-text-h", clip_text_h, "text half of OpenCLIP ViT-H/14: 24 layers of 1024"),
        _text_port("clip-text-bigg", clip_text_big_g, "text half of OpenCLIP ViT-bigG/14: 32 layers of 1280"),
        _image_port("clip-image-b", clip_image_b, "image half of CLIP ViT-B/32: 12 layers of 768"),
        _image_port("clip-image-l", clip_image_l, "image half of CLIP ViT-L/14: 24 layers of 1024"),
        _image_port("clip-image-h", clip_image_h, "image half of OpenCLIP ViT-H/14: 32 layers of 1280"),
        _image_port("clip-image-bigg", clip_image_big_g, "image half of OpenCLIP ViT-bigG/14: 48 layers of 1664"),
    )
}
