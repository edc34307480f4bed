"""Stable Diffusion pipelines of upstream at toy sizes, with the real vocabulary of CLIP.

    python -m parity_tests.tiny_pipelines sd1 DIRECTORY

writes one with random weights in the layout of diffusers, for `refiners generate` and for the docs.
"""

import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from parity_tests.published import clip_merges
from reference_ports.clip.tokenizer import END_OF_TEXT, START_OF_TEXT, read_merges

BETAS: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BASE: Mapping[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SD1: Mapping[str, Any] = {**BASE, "attention_head_dim": 4}
SD2: Mapping[str, Any] = {
    **BASE,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "upcast_attention": True,
}
XL: Mapping[str, Any] = {
    **BASE,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 * 6 + 24,
}
REFINER: Mapping[str, Any] = {**XL, "projection_class_embeddings_input_dim": 8 * 5 + 24}
SMALL: Mapping[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1}
"""Changes that make the same UNets half as long, for cases that are traced operation by operation."""
SMALL_XL: Mapping[str, Any] = {
    **SMALL,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
}
AUTOENCODER: Mapping[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "sample_size": 32,
}
TEXT: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 24,
    "eos_token_id": 2,
    "attn_implementation": "sdpa",
}
NARROW_TEXT: Mapping[str, Any] = {**TEXT, "hidden_size": 16}


@cache
def tokenizer(pad_token: str = END_OF_TEXT) -> CLIPTokenizer:
    """CLIP's tokenizer, with its vocabulary built as OpenAI's code builds it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = read_merges(clip_merges())
    symbols = [*characters, *(f"{character}</w>" for character in characters), *map("".join, merges)]
    vocabulary = {symbol: i for i, symbol in enumerate([*symbols, START_OF_TEXT, END_OF_TEXT])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=pad_token)


def ddim(**changes: Any) -> DDIMScheduler:
    """The scheduler of Stable Diffusion's tests."""
    return DDIMScheduler(**{**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **changes})


def euler() -> EulerDiscreteScheduler:
    """The scheduler that Stable Diffusion XL is published with."""
    return EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")


def sd(
    pipeline: type[DiffusionPipeline] = StableDiffusionPipeline,
    unet: Mapping[str, Any] = SD1,
    scheduler: Any = None,
    text: Mapping[str, Any] | None = None,
) -> DiffusionPipeline:
    """A pipeline of Stable Diffusion 1 or 2."""
    return pipeline(
        vae=AutoencoderKL(**AUTOENCODER),
        text_encoder=CLIPTextModel(CLIPTextConfig(**{**TEXT, **(text or {})})),
        tokenizer=tokenizer("!" if unet.get("use_linear_projection") else END_OF_TEXT),
        unet=UNet2DConditionModel(**unet),
        scheduler=scheduler or ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def xl(
    pipeline: type[DiffusionPipeline] = StableDiffusionXLPipeline,
    unet: Mapping[str, Any] = XL,
    scheduler: Any = None,
    force_upcast: bool = False,
    **options: Any,
) -> DiffusionPipeline:
    """A pipeline of Stable Diffusion XL."""
    return pipeline(
        vae=AutoencoderKL(**AUTOENCODER, force_upcast=force_upcast, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(CLIPTextConfig(**NARROW_TEXT)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**NARROW_TEXT, hidden_act="gelu")),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer("!"),
        unet=UNet2DConditionModel(**unet),
        scheduler=scheduler or euler(),
        **options,
    )


def refiner(unet: Mapping[str, Any] = REFINER, **options: Any) -> DiffusionPipeline:
    """The refiner of Stable Diffusion XL, which has the second text encoder alone."""
    return StableDiffusionXLImg2ImgPipeline(
        vae=AutoencoderKL(**AUTOENCODER, force_upcast=False, scaling_factor=0.13025),
        text_encoder=None,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, hidden_act="gelu")),
        tokenizer=None,
        tokenizer_2=tokenizer("!"),
        unet=UNet2DConditionModel(**unet),
        scheduler=euler(),
        requires_aesthetics_score=True,
        **options,
    )


KINDS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "sd1": sd,
    "sd2": lambda: sd(unet=SD2, scheduler=ddim(prediction_type="v_prediction"), text={"hidden_act": "gelu"}),
    "sd1-inpainting": lambda: sd(unet={**SD1, "in_channels": 9}),
    "sdxl": xl,
    "sdxl-refiner": refiner,
}


def main(arguments: list[str]) -> int:
    """Writes a pipeline with random weights to a directory."""
    if len(arguments) != 2 or arguments[0] not in KINDS:
        print(f"{__doc__}\nThere are {', '.join(KINDS)}.")
        return 2
    torch.manual_seed(0)
    KINDS[arguments[0]]().save_pretrained(arguments[1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
