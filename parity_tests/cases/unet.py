"""UNets: `diffusers.UNet2DConditionModel` beside `reference_ports.unet`.

Both sides are built from the same keyword arguments. Sizes that could be confused differ: channels, heads, sizes of
heads, height and width, words, and the widths of the text.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from reference_ports import unet
from refiners.fluxion.adapters import inject_checkpoints
from refiners.fluxion.selectors import select
from refiners.parity import Case, FullSize, with_both_inits

Config = Mapping[str, Any]
Inputs = Mapping[str, Any]
Outputs = Mapping[str, Tensor]

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


def latents(
    generator: torch.Generator,
    batch: int = 2,
    channels: int = 4,
    height: int = 10,
    width: int = 6,
    words: int = 7,
    text_dim: int = 20,
    timestep: Any = None,
) -> dict[str, Any]:
    """Latents, texts, and a time of its own for each of them unless one is given for all."""
    return {
        "sample": torch.randn(batch, channels, height, width, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator) if timestep is None else timestep,
        "encoder_hidden_states": torch.randn(batch, words, text_dim, generator=generator),
    }


def with_mask(generator: torch.Generator, **numbers: Any) -> Inputs:
    """Words that none may attend to: others in each text."""
    given = latents(generator, **numbers)
    mask = torch.ones(given["encoder_hidden_states"].shape[:2], dtype=torch.long)
    for i, row in enumerate(mask):
        row[torch.randperm(len(row), generator=generator)[: 2 + i]] = 0
    return {**given, "encoder_attention_mask": mask}


def with_size(generator: torch.Generator, num_ids: int = 6, **numbers: Any) -> Inputs:
    """The text as one vector, and the numbers that say how the picture was sized and cut."""
    given = latents(generator, **numbers)
    batch = len(given["sample"])
    return {
        **given,
        "text_embeds": torch.randn(batch, 14, generator=generator),
        "time_ids": torch.randint(0, 1024, (batch, num_ids), generator=generator).float(),
    }


def with_size_and_other_text(generator: torch.Generator) -> Inputs:
    """Five numbers of size, words of another width, and a whole prompt that is float32 whatever the model is."""
    return {**with_size(generator, num_ids=5, text_dim=18), "is_pooled_in_float32": True}


def with_condition(generator: torch.Generator) -> Inputs:
    """What a consistency model is told beside the time."""
    return {**latents(generator), "timestep_cond": torch.randn(2, 10, generator=generator)}


def with_class(generator: torch.Generator, labels: Callable[[torch.Generator], Tensor], **numbers: Any) -> Inputs:
    """A class for each of the latents."""
    return {**latents(generator, **numbers), "class_labels": labels(generator)}


def with_residuals(generator: torch.Generator) -> Inputs:
    """What a ControlNet adds: to each of the four skips, and to the middle."""
    shapes = ((16, 10, 6), (16, 10, 6), (16, 5, 3), (24, 5, 3))
    residuals = [torch.randn(2, *shape, generator=generator) for shape in (*shapes, (24, 5, 3))]
    return {**latents(generator), **{f"residual {i}": residual for i, residual in enumerate(residuals)}}


def with_noise(generator: torch.Generator) -> Inputs:
    """The noise that is to be predicted, for one step of training."""
    return {**latents(generator), "noise": torch.randn(2, 4, 10, 6, generator=generator)}


def run_upstream(model: nn.Module, inputs: Inputs) -> Outputs:
    given = dict(inputs)
    residuals = [given.pop(name) for name in inputs if name.startswith("residual ")]
    if residuals:
        given |= {
            "down_block_additional_residuals": tuple(residuals[:-1]),
            "mid_block_additional_residual": residuals[-1],
        }
    if "time_ids" in given:
        given["added_cond_kwargs"] = {name: given.pop(name) for name in ("text_embeds", "time_ids")}
    if given.pop("is_pooled_in_float32", False):
        given["added_cond_kwargs"]["text_embeds"] = given["added_cond_kwargs"]["text_embeds"].float()
    return {"prediction": model(**given).sample}


def run_port(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, unet.UNet)
    model.set_timestep(inputs["timestep"])
    model.set_clip_text_embedding(inputs["encoder_hidden_states"])
    model.set_text_mask(inputs.get("encoder_attention_mask"))
    model.set_timestep_condition(inputs.get("timestep_cond"))
    if "time_ids" in inputs:
        is_float32 = inputs.get("is_pooled_in_float32", False)
        model.set_pooled_text_embedding(inputs["text_embeds"].float() if is_float32 else inputs["text_embeds"])
        model.set_time_ids(inputs["time_ids"])
    if "class_labels" in inputs:
        model.set_class_labels(inputs["class_labels"])
    residuals = [inputs[name] for name in inputs if name.startswith("residual ")]
    if residuals:
        model.set_additional_residuals(residuals[:-1], residuals[-1])
    return {"prediction": model(inputs["sample"])}


def loss_of(run: Callable[[nn.Module, Inputs], Outputs]) -> Callable[[nn.Module, Inputs], Outputs]:
    """One step of training: how far the prediction is from the noise."""

    def run_step(model: nn.Module, inputs: Inputs) -> Outputs:
        prediction = run(model, {name: value for name, value in inputs.items() if name != "noise"})["prediction"]
        return {"loss": nn.functional.mse_loss(prediction.float(), inputs["noise"].float())}

    return run_step


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


def run_checkpointed(model: nn.Module, inputs: Inputs) -> Outputs:
    """The port, with the activations of residual blocks and transformers computed again in the backward."""
    checkpoints = inject_checkpoints(select(model).of(unet.TimedResidualBlock, unet.CrossAttention2d))
    try:
        return run_port(model, inputs)
    finally:
        checkpoints.eject()


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
