"""Published weights and configurations of autoencoders in the diffusers layout, for the trees of this family.

The key maps follow the state dicts of `AutoencoderKL` and `AutoencoderTiny` of diffusers 0.42.1. Files written before
diffusers 0.18 have other names of the attention's layers; diffusers renames them when it loads, and so is done here.
"""

from collections.abc import Callable, Mapping
from typing import Any, Unpack

from torch import nn

import refiners.fluxion.layers as fl
from reference_ports.autoencoder.base import Autoencoder
from reference_ports.autoencoder.model import (
    AutoencoderKL,
    FluxAutoencoder,
    SD1Autoencoder,
    SD3Autoencoder,
    SDXLAutoencoder,
)
from reference_ports.autoencoder.scaling import LatentScaling
from reference_ports.autoencoder.tiny import AutoencoderTiny
from reference_ports.blocks.activations import ACTIVATIONS, NAMES_OF_SILU
from refiners.conversion import DIFFUSERS_NEUTRAL, ConfigReader, KeyMap, Port
from refiners.errors import ConversionError

_SIDES = {"encoder": "Encoder", "decoder": "Decoder"}
_BLOCKS = {"encoder.down_blocks": "Encoder.DownBlocks.DownBlock", "decoder.up_blocks": "Decoder.UpBlocks.UpBlock"}
_RESIDUAL = {
    "norm1": "Convolutions.GroupNorm_1",
    "conv1": "Convolutions.Conv2d_1",
    "norm2": "Convolutions.GroupNorm_2",
    "conv2": "Convolutions.Conv2d_2",
    "conv_shortcut": "Shortcut.Conv2d",
}
_ATTENTION = {
    "group_norm": "GroupNorm",
    "to_q": "SelfAttention.Projections.Query",
    "to_k": "SelfAttention.Projections.Key",
    "to_v": "SelfAttention.Projections.Value",
    "to_out.0": "SelfAttention.Linear",
}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _lines() -> dict[str, str]:
    lines = {
        "quant_conv": "Encoder.QuantConvolution",
        "post_quant_conv": "Decoder.PostQuantConvolution",
        "encoder.down_blocks.{i}.downsamplers.0.conv": "Encoder.DownBlocks.DownBlock_{i+1}.Downsample.Conv2d",
        "decoder.up_blocks.{i}.upsamplers.0.conv": "Decoder.UpBlocks.UpBlock_{i+1}.Upsample.Conv2d",
    }
    residuals = {f"{old}.{{i}}.resnets.{{j}}": f"{new}_{{i+1}}.ResidualBlock_{{j+1}}" for old, new in _BLOCKS.items()}
    for old, new in _SIDES.items():
        lines[f"{old}.conv_in"] = f"{new}.InputConvolution"
        lines[f"{old}.conv_norm_out"] = f"{new}.OutputBlock.GroupNorm"
        lines[f"{old}.conv_out"] = f"{new}.OutputBlock.Conv2d"
        residuals[f"{old}.mid_block.resnets.{{j}}"] = f"{new}.MiddleBlock.ResidualBlock_{{j+1}}"
        attention = f"{new}.MiddleBlock.PixelAttention.TokensAndImage.PixelTokens"
        lines |= {f"{old}.mid_block.attentions.0.{key}": f"{attention}.{name}" for key, name in _ATTENTION.items()}
    return lines | {f"{old}.{k}": f"{new}.{v}" for old, new in residuals.items() for k, v in _RESIDUAL.items()}


KEYS = KeyMap(
    _lines(),
    aliases={
        f"{side}.mid_block.attentions.0.{old}.{{p}}": f"{side}.mid_block.attentions.0.{new}.{{p}}"
        for side in _SIDES
        for old, new in _OLD_ATTENTION.items()
    },
    name="an autoencoder",
)
"""The keys of `AutoencoderKL`, for any tree of `AutoencoderKL`."""


def tiny_keys(encoder_blocks: tuple[int, ...], decoder_blocks: tuple[int, ...]) -> KeyMap:
    """The keys of `AutoencoderTiny`, which counts the layers of a side without regard to their blocks."""
    encoder: list[str] = []
    for i, count in enumerate(encoder_blocks):
        stage = _numbered("DownBlock", i, len(encoder_blocks) - 1) if i else "InputBlock"
        encoder += [f"{stage}.{'HalvingConvolution' if i else 'Conv2d'}", *_tiny_blocks(stage, count)]
    encoder.append("Conv2d")
    # Upstream counts layers without weights too: they have no name here.
    decoder = ["InputBlock.Conv2d", ""]
    for i, count in enumerate(decoder_blocks, start=1):
        is_last = i == len(decoder_blocks)
        stage = "OutputBlock" if is_last else _numbered("UpBlock", i, len(decoder_blocks) - 1)
        decoder += [*_tiny_blocks(stage, count), *([] if is_last else [""]), f"{stage}.Conv2d"]
    lines: dict[str, str] = {}
    for side, port, layers in (("encoder", "TinyEncoder", encoder), ("decoder", "TinyDecoder", decoder)):
        for i, name in enumerate(layers):
            if name.endswith("TinyConvolutions"):
                lines |= {f"{side}.layers.{i}.conv.{2 * k}": f"{port}.{name}.Conv2d_{k + 1}" for k in range(3)}
            elif name:
                lines[f"{side}.layers.{i}"] = f"{port}.{name}"
    return KeyMap(lines, name="a tiny autoencoder")


def _tiny_blocks(stage: str, count: int) -> list[str]:
    return [f"{stage}.{_numbered('TinyBlock', k + 1, count)}.TinyConvolutions" for k in range(count)]


def _numbered(name: str, number: int, count: int) -> str:
    """The key of a child: a Chain numbers those that have a namesake."""
    return f"{name}_{number}" if count > 1 else name


TINY_KEYS = tiny_keys((1, 3, 3, 3), (3, 3, 3, 1))
"""The keys of the published `AutoencoderTiny`."""

KEY_MAPS = {"autoencoder": KEYS, "autoencoder-tiny": TINY_KEYS}

_SIZE = "the size of the pictures it was trained on"
_TINY_ONLY: Mapping[str, Any] = {"upsample_fn": "nearest", "force_upcast": False}
_TINY_NEUTRAL: Mapping[str, str] = {
    **DIFFUSERS_NEUTRAL,
    "block_out_channels": "repeats decoder_block_out_channels",
}


def _blocks(read: ConfigReader, name: str, kind: str, count: int) -> None:
    read.value(
        name,
        lambda v: isinstance(v, list | tuple) and list(v) == [kind] * count,  # pyright: ignore[reportUnknownArgumentType] (JSON)
        f"{kind!r} {count} times, once for each of block_out_channels",
        default=(kind,),
    )


def _per_channel(read: ConfigReader, name: str, channels: int) -> tuple[float, ...] | None:
    numbers = read.value(
        name,
        lambda v: v is None or (isinstance(v, list | tuple) and len(v) == channels),  # pyright: ignore[reportUnknownArgumentType] (JSON)
        f"null, or a list of {channels} numbers",
        default=None,
    )
    return None if numbers is None else tuple(map(float, numbers))


def kl_from_config(config: Mapping[str, Any], **factory: Unpack[fl.Factory]) -> AutoencoderKL:
    """The tree of a configuration of `AutoencoderKL`, as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    with ConfigReader(config, "AutoencoderKL", neutral=DIFFUSERS_NEUTRAL) as read:
        read.choice("act_fn", NAMES_OF_SILU, "silu")
        channels = read.integers("block_out_channels", (64,))
        _blocks(read, "down_block_types", "DownEncoderBlock2D", len(channels))
        _blocks(read, "up_block_types", "UpDecoderBlock2D", len(channels))
        latent_channels = read.integer("latent_channels", 4)
        numbers: dict[str, Any] = {
            "in_channels": read.integer("in_channels", 3),
            "out_channels": read.integer("out_channels", 3),
            "num_layers": read.integer("layers_per_block", 1),
            "num_groups": read.integer("norm_num_groups", 32),
            "use_attention": read.flag("mid_block_add_attention", True),
            "use_quant_convolution": read.flag("use_quant_conv", True),
            "use_post_quant_convolution": read.flag("use_post_quant_conv", True),
            "tile_size": read.integer("sample_size", 32),
            "force_upcast": read.flag("force_upcast", True),
        }
        factor = read.number("scaling_factor", 0.18215)
        shift = read.number("shift_factor") if read.has("shift_factor") else _absent(read, "shift_factor")
        mean = _per_channel(read, "latents_mean", latent_channels)
        deviation = _per_channel(read, "latents_std", latent_channels)
    scaling = LatentScaling(factor, shift, mean, deviation)
    return AutoencoderKL(latent_channels=latent_channels, channels=channels, scaling=scaling, **numbers, **factory)


def _absent(read: ConfigReader, name: str) -> None:
    read.value(name, lambda v: v is None, "a number or null", default=None)


def tiny_from_config(config: Mapping[str, Any], **factory: Unpack[fl.Factory]) -> AutoencoderTiny:
    """The tree of a configuration of `AutoencoderTiny`, as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    with ConfigReader(config, "AutoencoderTiny", only=_TINY_ONLY, neutral=_TINY_NEUTRAL) as read:
        encoder_blocks, decoder_blocks = _tiny_sizes(read)
        numbers: dict[str, Any] = {
            "in_channels": read.integer("in_channels", 3),
            "out_channels": read.integer("out_channels", 3),
            "latent_channels": read.integer("latent_channels", 4),
            "encoder_width": _width(read, "encoder_block_out_channels", len(encoder_blocks)),
            "decoder_width": _width(read, "decoder_block_out_channels", len(decoder_blocks)),
            "upscale": read.integer("upsampling_scaling_factor", 2),
            "activation": read.choice("act_fn", {name: ACTIVATIONS[name] for name in _TINY_ACTIVATIONS}, "relu"),
            "latent_magnitude": read.number("latent_magnitude", 3),
            "latent_shift": read.number("latent_shift", 0.5),
        }
        factor, shift = read.number("scaling_factor", 1.0), read.number("shift_factor", 0.0)
    scaling = LatentScaling(factor, shift or None)
    return AutoencoderTiny(
        encoder_blocks=encoder_blocks, decoder_blocks=decoder_blocks, scaling=scaling, **numbers, **factory
    )


_TINY_ACTIVATIONS = ("relu", "gelu", "mish", "silu", "swish")


def _tiny_sizes(read: ConfigReader) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return read.integers("num_encoder_blocks", (1, 3, 3, 3)), read.integers("num_decoder_blocks", (3, 3, 3, 1))


def _width(read: ConfigReader, name: str, count: int) -> int:
    widths = read.value(
        name,
        lambda v: isinstance(v, list | tuple) and len(v) == count and len(set(v)) == 1,  # pyright: ignore[reportUnknownArgumentType] (JSON)
        f"the same width {count} times (upstream's convolutions between others do not fit)",
        default=(64,),
        fallback=(64,),
    )
    return widths[0]


def _class_name(config: Mapping[str, Any]) -> str:
    name = str(config.get("_class_name", "AutoencoderKL"))
    if name not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ConversionError(
            f"The configuration is one of {name}, the port implements AutoencoderKL and AutoencoderTiny. Check that it "
            "is the config.json of the autoencoder."
        )
    return name


def from_config(config: Mapping[str, Any], **factory: Unpack[fl.Factory]) -> Autoencoder:
    """The tree of a configuration of `AutoencoderKL` or of `AutoencoderTiny`, told apart by `_class_name`.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    if _class_name(config) == "AutoencoderTiny":
        return tiny_from_config(config, **factory)
    return kl_from_config(config, **factory)


def key_map_for(config: Mapping[str, Any]) -> KeyMap:
    """The map from the keys of upstream's model of this configuration to those of `from_config(config)`.

    Raises:
        ConversionError: the port cannot honour the configuration.
    """
    if _class_name(config) == "AutoencoderKL":
        return KEYS
    neutral = dict.fromkeys(config, "read by from_config")
    with ConfigReader(config, "AutoencoderTiny", neutral=neutral) as read:
        sizes = _tiny_sizes(read)
    return tiny_keys(*sizes)


def _tiny_16() -> AutoencoderTiny:
    return AutoencoderTiny(latent_channels=16)


_PUBLISHED: tuple[tuple[str, Callable[[], nn.Module], str], ...] = (
    ("autoencoder-sd1", SD1Autoencoder, "the autoencoder of Stable Diffusion 1 and 2"),
    ("autoencoder-sdxl", SDXLAutoencoder, "the autoencoder of Stable Diffusion XL"),
    ("autoencoder-sd3", SD3Autoencoder, "the autoencoder of Stable Diffusion 3"),
    ("autoencoder-flux", FluxAutoencoder, "the autoencoder of Flux.1"),
)
PORTS: Mapping[str, Port] = {
    port.name: port
    for port in (
        *(
            Port(name=name, build=build, key_map=KEYS, from_config=kl_from_config, summary=summary)
            for name, build, summary in _PUBLISHED
        ),
        *(
            Port(name=name, build=build, key_map=TINY_KEYS, from_config=tiny_from_config, summary=summary)
            for name, build, summary in (
                ("taesd", AutoencoderTiny, "TAESD: a small autoencoder for latents of 4 channels (SD 1, 2 and XL)"),
                ("taesd-16", _tiny_16, "TAESD for latents of 16 channels (SD 3, Flux.1)"),
            )
        ),
    )
}
