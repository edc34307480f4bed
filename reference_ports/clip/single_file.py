"""CLIP's text encoders as single files hold them, and OpenCLIP's own names, brought to those of transformers.

OpenCLIP keeps query, key and value in one matrix and multiplies by its projection from the other side. A single file
of Stable Diffusion holds one of three things:

    SD 1          `cond_stage_model.transformer.`       CLIP ViT-L/14 under transformers' own names
    SD 2          `cond_stage_model.model.`             OpenCLIP ViT-H/14
    SDXL          `conditioner.embedders.0.transformer.`, `conditioner.embedders.1.model.`     ViT-L/14 and ViT-bigG/14
    SDXL refiner  `conditioner.embedders.0.model.`      OpenCLIP ViT-bigG/14

Checked against `convert_ldm_clip_checkpoint` and `convert_open_clip_checkpoint` of
`diffusers.loaders.single_file_utils` 0.42.1.

Differs from upstream: keys that it skips in silence are named here, with the reason, and the way back exists.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from refiners.conversion import KeyMap, Recomputed, Split, Transpose

_BLOCK, _LAYER = "transformer.resblocks.{i}", "encoder.layers.{i}"
_NO_TEXT_HEAD = "comes after the last hidden state"
_LINES = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    f"{_BLOCK}.ln_1": f"{_LAYER}.layer_norm1",
    f"{_BLOCK}.attn.out_proj": f"{_LAYER}.self_attn.out_proj",
    f"{_BLOCK}.ln_2": f"{_LAYER}.layer_norm2",
    f"{_BLOCK}.mlp.c_fc": f"{_LAYER}.mlp.fc1",
    f"{_BLOCK}.mlp.c_proj": f"{_LAYER}.mlp.fc2",
    "ln_final": "final_layer_norm",
}
_FUSED = {f"{_BLOCK}.attn.in_proj_{{p}}": Split(*(f"{_LAYER}.self_attn.{name}_proj.{{p}}" for name in ("q", "k", "v")))}


def _counting(shape: torch.Size) -> Tensor:
    return torch.arange(shape[-1]).expand(shape)


POSITION_IDS = Recomputed("0, 1, 2, …: upstream and the port count by themselves", _counting, upstream_reads=False)
"""Transformers 5 leaves out what a file says of them: half precision has spoilt those of many a checkpoint."""
_IGNORED = {
    "visual": "belongs to the other half of CLIP",
    "logit_scale": "weighs similarities, which come after the embeddings",
    "attn_mask": "hides the words that follow, which the port does by itself",
    "transformer.text_model.embeddings.position_ids": POSITION_IDS,  # of tools that merge checkpoints
}

OPEN_CLIP_TEXT_KEYS = KeyMap({**_LINES, **_FUSED}, ignore=_IGNORED, name="OpenCLIP's text encoder")
"""From OpenCLIP's text encoder, without its projection, to the keys of `CLIPTextModel` of transformers 5."""

OPEN_CLIP_PROJECTION_KEYS = (
    OPEN_CLIP_TEXT_KEYS.under(port="text_model") | KeyMap({"text_projection": Transpose("text_projection.weight")})
).named("OpenCLIP's text encoder with projection")
"""From OpenCLIP's text encoder to the keys of `CLIPTextModelWithProjection`."""


def single_file_keys(config: Mapping[str, Any]) -> KeyMap:
    """The key map from CLIP's text encoder under transformers' names (SD 1, SDXL), without its prefix, to itself.

    Receives:
        config: the configuration of the encoder, as in its config.json. All sizes have the same keys.
    """
    del config
    return KeyMap(
        {"text_model.{rest}": "{rest}"},
        ignore={
            "text_model.embeddings.position_ids": POSITION_IDS,
            "text_projection": _NO_TEXT_HEAD,
        },
        name="the text encoder of the single file",
    )


def open_clip_keys(config: Mapping[str, Any]) -> KeyMap:
    """The key map from OpenCLIP's text encoder (SD 2), without its prefix, to the keys of `CLIPTextModel`.

    SD 2 looks at the last layer but one. Its configuration therefore has one layer less than the file, and that layer
    has no place.

    Receives:
        config: the configuration of the encoder, as in its config.json.
    """
    number = str(config.get("num_hidden_layers", 12))
    unused = [key.replace("{i}", number) for key in (*_LINES, *_FUSED) if "{i}" in key]
    ignore = {
        **dict.fromkeys(unused, "the last layer, whose output SD 2 does not use"),
        "text_projection": _NO_TEXT_HEAD,
    }
    return (OPEN_CLIP_TEXT_KEYS | KeyMap({}, ignore=ignore)).named("the text encoder of the single file")


def open_clip_projection_keys(config: Mapping[str, Any]) -> KeyMap:
    """The key map from OpenCLIP's text encoder (SDXL), without its prefix, to `CLIPTextModelWithProjection`.

    Receives:
        config: the configuration of the encoder, as in its config.json. All sizes have the same keys.
    """
    del config
    return OPEN_CLIP_PROJECTION_KEYS.named("the second text encoder of the single file")
