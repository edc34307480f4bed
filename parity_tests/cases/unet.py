"""UNets: `diffusers.UNet2DConditionModel` beside `reference_ports.unet`.

Both sides are built from the same keyword arguments. Sizes that could be confused differ: channels, heads, sizes of
heads, height and width, words, and the widths of the text.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from parity_tests.unet_runs import (
    Inputs,
    latents,
    loss_of,
    run_checkpointed,
    run_port,
    run_upstream,
    with_class,
    with_condition,
    with_mask,
    with_noise,
    with_residuals,
    with_size,
    with_size_and_other_text,
)
from reference_ports import unet
from refiners.parity import Case, FullSize, with_both_inits

Config = Mapping[str, Any]

TINY: Config = {
    "block_out_channels": (16, 24),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 20,
    "attention_head_dim": (2, 4),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SD2: Config = {**TINY, "use_linear_projection": True, "upcast_attention": True}
SDXL: Config = {
    **SD2,
    "block_out_channels": (12, 16, 24),
    "attention_head_dim": (1, 2, 4),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 6 * 6 + 14,
}
UPSCALER: Config = {
    **SD2,
    "in_channels": 7,
    "num_class_embeds": 11,
    "only_cross_attention": (True, False),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}

PICTURES = {"padded": "latents are not padded"}


def taps(config: Config) -> Mapping[str, str]:
    """The time, the first convolution and every stage, compared as well."""
    count = len(config["block_out_channels"])
    sides = (("Down", "down"), ("Up", "up"))
    stages = {f"{side}Blocks.{side}Block_{i + 1}": f"{name}_blocks.{i}" for side, name in sides for i in range(count)}
    middle = {"MiddleBlock": "mid_block"} if config.get("mid_block_type", "") is not None else {}
    time = {"TimestepEncoder.EmbeddingSum.TimeEmbedding": "time_embedding"}
    return {**time, "InputBlock.InputConvolution": "conv_in", **middle, **stages}


def checkpointed_upstream(config: Config) -> nn.Module:
    """Upstream, with activations computed again in the backward."""
    model = UNet2DConditionModel(**config)
    model.enable_gradient_checkpointing()
    return model


def case(
    name: str,
    summary: str,
    config: Config = TINY,
    inputs: Callable[[torch.Generator], Inputs] = latents,
    batch_axis: int | Mapping[str, int] = 0,
    **more: Any,
) -> Case:
    """A configuration and inputs that suit it."""
    return Case(
        id=f"unet/{name}",
        summary=summary,
        inputs=inputs,
        **{
            "upstream": lambda: UNet2DConditionModel(**config),
            "port": lambda: unet.from_config(config),
            "key_map": unet.key_map_for(config),
            "run_upstream": run_upstream,
            "run_port": run_port,
            "taps": taps(config),
            "batch_axis": batch_axis,
            "without_cells": PICTURES,
            **more,
        },
    )


def size(config: Config, port: Callable[[], nn.Module] | None = None) -> FullSize:
    """A published configuration, by default built by the reader of configurations."""
    return FullSize(
        upstream=lambda: UNet2DConditionModel(**config),
        port=port or (lambda: unet.from_config(config)),
        key_map=unet.key_map_for(config),
    )


SD1_SIZE: Config = {"cross_attention_dim": 768, "sample_size": 64}
SD2_SIZE: Config = {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}
XL_SIZE: Config = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
REFINER_SIZE: Config = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
UPSCALER_SIZE: Config = {
    "in_channels": 7,
    "block_out_channels": [256, 512, 512, 1024],
    "cross_attention_dim": 1024,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "use_linear_projection": True,
}
UNCLIP: Config = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048}

ON_META = {
    "unet-sd1": size(SD1_SIZE, unet.SD1UNet),
    "unet-sd1-inpainting": size({**SD1_SIZE, "in_channels": 9}, lambda: unet.SD1UNet(in_channels=9)),
    "unet-sd1-editing": size({**SD1_SIZE, "in_channels": 8}, lambda: unet.SD1UNet(in_channels=8)),
    "unet-sd1-lcm": size({**SD1_SIZE, "time_cond_proj_dim": 256}, lambda: unet.SD1UNet(condition_dim=256)),
    "unet-sd2": size(SD2_SIZE, unet.SD2UNet),
    "unet-sd2-inpainting": size({**SD2_SIZE, "in_channels": 9}, lambda: unet.SD2UNet(in_channels=9)),
    "unet-sd2-depth": size({**SD2_SIZE, "in_channels": 5}, lambda: unet.SD2UNet(in_channels=5)),
    "unet-sd2-unclip": size({**SD2_SIZE, **UNCLIP}),
    "unet-sd-x4-upscaler": size(UPSCALER_SIZE),
    "unet-sdxl": size(XL_SIZE, unet.SDXLUNet),
    "unet-sdxl-inpainting": size({**XL_SIZE, "in_channels": 9}, lambda: unet.SDXLUNet(in_channels=9)),
    "unet-sdxl-editing": size({**XL_SIZE, "in_channels": 8}, lambda: unet.SDXLUNet(in_channels=8)),
    "unet-sdxl-lcm": size({**XL_SIZE, "time_cond_proj_dim": 256}, lambda: unet.SDXLUNet(condition_dim=256)),
    "unet-sdxl-refiner": size(REFINER_SIZE, unet.SDXLRefinerUNet),
    "unet-kolors": size({**XL_SIZE, "encoder_hid_dim": 4096, "projection_class_embeddings_input_dim": 5632}),
    "unet-small-sd": size(
        {**SD1_SIZE, "layers_per_block": 1, "mid_block_type": None, "block_out_channels": [320, 640, 1280, 1280]}
    ),
}

NO_FLOAT16 = ("float64", "float32", "bfloat16")

CASES = (
    *with_both_inits(case("sd1", "1x1 convolutions around the transformers; a time for each", full_size=ON_META)),
    case(
        "batch-1", "one picture, time as a fraction", inputs=partial(latents, batch=1, timestep=981.3), lanes=NO_FLOAT16
    ),
    case(
        "batch-4",
        "four pictures, one time for all as a tensor of fractions, two layers a stage",
        {**TINY, "layers_per_block": 2},
        partial(latents, batch=4, timestep=torch.tensor([981.3], dtype=torch.float64)),
        {"sample": 0, "encoder_hidden_states": 0},
        lanes=NO_FLOAT16,
    ),
    case(
        "odd-size",
        "sizes that no halving divides, three stages, time as a tensor without axes",
        {
            **TINY,
            "block_out_channels": (12, 16, 24),
            "attention_head_dim": (3, 2, 4),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
        partial(latents, height=11, width=6, timestep=torch.tensor(7)),
        {"sample": 0, "encoder_hidden_states": 0},
        lanes=NO_FLOAT16,
    ),
    case("mask", "words that are hidden", inputs=with_mask, lanes=NO_FLOAT16),
    case("residuals", "what a ControlNet adds", inputs=with_residuals, lanes=NO_FLOAT16),
    case("sd2", "linear maps around the transformers", SD2, lanes=NO_FLOAT16),
    case("sdxl", "the whole prompt, and the size", SDXL, with_size),
    case(
        "inpainting",
        "nine channels in, five out; time as a whole number",
        {**TINY, "in_channels": 9, "out_channels": 5},
        partial(latents, channels=9, timestep=981),
        lanes=NO_FLOAT16,
    ),
    case("lcm", "a condition beside the time", {**TINY, "time_cond_proj_dim": 10}, with_condition, lanes=NO_FLOAT16),
    case(
        "lcm-not-given",
        "a condition that is not used",
        {**TINY, "time_cond_proj_dim": 10},
        without_influence={"time_embedding.cond_proj.weight": "no condition is given"},
        lanes=NO_FLOAT16,
    ),
    case(
        "upscaler",
        "a class by its number, seven channels, a stage that attends to the text twice, hidden words",
        UPSCALER,
        partial(with_class, labels=lambda generator: torch.randint(0, 11, (2,), generator=generator), channels=7),
        lanes=NO_FLOAT16,
    ),
    case(
        "unclip",
        "a class that is a vector; an odd number of channels, whose sinusoids end with a zero",
        {
            **SD2,
            "block_out_channels": (15, 20),
            "norm_num_groups": 5,
            "attention_head_dim": (3, 4),
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 13,
        },
        partial(with_class, labels=lambda generator: torch.randn(2, 13, generator=generator)),
        lanes=NO_FLOAT16,
    ),
    case(
        "asymmetric",
        "depths that differ in a stage and between the sides, layers that differ, a middle without a transformer; a "
        "class seen as a time is",
        {
            **TINY,
            "layers_per_block": (1, 2),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "transformer_layers_per_block": (1, (2, 0)),
            "reverse_transformer_layers_per_block": ((0, 1, 2), 1),
            "mid_block_type": "UNetMidBlock2D",
            "class_embed_type": "timestep",
        },
        partial(with_class, labels=lambda generator: torch.randint(0, 1000, (2,), generator=generator)),
        lanes=NO_FLOAT16,
    ),
    case(
        "no-middle",
        "no middle; a class that is added as it is; eps 1e-3; SiLU by its other name",
        {**TINY, "mid_block_type": None, "class_embed_type": "identity", "norm_eps": 1e-3, "act_fn": "swish"},
        partial(with_class, labels=lambda generator: torch.randn(2, 64, generator=generator)),
        lanes=NO_FLOAT16,
    ),
    case(
        "kolors",
        "text of another width, projected; five numbers of size; the whole prompt in float32",
        {**SDXL, "encoder_hid_dim": 18, "projection_class_embeddings_input_dim": 5 * 6 + 14},
        with_size_and_other_text,
        lanes=NO_FLOAT16,
    ),
    case(
        "training",
        "one step of training, with activations computed again in the backward",
        SD2,
        with_noise,
        without_cells={**PICTURES, "batch": "the loss is one number for the whole batch"},
        upstream=lambda: checkpointed_upstream(SD2),
        port=lambda: unet.from_config(SD2),
        run_upstream=loss_of(run_upstream),
        run_port=loss_of(run_checkpointed),
        taps={},
        lanes=NO_FLOAT16,
    ),
    case(
        "sd1-width",
        "the width, the heads and the groups of the first stage of Stable Diffusion 1",
        {
            "block_out_channels": (320,),
            "layers_per_block": 1,
            "cross_attention_dim": 768,
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("UpBlock2D",),
            "mid_block_type": None,
        },
        partial(latents, batch=1, height=8, width=8, words=77, text_dim=768),
        taps={},
        lanes=("float32", "bfloat16"),
    ),
)
