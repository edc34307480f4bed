"""What one asks of a Stable Diffusion model: a picture of a text, of a text and a picture, or of a part of a picture.

Each task is a function that decides where latents come from, which steps are taken and what the denoiser is told, and
returns a `Generation`. Random numbers are drawn in upstream's order: the latents of the picture, then the noise, then
the latents of the masked picture.

Follows: Meng et al., "SDEdit" (arXiv:2108.01073), for image to image; Lugmayr et al., "RePaint" (arXiv:2201.09865), for
inpainting with a model that was not trained for it; Podell et al., "SDXL" (arXiv:2307.01952), for the hand-over to a
refiner. Upstream: the text to image, image to image and inpainting pipelines of Stable Diffusion and Stable Diffusion
XL, and `StableDiffusionInstructPix2PixPipeline`, of diffusers 0.42.1.

Differs from upstream:
- A prompt gives one picture: for several, give it several times.
- Inpainting works on pixels: it takes no latents for the picture or the masked picture.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reference_ports.blocks.pictures import Picture, mask_to_tensor, picture_to_pixels
from reference_ports.blocks.randomness import Generators, draw_normal
from reference_ports.pipelines.stable_diffusion.extra_channels import EditingModel, InpaintingModel
from reference_ports.pipelines.stable_diffusion.generation import Generation
from reference_ports.pipelines.stable_diffusion.guidance import Latents
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
    denoising_end: float | None = None,
    **options: Any,
) -> Generation:
    """Pictures of texts.

    Receives:
        prompt: a text, or one for each picture.
        negative_prompt: what to go away from: a text for all, or one for each picture.
        num_inference_steps: more take longer and err less.
        condition_scale: how far to go in the direction of the prompt; 1 or less uses no guidance. Each model has
            its own.
        height, width: of the pictures, in pixels; the model's own unless given.
        generator: source of the noise; one, or one for each picture.
        latents: the noise itself, Float[Tensor, "batch channels height width"].
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
    shape = model.latents_shape(len(as_prompts(prompt)), height, width)
    if latents is None:
        latents = draw_normal(shape, generator, model.device, model.dtype)
    check_shape(latents, shape)
    steps = steps_until(model.solver, model.steps, denoising_end)
    return Generation(
        model,
        latents * model.solver.initial_noise_scale,
        conditions,
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
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    **options: Any,
) -> Generation:
    """Pictures of texts that begin with a picture under noise, or with latents that another model has begun.

    Receives:
        prompt, negative_prompt, condition_scale, generator, options: as in `text_to_image`.
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
    batch = len(as_prompts(prompt))
    pixels = picture_to_pixels(image, multiple=model.scale_factor, latent_channels=model.latent_channels)
    model.set_inference_steps(num_inference_steps)
    if denoising_start is None:
        first_step = first_step_of(model.solver, strength)
    else:
        first_step = first_step_at(model.solver, denoising_start)
    model.set_inference_steps(num_inference_steps, first_step)
    latents = image_latents(model, pixels, batch, generator)
    if denoising_start is None:
        noise = draw_normal(latents.shape, generator, model.device, model.dtype)
        latents = model.solver.add_noise(latents, noise, first_step)
    height, width = (length * model.scale_factor for length in latents.shape[-2:])
    options = {**model.size_options(height, width), **options}
    conditions = model.compute_conditions(prompt, negative_prompt, is_guided=is_guided, **options)
    steps = steps_until(model.solver, model.steps, denoising_end)
    return Generation(model, latents, conditions, steps, condition_scale=condition_scale, generator=generator)


def inpaint(
    model: LatentDiffusionModel,
    prompt: Prompt,
    image: Picture,
    mask: Picture,
    negative_prompt: Prompt | None = None,
    *,
    strength: float = 1.0,
    num_inference_steps: int = 50,
    condition_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    generator: Generators = None,
    **options: Any,
) -> Generation:
    """Pictures whose hidden part is made of texts.

    A model that was trained for it is shown the mask and the rest of the picture; any other one is corrected after each
    step, by putting the rest of the picture, under the noise of that step, in its place.

    Receives:
        prompt, negative_prompt, condition_scale, generator, options: as in `text_to_image`.
        image: a picture, or several. One stands for all prompts.
        mask: white, or 1, where the picture shall be made anew.
        strength: as in `image_to_image`; 1 begins with noise alone.
        height, width: of the result, to which picture and mask are resized; the model's own unless given.

    Raises:
        InputError: a number is out of range, or the inputs do not fit together.
    """
    height, width = height or model.default_size[0], width or model.default_size[1]
    check_size(height, width)
    condition_scale = model.default_condition_scale if condition_scale is None else condition_scale
    is_guided, batch = model.guidance.is_used(condition_scale), len(as_prompts(prompt))
    options = {**model.size_options(height, width), **options}
    conditions = model.compute_conditions(prompt, negative_prompt, is_guided=is_guided, **options)
    model.set_inference_steps(num_inference_steps)
    model.set_inference_steps(num_inference_steps, first_step_of(model.solver, strength))
    pixels = picture_to_pixels(image, height, width).float()
    hidden = mask_to_tensor(mask, height, width)
    is_trained = isinstance(model, InpaintingModel)
    # Contiguous as upstream's, for convolutions round by the layout in memory.
    known = None if is_trained and strength == 1 else image_latents(model, pixels, batch, generator).contiguous()
    noise = draw_normal(model.latents_shape(batch, height, width), generator, model.device, model.dtype)
    if strength < 1 and known is not None:
        latents = model.solver.add_noise(known, noise, model.solver.first_step)
    else:
        latents = noise * model.solver.initial_noise_scale
    # Drawn in any case: what solvers draw later comes after it.
    shown = image_latents(model, pixels * (hidden < 0.5), batch, generator)
    hidden = nn.functional.interpolate(hidden, size=latents.shape[-2:]).to(model.device, model.dtype)
    hidden = repeated(hidden, batch, "masks")
    after_step = None
    if is_trained:
        extra = torch.cat([hidden, shown], dim=1)
        conditions["extra_channels"] = model.guidance.arrange(extra, extra) if is_guided else extra
    elif known is not None:
        after_step = KnownRegion(model, known, noise, hidden)
    return Generation(
        model,
        latents,
        conditions,
        model.steps,
        condition_scale=condition_scale,
        generator=generator,
        after_step=after_step,
    )


def edit(
    model: EditingModel,
    prompt: Prompt,
    image: Picture,
    negative_prompt: Prompt | None = None,
    *,
    condition_scale: float | None = None,
    **options: Any,
) -> Generation:
    """Pictures changed as texts say, by a model that was trained for it.

    Receives:
        prompt: what to change: a text, or one for each picture.
        image: a picture, or several. One stands for all prompts.
        negative_prompt, condition_scale, options: as in `text_to_image`; how much is kept of the picture is the
            `image_scale` of the model's `EditGuidance`.

    Raises:
        InputError: a number is out of range, or the inputs do not fit together.
    """
    pixels = picture_to_pixels(image, multiple=model.scale_factor, latent_channels=model.latent_channels).to(
        model.device, model.dtype
    )
    condition_scale = model.default_condition_scale if condition_scale is None else condition_scale
    latents = repeated(model.autoencoder.encode(pixels).mode(), len(as_prompts(prompt)), "pictures")
    height, width = (length * model.scale_factor for length in latents.shape[-2:])
    generation = text_to_image(
        model, prompt, negative_prompt, condition_scale=condition_scale, height=height, width=width, **options
    )
    if model.guidance.is_used(condition_scale):
        latents = torch.cat([latents, latents, torch.zeros_like(latents)])
    generation.conditions["extra_channels"] = latents
    return generation


class KnownRegion:
    """Puts what a mask shows of a picture in its place after each step, under the noise of the next one."""

    def __init__(self, model: LatentDiffusionModel, latents: Latents, noise: Latents, hidden: Latents) -> None:
        self.model = model
        self.latents = latents
        self.noise = noise
        self.hidden = hidden

    def __call__(self, latents: Latents, step: int) -> Latents:
        known = self.latents
        if step != self.model.steps[-1]:
            known = self.model.solver.add_noise(known, self.noise, step + 1)
        return (1 - self.hidden) * known + self.hidden * latents


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
