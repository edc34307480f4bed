"""Autoencoders: `diffusers.AutoencoderKL` and `AutoencoderTiny` beside `reference_ports.autoencoder`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from parity_tests.autoencoder_runs import (
    Inputs,
    Outputs,
    draw,
    one_generator,
    run_port,
    run_port_both_ways,
    run_port_tiny,
    run_upstream,
    run_upstream_both_ways,
    run_upstream_tiny,
    with_moments,
)
from parity_tests.published_autoencoders import TINY as PUBLISHED_TINY
from reference_ports import autoencoder
from refiners.fluxion.adapters import inject_checkpoints
from refiners.fluxion.selectors import select
from refiners.parity import Case, FullSize, with_both_inits

TINY: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 32,
}
SMALL: dict[str, Any] = {
    "encoder_block_out_channels": (16, 16),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 2),
    "num_decoder_blocks": (2, 1),
}
FULL: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
TAESDXL: dict[str, Any] = {**PUBLISHED_TINY, "block_out_channels": [64, 64, 64, 64]}
SIXTEEN = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}

NO_FLOAT16 = {"lanes": ("float64", "float32", "bfloat16")}
KEY_BIAS = {"*.to_k.bias": "adds the same number to all scores of a query: softmax removes it"}
FORGETS_TO_SCALE = {"checkpointed": "upstream's AutoencoderTiny forgets to scale its pixels with checkpoints on"}
PICTURES = {"padded": "pictures are not padded"}
ONE_GENERATOR = {"batch": "one generator draws for all pictures in turn"}


def numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as a file holds it: lists for tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def taps(levels: int, attention: bool = True) -> Mapping[str, str]:
    """The blocks of both sides, compared as well."""
    blocks: dict[str, str] = {}
    for i in range(levels):
        number = f"_{i + 1}" if levels > 1 else ""
        blocks[f"Encoder.DownBlocks.DownBlock{number}"] = f"encoder.down_blocks.{i}"
        blocks[f"Decoder.UpBlocks.UpBlock{number}"] = f"decoder.up_blocks.{i}"
    for port, upstream in (("Encoder", "encoder"), ("Decoder", "decoder")):
        blocks[f"{port}.MiddleBlock"] = f"{upstream}.mid_block"
        if attention:
            blocks[f"{port}.MiddleBlock.PixelAttention"] = f"{upstream}.mid_block.attentions.0"
    return blocks


def case(
    name: str,
    summary: str,
    inputs: Callable[[torch.Generator], Inputs] = draw,
    *,
    more: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Case:
    """`AutoencoderKL` in the tiny configuration with some changes."""
    config = {**TINY, **changes}
    attention = config.get("mid_block_add_attention", True)
    fields: dict[str, Any] = {
        "id": f"autoencoder/{name}",
        "summary": summary,
        "upstream": lambda: AutoencoderKL(**config),
        "port": lambda: autoencoder.from_config(numbers(config)),
        "key_map": autoencoder.KEYS,
        "inputs": with_moments(inputs),
        "run_upstream": run_upstream,
        "run_port": run_port,
        "taps": taps(len(config["block_out_channels"]), attention),
        "without_influence": KEY_BIAS if attention else {},
        "batch_axis": 0,
        "without_cells": PICTURES,
    }
    return Case(**{**fields, **(more or {})})


def both_ways(name: str, summary: str, inputs: Callable[[torch.Generator], Inputs] = draw, **changes: Any) -> Case:
    """Scaled, unscaled, and the whole model called."""
    runs = {"inputs": inputs, "run_upstream": run_upstream_both_ways, "run_port": run_port_both_ways, "taps": {}}
    return case(name, summary, more=runs, **changes)


def tiny_case(
    name: str,
    summary: str,
    inputs: Callable[[torch.Generator], Inputs] = draw,
    *,
    more: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Case:
    """`AutoencoderTiny` in a small configuration with some changes."""
    config = {**SMALL, **changes}
    fields: dict[str, Any] = {
        "id": f"autoencoder/{name}",
        "summary": summary,
        "upstream": lambda: AutoencoderTiny(**config),
        "port": lambda: autoencoder.tiny_from_config(numbers(config)),
        "key_map": autoencoder.tiny_keys(config["num_encoder_blocks"], config["num_decoder_blocks"]),
        "inputs": inputs,
        "run_upstream": run_upstream_tiny,
        "run_port": run_port_tiny,
        "batch_axis": 0,
        "without_cells": {**PICTURES, **FORGETS_TO_SCALE},
    }
    return Case(**{**fields, **(more or {})})


def in_pieces(case: Case, *modes: str, tile: int | None = None) -> Case:
    """A case with slicing or tiling or both, which the port takes out again after its run."""

    def upstream() -> nn.Module:
        model: Any = case.upstream()
        for mode in modes:
            getattr(model, f"enable_{mode}")()
        if tile is not None:  # AutoencoderTiny reads neither from its configuration, and expects four sizes
            model.tile_sample_min_size, model.tile_latent_min_size, model.spatial_scale_factor = tile, tile // 2, 2
        return model

    def run(model: nn.Module, inputs: Inputs) -> Outputs:
        assert isinstance(model, autoencoder.Autoencoder)
        if tile is not None:
            assert isinstance(model, autoencoder.AutoencoderTiny)
            model.tile_size, model.tile_scale = tile, 2
        for mode in modes:
            getattr(model, f"set_{mode}")(True)
        try:
            return case.run_port(model, inputs)
        finally:
            for mode in modes:
                getattr(model, f"set_{mode}")(False)

    return replace(case, upstream=upstream, run_port=run, taps={})


def recomputed(case: Case) -> Case:
    """A case with gradient checkpointing. The port's is taken out before the backward pass, which still goes by it."""

    def upstream() -> nn.Module:
        model: Any = case.upstream()
        model.enable_gradient_checkpointing()
        return model

    def run(model: nn.Module, inputs: Inputs) -> Outputs:
        blocks = (autoencoder.DownBlocks, autoencoder.MiddleBlock, autoencoder.UpBlocks)
        checkpoints = inject_checkpoints(select(model).of(*blocks).expect(4))
        try:
            return case.run_port(model, inputs)
        finally:
            checkpoints.eject()

    return replace(case, upstream=upstream, run_port=run, taps={})


def full(port: Callable[[], nn.Module], **numbers: Any) -> FullSize:
    """A published configuration."""
    return FullSize(upstream=lambda: AutoencoderKL(**{**FULL, **numbers}), port=port)


def from_file(**numbers: Any) -> FullSize:
    """A published configuration, read by the port."""
    return full(lambda: autoencoder.from_config({**FULL, **numbers}), **numbers)


ON_META = {
    "sd1": full(autoencoder.SD1Autoencoder),
    "sd2": from_file(sample_size=768),
    "sd-vae-ft-mse": from_file(sample_size=256),
    "sdxl": full(autoencoder.SDXLAutoencoder, sample_size=1024, scaling_factor=0.13025),
    "sd-x4-upscaler": from_file(
        block_out_channels=(128, 256, 512),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.08333,
    ),
    "sd3": full(autoencoder.SD3Autoencoder, **SIXTEEN),
    "flux": full(autoencoder.FluxAutoencoder, **SIXTEEN),
}
TINY_ON_META = {
    "taesd": FullSize(upstream=AutoencoderTiny, port=autoencoder.AutoencoderTiny, key_map=autoencoder.TINY_KEYS),
    "taesdxl": FullSize(
        upstream=AutoencoderTiny,
        port=lambda: autoencoder.from_config(TAESDXL),
        key_map=autoencoder.key_map_for(TAESDXL),
    ),
    "taesd3": FullSize(
        upstream=lambda: AutoencoderTiny(latent_channels=16),
        port=autoencoder.PORTS["taesd-16"].build,
        key_map=autoencoder.TINY_KEYS,
    ),
    "taef1": FullSize(
        upstream=lambda: AutoencoderTiny(latent_channels=16),
        port=lambda: autoencoder.from_config({**TAESDXL, "latent_channels": 16}),
        key_map=autoencoder.TINY_KEYS,
    ),
}

LARGE = partial(draw, height=20, width=28, latent_size=(10, 9))
GRID = partial(draw, height=36, width=50, latent_size=(18, 20))
TWO_SIZES = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}

CASES = (
    *with_both_inits(replace(case("tiny", "three sizes, odd halves"), full_size=ON_META)),
    case("batch-1", "one picture, two layers, square", partial(draw, batch=1, height=32, width=32), layers_per_block=2),
    case(
        "one-generator",
        "four pictures, one generator for all",
        partial(draw, batch=4, height=12, width=12),
        more={
            "run_upstream": partial(run_upstream, generator=one_generator),
            "run_port": partial(run_port, generator=one_generator),
            "without_cells": {**PICTURES, **ONE_GENERATOR},
        },
    ),
    case(
        "no-attention",
        "one size, no attention, grey pictures, no convolution before the decoder; SiLU by its other name",
        partial(draw, channels=1),
        act_fn="swish",
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        in_channels=1,
        out_channels=2,
        mid_block_add_attention=False,
        use_post_quant_conv=False,
    ),
    case(
        "width",
        "more channels, and the groups of Stable Diffusion",
        partial(draw, batch=1, height=8, width=8),
        block_out_channels=(64, 128),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=32,
    ),
    both_ways("both-ways", "scaled by a factor, and the model called"),
    both_ways(
        "flux",
        "16 channels, scaled by a factor and a shift, without convolutions beside the latents",
        partial(draw, latents=16),
        scaling_factor=0.3611,
        shift_factor=0.1159,
        **SIXTEEN,
    ),
    both_ways(
        "latents-mean",
        "scaled by a mean and a deviation of each channel",
        scaling_factor=0.5,
        latents_mean=[-1.6574, 1.886, -1.383, 2.5155],
        latents_std=[8.4927, 5.9022, 6.5498, 5.2299],
    ),
    in_pieces(case("slicing", "one picture at a time", partial(draw, batch=3), more=NO_FLOAT16), "slicing"),
    in_pieces(
        case(
            "tiling",
            "two pictures at a time, in tiles whose overlap is no whole number",
            partial(LARGE, width=26, latent_size=(9, 9)),
            sample_size=12,
            **TWO_SIZES,
        ),
        "tiling",
    ),
    in_pieces(
        case(
            "tiling-and-slicing",
            "a wide picture in tiles, and one picture at a time",
            partial(LARGE, height=14),
            more=NO_FLOAT16,
            sample_size=16,
            **TWO_SIZES,
        ),
        "tiling",
        "slicing",
    ),
    in_pieces(
        case(
            "tiling-not-needed",
            "pictures as large as a tile",
            partial(draw, height=16, width=12, latent_size=(8, 3)),
            more=NO_FLOAT16,
            sample_size=16,
            **TWO_SIZES,
        ),
        "tiling",
    ),
    recomputed(case("checkpoints", "gradient checkpointing on both sides", more=NO_FLOAT16)),
    *with_both_inits(replace(tiny_case("taesd", "two sizes"), full_size=TINY_ON_META)),
    tiny_case(
        "taesd-options",
        "another activation, enlarged by 3, other channels and bytes",
        partial(draw, batch=1, latents=6),
        latent_channels=6,
        act_fn="gelu",
        upsampling_scaling_factor=3,
        latent_magnitude=2,
        latent_shift=0.4,
        out_channels=1,
    ),
    tiny_case(
        "taesd-bytes",
        "called, which rounds the latents to bytes",
        more={
            "run_upstream": lambda model, inputs: {"both ways": model(inputs["pixels"]).sample},
            "run_port": lambda model, inputs: {"both ways": model(inputs["pixels"])},
            "lanes": ("float32",),
            "without_influence": {"encoder.*": "no gradient passes through bytes"},
        },
    ),
    in_pieces(tiny_case("taesd-tiling", "tiles that fade in", GRID), "tiling", tile=32),
    in_pieces(tiny_case("taesd-slicing", "one picture at a time", partial(draw, batch=3)), "slicing"),
)
