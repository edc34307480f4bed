"""Stable Diffusion from prompts to pictures: pipelines of diffusers beside `reference_ports.pipelines`.

Compared are the latents after every step, and the picture. Prompts go through the real vocabulary. Upstream's pipelines
forbid gradients; here they are called without that, so that one backward pass goes through all steps.
"""

from collections.abc import Callable
from functools import cache, partial
from json import loads
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn
from transformers import CLIPTextConfig

from parity_tests import tiny_pipelines as tiny
from parity_tests.pipeline_runs import (
    Inputs,
    Options,
    Task,
    Upstream,
    begun,
    images,
    masked,
    picture_aside,
    pictures,
    run_port,
    run_upstream,
)
from parity_tests.published import clip_merges
from reference_ports import autoencoder, clip, solvers, unet
from reference_ports.pipelines import stable_diffusion as port
from refiners.conversion import KeyMap
from refiners.parity import Case

LANES = ("float64", "float32", "bfloat16")
PROMPT, OTHER = "a photo of a cat", "a watercolour of two dogs, trending"
STEPS, SCALE = 2, 5.0

SD1, SD2 = {**tiny.SD1, **tiny.SMALL}, {**tiny.SD2, **tiny.SMALL}
XL, REFINER = {**tiny.XL, **tiny.SMALL_XL}, {**tiny.REFINER, **tiny.SMALL_XL}

SOFTMAX = "adds the same number to all scores of a query: softmax removes it"


@cache
def tokenizer(pad_token: str = "<|endoftext|>") -> clip.CLIPTokenizer:
    return clip.CLIPTokenizer.from_file(clip_merges(), pad_token=pad_token)


def unet_of(config: Options) -> unet.UNet:
    return unet.from_config(dict(config))


def autoencoder_of(**changes: Any) -> autoencoder.Autoencoder:
    return autoencoder.from_config({**tiny.AUTOENCODER, **changes})


def solver_of(scheduler: Any) -> solvers.Solver[Any]:
    """As a scheduler_config.json gives it."""
    return solvers.from_config(loads(scheduler.to_json_string()), STEPS)


def text_config(options: Options) -> dict[str, Any]:
    return CLIPTextConfig(**options).to_dict()


TEXT_KEYS = {"text_encoder": clip.TEXT_ENCODER_KEYS, "text_encoder_2": clip.TEXT_PROJECTION_KEYS}


def keys_of(config: Options, *encoders: str) -> KeyMap:
    """The keys of a pipeline: those of its UNet, its autoencoder, and its text encoders."""
    return _keys_of(tuple(config.items()), *encoders)


@cache  # most cases have the configuration of another one
def _keys_of(config: tuple[tuple[str, Any], ...], *encoders: str) -> KeyMap:
    keys = unet.key_map_for(dict(config)).under("unet", "unet") | autoencoder.KEYS.under("vae", "autoencoder")
    for name in encoders:
        keys = keys | TEXT_KEYS[name].under(name, name)
    return keys.named("a Stable Diffusion pipeline")


KEY_BIAS_2 = {"text_encoder_2.text_model.encoder.layers.{i}.self_attn.k_proj.bias": SOFTMAX}
KEY_BIAS = {"vae.*.to_k.bias": SOFTMAX, "text_encoder.encoder.layers.{i}.self_attn.k_proj.bias": SOFTMAX}
CELLS = {
    "batch": "noise is drawn for the whole batch",
    "padded": "prompts always fill all places",
    "checkpointed": "a pipeline is for inference",
}
NO_GRAPH = {**CELLS, "compiled": "its steps draw noise, and torch takes no generator into a graph"}


def sd_case(
    name: str,
    summary: str,
    options: Options,
    *,
    task: Task,
    pipeline: type[DiffusionPipeline] = StableDiffusionPipeline,
    model: type[port.StableDiffusion_1] = port.StableDiffusion_1,
    config: Options = SD1,
    scheduler: Callable[[], Any] = tiny.ddim,
    guidance: Callable[[], port.Guidance] | None = None,
    encoder: Options | None = None,
    inputs: Callable[[torch.Generator], Inputs] = picture_aside,
    **more: Any,
) -> Case:
    """Stable Diffusion 1 or 2."""
    text = {**tiny.TEXT, **(encoder or {})}

    def build() -> nn.Module:
        return model(
            unet_of(config),
            autoencoder_of(),
            clip.text_encoder_from_config(text_config(text)),
            tokenizer("!" if config.get("use_linear_projection") else "<|endoftext|>"),
            solver_of(scheduler()),
            guidance=guidance() if guidance else None,
            default_size=(32, 32),
        )

    return case(
        name,
        summary,
        lambda: tiny.sd(pipeline, config, scheduler(), text),
        build,
        keys_of(config, "text_encoder"),
        task,
        options,
        inputs=inputs,
        without_influence=KEY_BIAS,
        **more,
    )


def xl_case(
    name: str,
    summary: str,
    options: Options,
    *,
    task: Task,
    pipeline: type[DiffusionPipeline] = StableDiffusionXLPipeline,
    model: type[port.StableDiffusion_XL] = port.StableDiffusion_XL,
    config: Options = XL,
    needs_float32: bool = False,
    inputs: Callable[[torch.Generator], Inputs] = picture_aside,
    **more: Any,
) -> Case:
    """The base model of Stable Diffusion XL."""

    def build() -> nn.Module:
        return model(
            unet_of(config),
            autoencoder_of(scaling_factor=0.13025),
            clip.text_encoder_from_config(text_config(tiny.NARROW_TEXT)),
            clip.text_projection_from_config(text_config({**tiny.NARROW_TEXT, "hidden_act": "gelu"})),
            tokenizer(),
            tokenizer("!"),
            solver_of(tiny.euler()),
            default_size=(32, 32),
            needs_float32=needs_float32,
        )

    return case(
        name,
        summary,
        lambda: tiny.xl(pipeline, config, force_upcast=needs_float32),
        build,
        keys_of(config, "text_encoder", "text_encoder_2"),
        task,
        options,
        inputs=inputs,
        without_influence={**KEY_BIAS, **KEY_BIAS_2},
        **more,
    )


def refiner_case(name: str, summary: str, options: Options, config: Options = REFINER) -> Case:
    """The refiner of Stable Diffusion XL."""

    def build() -> nn.Module:
        return port.StableDiffusion_XL_Refiner(
            unet_of(config),
            autoencoder_of(scaling_factor=0.13025),
            clip.text_projection_from_config(text_config({**tiny.TEXT, "hidden_act": "gelu"})),
            tokenizer("!"),
            solver_of(tiny.euler()),
            default_size=(32, 32),
            needs_float32=False,
        )

    return case(
        name,
        summary,
        lambda: tiny.refiner(config),
        build,
        keys_of(config, "text_encoder_2"),
        port.image_to_image,
        options,
        inputs=pictures,
        without_influence={"vae.*.to_k.bias": SOFTMAX, **KEY_BIAS_2},
    )


def case(
    name: str,
    summary: str,
    upstream: Callable[[], DiffusionPipeline],
    build: Callable[[], nn.Module],
    key_map: KeyMap,
    task: Task,
    options: Options,
    **more: Any,
) -> Case:
    options = {"num_inference_steps": STEPS, "condition_scale": SCALE, "prompt": PROMPT, **options}
    aside = more.pop("upstream_options", {})
    return Case(
        id=f"pipelines/{name}",
        summary=summary,
        upstream=lambda: Upstream(upstream()),
        port=build,
        key_map=key_map,
        run_upstream=partial(run_upstream, options=options, **aside),
        run_port=partial(run_port, options=options, task=task),
        **{"lanes": LANES, "without_cells": CELLS, **more},
    )


SIZE = {"height": 32, "width": 32}
BATCH = {"prompt": [PROMPT, OTHER]}
SHARE = {"strength": 0.7, "num_inference_steps": 3}
NINE, EIGHT = {"in_channels": 9}, {"in_channels": 8}

text = partial(sd_case, task=port.text_to_image)
image = partial(sd_case, task=port.image_to_image, pipeline=StableDiffusionImg2ImgPipeline, inputs=pictures)
inpainting = partial(
    sd_case,
    task=port.inpaint,
    pipeline=StableDiffusionInpaintPipeline,
    model=port.StableDiffusion_1_Inpainting,
    config={**SD1, **NINE},
    inputs=masked,
)
untrained = partial(inpainting, model=port.StableDiffusion_1, config=SD1)
editing = partial(
    sd_case,
    task=port.edit,
    pipeline=StableDiffusionInstructPix2PixPipeline,
    model=port.StableDiffusion_1_Editing,
    config={**SD1, **EIGHT},
    guidance=port.EditGuidance,
    inputs=pictures,
)
consistency = partial(
    text,
    pipeline=LatentConsistencyModelPipeline,
    config={**SD1, "time_cond_proj_dim": 32},
    scheduler=partial(LCMScheduler, **tiny.BETAS),
    guidance=partial(port.EmbeddedGuidance, 32),
    without_cells=NO_GRAPH,
)
second = partial(
    text,
    model=port.StableDiffusion_2,
    config=SD2,
    scheduler=partial(tiny.ddim, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    encoder={"hidden_act": "gelu"},
)
xl_text = partial(xl_case, task=port.text_to_image)
xl_image = partial(xl_case, task=port.image_to_image, pipeline=StableDiffusionXLImg2ImgPipeline, inputs=pictures)
xl_inpainting = partial(
    xl_case,
    task=port.inpaint,
    pipeline=StableDiffusionXLInpaintPipeline,
    model=port.StableDiffusion_XL_Inpainting,
    config={**XL, **NINE},
    inputs=masked,
)
rescaled = partial(
    text,
    options={**SIZE, **BATCH, "negative_prompt": ["ugly", ""], "each": True},
    guidance=partial(port.ClassifierFreeGuidance, rescale=0.7),
    upstream_options={"guidance_rescale": 0.7},
)
ANCESTRAL = partial(EulerAncestralDiscreteScheduler, **tiny.BETAS)

CASES = (
    text("sd1-text", "text to image with DDIM", SIZE),
    inpainting("sd1-inpainting", "9 channels, from noise alone", SIZE),
    consistency("sd1-consistency", "the scale is a condition: a latent consistency model", SIZE),
    xl_text("xl-text", "text to image with Euler, no negative prompt", SIZE),
    xl_image(
        "xl-image-float32",
        "an autoencoder that computes in float32 for a model in half precision",
        SHARE,
        needs_float32=True,
        lanes=("bfloat16", "float16"),
        gradients=False,
    ),
    refiner_case("xl-refiner", "the refiner, told how beautiful the picture shall be", SHARE),
)
"""One for each way through the models, traced operation by operation, with gradients through all steps."""

VERIFIED: Options = {"num_inference_steps": 3}
"""Three steps, on the configurations of shared/upstream.md."""
TWICE: Options = {"num_images_per_prompt": 2}
MIDDLE: Options = {"num_inference_steps": 6, "denoising_start": 0.3, "denoising_end": 0.8}
"""The share of another model's pictures that is neither its first nor its last."""
QUICK: Options = {"lanes": ("float32",)}
"""For what differs from another one in its options alone."""
MORE = (
    text("sd1-text", "", {**SIZE, **VERIFIED}, config=tiny.SD1),
    text("sd1-text-batch", "", {**SIZE, **BATCH, **VERIFIED}, **QUICK, config=tiny.SD1),
    text("sd1-text-unguided", "", {**SIZE, **VERIFIED, "condition_scale": 1.0}, **QUICK, config=tiny.SD1),
    rescaled("sd1-rescaled", "", config=tiny.SD1, scheduler=ANCESTRAL),
    second("sd2-text", "", {**SIZE, **VERIFIED, "negative_prompt": "ugly!"}, config=tiny.SD2),
    image("sd1-image", "", SHARE, config=tiny.SD1),
    image("sd1-image-batch", "", {**SHARE, **BATCH, "each": True}, **QUICK, config=tiny.SD1),
    image("sd1-images", "", {**SHARE, **BATCH}, **QUICK, config=tiny.SD1, inputs=partial(pictures, batch=2)),
    inpainting("sd1-inpainting", "", {**SIZE, **VERIFIED}, config={**tiny.SD1, **NINE}),
    inpainting("sd1-inpainting-share", "", {**SIZE, **BATCH, **SHARE}, **QUICK, config={**tiny.SD1, **NINE}),
    untrained("sd1-inpainting-untrained", "", {**SIZE, **VERIFIED}, config=tiny.SD1, scheduler=ANCESTRAL),
    untrained(
        "sd1-inpainting-untrained-images",
        "",
        {**SIZE, **BATCH, **SHARE},
        **QUICK,
        config=tiny.SD1,
        inputs=partial(masked, batch=2),
    ),
    untrained(
        "sd1-inpainting-untrained-share",
        "",
        {**SIZE, **SHARE},
        **QUICK,
        config=tiny.SD1,
        scheduler=HeunDiscreteScheduler,
    ),
    untrained("sd1-inpainting-untrained-pillow", "", {**SIZE, **SHARE, **BATCH, "each": True}, **QUICK, inputs=images),
    editing("sd1-editing", "", VERIFIED, config={**tiny.SD1, **EIGHT}),
    consistency("sd1-consistency", "", {**SIZE, **VERIFIED}, config={**tiny.SD1, "time_cond_proj_dim": 32}),
    text("sd1-text-several", "", {**SIZE, **BATCH, **TWICE, "negative_prompt": ["ugly", ""]}, **QUICK),
    image("sd1-image-several", "", {**SHARE, **BATCH, **TWICE, "each": True}, **QUICK),
    inpainting("sd1-inpainting-several", "", {**SIZE, **BATCH, **SHARE, **TWICE, "each": True}, **QUICK),
    editing("sd1-editing-several", "", TWICE, **QUICK),
    inpainting("sd1-inpainting-crop", "", {**SIZE, **TWICE, "padding_mask_crop": 3}, **QUICK, inputs=images),
    xl_text("xl-text", "", {**SIZE, **VERIFIED}, config=tiny.XL),
    xl_text(
        "xl-text-batch",
        "",
        {**SIZE, **BATCH, **VERIFIED, "negative_prompt": ["ugly", ""], "clip_skip": 1},
        **QUICK,
        config=tiny.XL,
    ),
    xl_text(
        "xl-text-two-prompts",
        "",
        {**SIZE, **VERIFIED, "prompt_2": OTHER, "negative_prompt": "ugly", "negative_prompt_2": "blurry"},
        **QUICK,
        config=tiny.XL,
    ),
    xl_image("xl-image", "", SHARE, config=tiny.XL),
    xl_inpainting("xl-inpainting", "", {**SIZE, **VERIFIED, "strength": 0.9}, config={**tiny.XL, **NINE}),
    xl_inpainting(
        "xl-inpainting-untrained",
        "",
        {**SIZE, **VERIFIED, "strength": 0.9},
        config=tiny.XL,
        model=port.StableDiffusion_XL,
    ),
    xl_inpainting("xl-inpainting-handed-over", "", {**SIZE, **MIDDLE, **TWICE, "strength": 0.9}, **QUICK),
    xl_inpainting(
        "xl-inpainting-untrained-begun",
        "",
        {**SIZE, **MIDDLE},
        **QUICK,
        config=XL,
        model=port.StableDiffusion_XL,
        inputs=begun,
    ),
    xl_image("xl-image-several", "", {**SHARE, **MIDDLE, **TWICE, "negative_prompt": "ugly"}, **QUICK),
    refiner_case("xl-refiner", "", {**SHARE, "negative_prompt": "ugly"}, config=tiny.REFINER),
)
"""The verified configurations, batches and rarer options: compared by their outputs alone, see test_pipelines.py."""
