"""Autoencoders as single files hold them: the names of the original code, brought to those of diffusers.

In the code that Stable Diffusion was trained with, the decoder's levels count from the picture inwards, and attention
is made of 1x1 convolutions. diffusers 0.42.1 counts them in the order in which they run, and has linear layers there.
Checked against `diffusers.loaders.single_file_utils.convert_ldm_vae_checkpoint`.

Differs from upstream: keys that it skips in silence are errors here, and the way back exists.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from refiners.conversion import KeyMap, Rule, Squeeze

_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_AROUND = {
    "{side:encoder|decoder}.conv_in": "{side:encoder|decoder}.conv_in",
    "{side:encoder|decoder}.norm_out": "{side:encoder|decoder}.conv_norm_out",
    "{side:encoder|decoder}.conv_out": "{side:encoder|decoder}.conv_out",
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
}
_IGNORED = {"loss": "what judges pictures in training: a discriminator and a perceptual distance"}


def single_file_keys(config: Mapping[str, Any]) -> KeyMap:
    """The key map from a single file's autoencoder, without its prefix, to the keys of `AutoencoderKL`.

    Receives:
        config: the configuration of the autoencoder, as in its config.json.

    Example:
        >>> keys = single_file_keys({"block_out_channels": [32, 64, 128]})
        >>> keys.lines["decoder.up.2.block.{i}.norm1"]
        'decoder.up_blocks.0.resnets.{i}.norm1'
    """
    levels = len(config.get("block_out_channels", (64,)))
    lines: dict[str, str | Rule] = {**_AROUND, **dict(_levels(levels)), **dict(_middle())}
    return KeyMap(lines, ignore=_IGNORED, name="the autoencoder of the single file")


def _levels(levels: int) -> Iterator[tuple[str, str]]:
    for level in range(levels):
        sides = (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}"),
            (
                f"decoder.up.{levels - 1 - level}",
                f"decoder.up_blocks.{level}",
            ),
        )
        for old, new in sides:
            for before, after in _RESNET.items():
                yield f"{old}.block.{{i}}.{before}", f"{new}.resnets.{{i}}.{after}"
        (down, new_down), (up, new_up) = sides
        if level < levels - 1:
            yield f"{down}.downsample.conv", f"{new_down}.downsamplers.0.conv"
            yield f"{up}.upsample.conv", f"{new_up}.upsamplers.0.conv"


def _middle() -> Iterator[tuple[str, str | Rule]]:
    for side in ("encoder", "decoder"):
        for before, after in _RESNET.items():
            yield f"{side}.mid.block_{{i+1}}.{before}", f"{side}.mid_block.resnets.{{i}}.{after}"
        attention = f"{side}.mid_block.attentions.0"
        yield f"{side}.mid.attn_1.norm", f"{attention}.group_norm"
        for before, after in _ATTENTION.items():
            # A 1x1 convolution is a linear layer, and some files hold it as one.
            yield f"{side}.mid.attn_1.{before}.weight", Squeeze(f"{attention}.{after}.weight", count=2, ndim=2)
            yield f"{side}.mid.attn_1.{before}.bias", f"{attention}.{after}.bias"
