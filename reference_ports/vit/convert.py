"""Published weights and configurations of ViT, for the trees of `reference_ports.vit.model`.

The key maps follow the state dict of `transformers.ViTModel` 5.23.0. They also read the published files, which have the
names of transformers 4 (`encoder.layer.{i}.attention.attention.query`, …), a prefix `vit.`, and heads that are left
out.
"""

from collections.abc import Mapping
from typing import Any, Unpack

import refiners.fluxion.layers as fl
from reference_ports.blocks.activations import ACTIVATIONS
from reference_ports.vit.model import MaskedViTEncoder, ViT, ViTEncoder, ViTNumbers, vit_b16, vit_b32, vit_l16, vit_l32
from refiners.conversion import TRANSFORMERS_NEUTRAL, TRANSFORMERS_ONLY, ConfigReader, KeyMap, Port, Squeeze

_PATCHES = "ImageEmbeddings.ClassTokenAndPatches.PatchEncoder"
_LAYER = "TransformerLayer_{i+1}"
_ATTENTION = f"{_LAYER}.AttentionResidual.SelfAttention"
_FEED_FORWARD = f"{_LAYER}.FeedForwardResidual.FeedForward"
_OLD = "encoder.layer.{i}"

_ENCODER = KeyMap(
    {
        "embeddings.cls_token": Squeeze("ImageEmbeddings.ClassTokenAndPatches.ClassToken.weight", dim=0, count=2),
        "embeddings.patch_embeddings.projection": f"{_PATCHES}.Conv2d",
        "embeddings.position_embeddings": Squeeze("ImageEmbeddings.GridPositions.weight", dim=0),
        "layers.{i}.layernorm_before": f"{_LAYER}.AttentionResidual.LayerNorm",
        "layers.{i}.attention.q_proj": f"{_ATTENTION}.Projections.Query",
        "layers.{i}.attention.k_proj": f"{_ATTENTION}.Projections.Key",
        "layers.{i}.attention.v_proj": f"{_ATTENTION}.Projections.Value",
        "layers.{i}.attention.o_proj": f"{_ATTENTION}.Linear",
        "layers.{i}.layernorm_after": f"{_LAYER}.FeedForwardResidual.LayerNorm",
        "layers.{i}.mlp.fc1": f"{_FEED_FORWARD}.Linear_1",
        "layers.{i}.mlp.fc2": f"{_FEED_FORWARD}.Linear_2",
        "layernorm": "LayerNorm",
    },
    ignore={
        "classifier": "the head of a classifier is no part of ViTModel",
        "decoder": "the head that guesses masked patches is no part of ViTModel",
    },
    aliases={
        "vit.{rest}": "{rest}",
        f"{_OLD}.layernorm_{{side}}.{{p}}": "layers.{i}.layernorm_{side}.{p}",
        f"{_OLD}.attention.attention.query.{{p}}": "layers.{i}.attention.q_proj.{p}",
        f"{_OLD}.attention.attention.key.{{p}}": "layers.{i}.attention.k_proj.{p}",
        f"{_OLD}.attention.attention.value.{{p}}": "layers.{i}.attention.v_proj.{p}",
        f"{_OLD}.attention.output.dense.{{p}}": "layers.{i}.attention.o_proj.{p}",
        f"{_OLD}.intermediate.dense.{{p}}": "layers.{i}.mlp.fc1.{p}",
        f"{_OLD}.output.dense.{{p}}": "layers.{i}.mlp.fc2.{p}",
    },
)
_NO_MASK = KeyMap({}, ignore={"embeddings.mask_token": "this port masks no patches: see MaskedViTEncoder"})
_NO_POOLER = KeyMap({}, ignore={"pooler": "comes after the last hidden state"})

VIT_KEYS = (_ENCODER | _NO_MASK | KeyMap({"pooler.dense": "StatesAndPooled.Pooler.Linear"})).named("ViT")
"""The keys of `ViTModel`, for `ViT`."""

ENCODER_KEYS = (_ENCODER | _NO_MASK | _NO_POOLER).named("ViT's encoder")
"""The keys of `ViTModel` with or without its pooler, for `ViTEncoder`."""

MASKED_ENCODER_KEYS = (
    _ENCODER | _NO_POOLER | KeyMap({"embeddings.mask_token": Squeeze(f"{_PATCHES}.MaskPatches.MaskToken.weight", 0, 2)})
).named("ViT's encoder with a mask token")
"""The keys of `ViTModel` with a mask token, for `MaskedViTEncoder`."""

KEY_MAPS = {"vit": VIT_KEYS, "vit-encoder": ENCODER_KEYS, "vit-masked-encoder": MASKED_ENCODER_KEYS}

_ONLY = {**TRANSFORMERS_ONLY, "model_type": "vit"}
_NO_DROPOUT = "dropout acts in training only, and the port has none"
_NEUTRAL = {
    **TRANSFORMERS_NEUTRAL,
    "attention_probs_dropout_prob": _NO_DROPOUT,
    "hidden_dropout_prob": _NO_DROPOUT,
    "encoder_stride": "belongs to the head that guesses masked patches",
    "pooler_act": "read by the model with a pooler",
    "pooler_output_size": "read by the model with a pooler; null is the width of the model",
    "tie_word_embeddings": "the port has no language-modelling head",
}


def _read(read: ConfigReader) -> ViTNumbers:
    return {
        "embedding_dim": read.integer("hidden_size", 768),
        "num_layers": read.integer("num_hidden_layers", 12),
        "num_heads": read.integer("num_attention_heads", 12),
        "feedforward_dim": read.integer("intermediate_size", 3072),
        "image_size": read.integer("image_size", 224),
        "patch_size": read.integer("patch_size", 16),
        "channels": read.integer("num_channels", 3),
        "activation": read.choice("hidden_act", ACTIVATIONS, "gelu"),
        "layer_norm_eps": read.number("layer_norm_eps", 1e-12),
        "use_projection_bias": read.flag("qkv_bias", True),
    }


def vit_from_config(
    config: Mapping[str, Any], interpolate_positions: bool = False, **factory: Unpack[fl.Factory]
) -> ViT:
    """`ViT`, the model with its pooler, of a `ViTConfig` as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    with ConfigReader(config, "ViT", only=_ONLY, neutral=_NEUTRAL) as read:
        numbers = _read(read)
        width = read.integer("pooler_output_size") if read.has("pooler_output_size") else None
        activation = read.choice("pooler_act", ACTIVATIONS, "tanh")
    pooled_dim = None if width == numbers.get("embedding_dim") else width
    return ViT(pooled_dim, activation, **numbers, interpolate_positions=interpolate_positions, **factory)


def encoder_from_config(
    config: Mapping[str, Any], interpolate_positions: bool = False, **factory: Unpack[fl.Factory]
) -> ViTEncoder:
    """`ViTEncoder`, upstream's `ViTModel(config, add_pooling_layer=False)`, of a `ViTConfig` as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    with ConfigReader(config, "ViT's encoder", only=_ONLY, neutral=_NEUTRAL) as read:
        numbers = _read(read)
    return ViTEncoder(**numbers, interpolate_positions=interpolate_positions, **factory)


def masked_encoder_from_config(
    config: Mapping[str, Any], interpolate_positions: bool = False, **factory: Unpack[fl.Factory]
) -> MaskedViTEncoder:
    """`MaskedViTEncoder` of a `ViTConfig` as a dict.

    Upstream: `ViTModel(config, add_pooling_layer=False, use_mask_token=True)`.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    with ConfigReader(config, "ViT's encoder", only=_ONLY, neutral=_NEUTRAL) as read:
        numbers = _read(read)
    return MaskedViTEncoder(**numbers, interpolate_positions=interpolate_positions, **factory)


PORTS: Mapping[str, Port] = {
    port.name: port
    for port in (
        Port(
            name="vit",
            build=ViTEncoder,
            key_map=ENCODER_KEYS,
            from_config=encoder_from_config,
            summary="ViT without a head; that of base size and patches of 16 unless a config says otherwise",
        ),
        Port(
            name="vit-masked",
            build=MaskedViTEncoder,
            key_map=MASKED_ENCODER_KEYS,
            from_config=masked_encoder_from_config,
            summary="the same with a token for masked patches",
        ),
        *(
            Port(name=name, build=build, key_map=VIT_KEYS, from_config=vit_from_config, summary=summary)
            for name, build, summary in (
                ("vit-b16", vit_b16, "ViT-B/16: 12 layers of 768, with its pooler"),
                ("vit-b32", vit_b32, "ViT-B/32: 12 layers of 768, with its pooler"),
                ("vit-l16", vit_l16, "ViT-L/16: 24 layers of 1024, with its pooler"),
                ("vit-l32", vit_l32, "ViT-L/32: 24 layers of 1024, with its pooler"),
            )
        ),
    )
}
