"""What one asks of a Stable Diffusion model: a picture of a text, of a text and a picture, or of an instruction.

Each task is a function that decides where latents come from, which steps are taken and what the denoiser is told, and
returns a `Generation`. Random numbers are drawn in upstream's order: the latents of the picture, then the noise. A
part of a picture is made anew by `reference_ports.pipelines.stable_diffusion.inpainting`.

Follows: Meng et al., "SDEdit" (arXiv:2108.01073), for image to image; Podell et al., "SDXL" (arXiv:2307.01952), for
the hand-over to a refiner. Upstream: the text to image and image to image pipelines of Stable Diffusion and Stable
Diffusion XL, and `StableDiffusionInstructPix2PixPipeline`, of diffusers 0.42.1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reference_ports.blocks.pictures import Picture, picture_to_pixels
from reference_ports.blocks.randomness import Generators, draw_normal
from reference_ports.pipelines.stable_diffusion.extra_channels import EditingModel
from reference_ports.pipelines.stable_diffusion.generation import Generation
from reference_ports.pipelines.stable_diffusion.guidance import Conditions, Latents
from reference_ports.pipelines.stable_diffusion.model import LatentDiffusionModel, check_size
from reference_ports.pipelines.stable_diffusion.schedule import first_step_at, first_step_of, steps_until
from reference_ports.pipelines.stable_diffusion.text import Prompt, as_prompts
from refiners.errors import InputError


def text_to_image(
    model: LatentDiffusionModel,
    prompt: Prompt,
    negative_prompt: Prompt | None = None,
    *,
    num_inference_steps: int = 50,
    condition_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    generator: Generators = None,
    latents: Latents | None = None,
    num_images_per_prompt: int = 1,
    denoising_end: float | None = None,
    **options: Any,
) -> Generation:
    """Pictures of texts.

    Receives:
        prompt: a text, or several.
        negative_prompt: what to go away from: a text for all, or one for each prompt.
        num_inference_steps: more take longer and err less.
        condition_scale: how far to go in the direction of the prompt; 1 or less uses no guidance. Each model has
            its own.
        height, width: of the pictures, in pixels; the model's own unless given.
        generator: source of the noise; one, or one for each picture.
        latents: the noise itself, Float[Tensor, "batch channels height width"].
        num_images_per_prompt: how many pictures to make of each prompt; those of one prompt follow one another.
        denoising_end: the share of the denoising to do, when a refiner does the rest.
        options: of `compute_conditions`, such as `clip_skip` or `size`.

    Raises:
        InputError: a number is out of range, or the texts and the other inputs do not fit together.
    """
    height, width = height or model.default_size[0], width or model.default_size[1]
    check_size(height, width)
    condition_scale = model.default_condition_scale if condition_scale is None else condition_scale
    is_guided = model.guidance.is_used(condition_scale)
    options = {**model.size_options(height, width), **options}
    conditions = model.compute_conditions(prompt, negative_prompt, is_guided=is_guided, **options)
    model.set_inference_steps(num_inference_steps)
    shape = model.latents_shape(count_images(prompt, num_images_per_prompt), height, width)
    if latents is None:
        latents = draw_normal(shape, generator, model.device, model.dtype)
    check_shape(latents, shape)
    steps = steps_until(model.solver, model.steps, denoising_end)
    return Generation(
        model,
        latents * model.solver.initial_noise_scale,
        for_each_image(conditions, num_images_per_prompt),
        steps,
        condition_scale=condition_scale,
        generator=generator,
    )


def image_to_image(
    model: LatentDiffusionModel,
    prompt: Prompt,
    image: Picture,
    negative_prompt: Prompt | None = None,
    *,
    strength: float = 0.8,
    num_inference_steps: int = 50,
    condition_scale: float | None = None,
    generator: Generators = None,
    num_images_per_prompt: int = 1,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    **options: Any,
) -> Generation:
    """Pictures of texts that begin with a picture under noise, or with latents that another model has begun.

    Receives:
        prompt, negative_prompt, condition_scale, generator, num_images_per_prompt, options: as in `text_to_image`.
        image: a picture, several, or latents. One stands for all prompts.
        strength: how much noise is added: 0 … 1, from the picture to its being ignored.
        num_inference_steps: of the whole schedule; a share of them is taken.
        denoising_start: the share of the denoising that is done already; no noise is added then.
        denoising_end: the share at which to stop.

    Raises:
        InputError: a number is out of range, or the inputs do not fit together.
    """
    condition_scale = model.default_condition_scale if condition_scale is None else condition_scale
    is_guided = model.guidance.is_used(condition_scale)
    batch = count_images(prompt, num_images_per_prompt)
    pixels = picture_to_pixels(image, multiple=model.scale_factor, latent_channels=model.latent_channels)
    model.set_inference_steps(num_inference_steps)
    model.set_inference_steps(num_inference_steps, first_step(model, strength, denoising_start))
    latents = image_latents(model, pixels, batch, generator)
    if denoising_start is None:
        noise = draw_normal(latents.shape, generator, model.device, model.dtype)
        latents = model.solver.add_noise(latents, noise, model.solver.first_step)
    height, width = (length * model.scale_factor for length in latents.shape[-2:])
    options = {**model.size_options(height, width), **options}
    conditions = model.compute_conditions(prompt, negative_prompt, is_guided=is_guided, **options)
    conditions = for_each_image(conditions, num_images_per_prompt)
    steps = steps_until(model.solver, model.steps, denoising_end)
    return Generation(model, latents, conditions, steps, condition_scale=condition_scale, generator=generator)


def edit(
    model: EditingModel,
    prompt: Prompt,
    image: Picture,
    negative_prompt: Prompt | None = None,
    *,
    condition_scale: float | None = None,
    num_images_per_prompt: int = 1,
    **options: Any,
) -> Generation:
    """Pictures changed as texts say, by a model that was trained for it.

    Receives:
        prompt: what to change: a text, or several.
        image: a picture, or several. One stands for all prompts.
        negative_prompt, condition_scale, num_images_per_prompt, options: as in `text_to_image`; how much is kept of
            the picture is the `image_scale` of the model's `EditGuidance`.

    Raises:
        InputError: a number is out of range, or the inputs do not fit together.
    """
    pixels = picture_to_pixels(image, multiple=model.scale_factor, latent_channels=model.latent_channels).to(
        model.device, model.dtype
    )
    condition_scale = model.default_condition_scale if condition_scale is None else condition_scale
    batch = count_images(prompt, num_images_per_prompt)
    latents = repeated(model.autoencoder.encode(pixels).mode(), batch, "pictures")
    height, width = (length * model.scale_factor for length in latents.shape[-2:])
    options |= {"height": height, "width": width, "num_images_per_prompt": num_images_per_prompt}
    generation = text_to_image(model, prompt, negative_prompt, condition_scale=condition_scale, **options)
    if model.guidance.is_used(condition_scale):
        latents = torch.cat([latents, latents, torch.zeros_like(latents)])
    generation.conditions["extra_channels"] = latents
    return generation


def count_images(prompt: Prompt, num_images_per_prompt: int) -> int:
    """How many pictures are made of prompts.

    Raises:
        InputError: a prompt is no text, or the number of its pictures no number of pictures.
    """
    if type(num_images_per_prompt) is not int or num_images_per_prompt < 1:
        raise InputError(f"num_images_per_prompt is {num_images_per_prompt!r}: it must be a whole number from 1 on.")
    return len(as_prompts(prompt)) * num_images_per_prompt


def for_each_image(conditions: Conditions, num_images_per_prompt: int) -> dict[str, Tensor]:
    """The conditions of prompts, each row as often as pictures are made of a prompt."""
    if num_images_per_prompt == 1:
        return dict(conditions)
    return {name: tensor.repeat_interleave(num_images_per_prompt, dim=0) for name, tensor in conditions.items()}


def first_step(model: LatentDiffusionModel, strength: float, denoising_start: float | None) -> int:
    """Where a task begins: at a share of the noise, or where another model has stopped.

    Raises:
        InputError: the share is out of range, or leaves no step.
    """
    if denoising_start is None:
        return first_step_of(model.solver, strength)
    return first_step_at(model.solver, denoising_start)


def image_latents(model: LatentDiffusionModel, pixels: Tensor, batch: int, generator: Generators) -> Latents:
    """The latents of pictures, as many as there are prompts. What has the channels of latents is taken as such.

    Raises:
        InputError: there are more or fewer pictures, and not one for several prompts.
    """
    if pixels.shape[1] == model.latent_channels:
        return repeated(pixels.to(model.device, model.dtype), batch, "latents")
    if isinstance(generator, Sequence):  # each prompt has a draw of its own
        return model.encode(repeated(pixels, batch, "pictures"), generator)
    return repeated(model.encode(pixels, generator), batch, "pictures")


def repeated(tensor: Tensor, batch: int, what: str) -> Tensor:
    """One item for each prompt: all of them again and again, laid out in memory as they were.

    Raises:
        InputError: their number does not divide that of the prompts.
    """
    if batch % len(tensor):
        raise InputError(f"There are {len(tensor)} {what} for {batch} prompts. Give one for each, or one for all.")
    return torch.cat([tensor] * (batch // len(tensor)))


def check_shape(latents: Tensor, shape: tuple[int, ...]) -> None:
    """Checks latents that were given.

    Raises:
        InputError: they have another shape.
    """
    if tuple(latents.shape) != shape:
        raise InputError(f"The latents have the shape {tuple(latents.shape)}, the model and the prompts need {shape}.")
