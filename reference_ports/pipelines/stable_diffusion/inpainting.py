"""Inpainting: a part of a picture is made anew, as a text says.

Random numbers are drawn in upstream's order: the latents of the picture, then the noise, then the latents of the masked
picture.

Follows: Lugmayr et al., "RePaint" (arXiv:2201.09865), for a model that was not trained for it. Upstream: the inpainting
pipelines of Stable Diffusion and Stable Diffusion XL of diffusers 0.42.1.

Differs from upstream:
- There are no latents for the masked picture, nor for the picture with a model that is shown it.
- A crop around the mask is refused where the mask is black all over.
- Latents are scaled by the mean and the deviation of each channel where the autoencoder has them, on the way in and on
  the way out. Upstream's inpainting does so on the way out alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reference_ports.blocks.pictures import Picture, mask_to_tensor, picture_to_pixels
from reference_ports.blocks.randomness import Generators, draw_normal
from reference_ports.pipelines.stable_diffusion.extra_channels import InpaintingModel
from reference_ports.pipelines.stable_diffusion.generation import Generation
from reference_ports.pipelines.stable_diffusion.guidance import Latents
from reference_ports.pipelines.stable_diffusion.mask_crop import MaskCrop
from reference_ports.pipelines.stable_diffusion.model import LatentDiffusionModel, check_size
from reference_ports.pipelines.stable_diffusion.schedule import steps_until
from reference_ports.pipelines.stable_diffusion.tasks import (
    check_shape,
    count_images,
    first_step,
    for_each_image,
    image_latents,
    repeated,
)
from reference_ports.pipelines.stable_diffusion.text import Prompt
from refiners.errors import InputError


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
    num_images_per_prompt: int = 1,
    padding_mask_crop: int | None = None,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    **options: Any,
) -> Generation:
    """Pictures whose hidden part is made of texts.

    A model that was trained for it is shown the mask and the rest of the picture; any other one is corrected after each
    step, by putting the rest of the picture, under the noise of that step, in its place.

    Receives:
        prompt, negative_prompt, condition_scale, generator, num_images_per_prompt, options: as in `text_to_image`.
        image: a picture, or several; or latents that another model has begun. One stands for all prompts.
        mask: white, or 1, where the picture shall be made anew.
        strength: as in `image_to_image`; 1 begins with noise alone.
        height, width: of the result, to which picture and mask are resized; the model's own unless given.
        padding_mask_crop: work on what the mask hides alone, with that many pixels around it, at full size; `images`
            of the generation are then the whole picture, `pixels` what was worked on.
        denoising_start, denoising_end: as in `image_to_image`.

    Raises:
        InputError: a number is out of range, or the inputs do not fit together.
    """
    height, width = height or model.default_size[0], width or model.default_size[1]
    check_size(height, width)
    condition_scale = model.default_condition_scale if condition_scale is None else condition_scale
    is_guided, batch = model.guidance.is_used(condition_scale), count_images(prompt, num_images_per_prompt)
    options = {**model.size_options(height, width), **options}
    conditions = model.compute_conditions(prompt, negative_prompt, is_guided=is_guided, **options)
    conditions = for_each_image(conditions, num_images_per_prompt)
    model.set_inference_steps(num_inference_steps)
    model.set_inference_steps(num_inference_steps, first_step(model, strength, denoising_start))
    crop = None if padding_mask_crop is None else MaskCrop.around(image, mask, height, width, padding_mask_crop)
    if crop is not None:
        image, mask = crop.cut(crop.picture), crop.cut(crop.mask)
    begun = begin(model, image, mask, model.latents_shape(batch, height, width), strength, denoising_start, generator)
    steps = steps_until(model.solver, model.steps, denoising_end)
    after_step = None
    if isinstance(model, InpaintingModel):
        extra = torch.cat([begun.hidden, begun.shown], dim=1)
        conditions["extra_channels"] = model.guidance.arrange(extra, extra) if is_guided else extra
    else:
        after_step = KnownRegion(model, begun, steps[-1])
    return Generation(
        model,
        begun.latents,
        conditions,
        steps,
        condition_scale=condition_scale,
        generator=generator,
        after_step=after_step,
        finish=None if crop is None else crop.put_back,
    )


class Begun(NamedTuple):
    """What inpainting begins with."""

    latents: Latents
    known: Latents
    """The latents of the picture; those to begin with for a model that is shown the picture."""
    noise: Latents
    shown: Latents
    """The latents of the picture without what the mask hides; those of the picture where they were given."""
    hidden: Tensor
    """Float[Tensor, "batch 1 height width"], 1 where the picture is made anew, in the size of latents."""


def begin(
    model: LatentDiffusionModel,
    image: Picture,
    mask: Picture,
    shape: tuple[int, int, int, int],
    strength: float,
    denoising_start: float | None,
    generator: Generators,
) -> Begun:
    """Encodes the picture, draws the noise, and encodes what the mask shows of the picture.

    Raises:
        InputError: the inputs do not fit together.
    """
    batch, height, width = shape[0], shape[2] * model.scale_factor, shape[3] * model.scale_factor
    pixels = picture_to_pixels(image, height, width, latent_channels=model.latent_channels).float()
    hidden = mask_to_tensor(mask, height, width)
    is_trained, is_latent = isinstance(model, InpaintingModel), pixels.shape[1] == model.latent_channels
    if is_trained and is_latent:
        raise InputError("A model that is shown the rest of the picture needs the picture itself, not its latents.")
    known = None
    if not is_trained or strength < 1 or denoising_start is not None:
        # Contiguous as upstream's, for convolutions round by the layout in memory.
        known = encoded(model, pixels, batch, generator).contiguous()
        check_shape(known, shape)
    noise = draw_normal(shape, generator, model.device, model.dtype)
    latents = noise * model.solver.initial_noise_scale
    if known is not None and denoising_start is not None:
        latents = known
    elif known is not None and strength < 1:
        latents = model.solver.add_noise(known, noise, model.solver.first_step)
    # Drawn in any case: what solvers draw later comes after it.
    shown = pixels if is_latent else encoded(model, pixels * (hidden < 0.5), batch, generator)
    hidden = nn.functional.interpolate(hidden, size=shape[2:]).to(model.device, model.dtype)
    return Begun(latents, latents if known is None else known, noise, shown, repeated(hidden, batch, "masks"))


class KnownRegion:
    """Puts what a mask shows of a picture in its place after each step, under the noise of the next one."""

    def __init__(self, model: LatentDiffusionModel, begun: Begun, last_step: int) -> None:
        self.model = model
        self.begun = begun
        self.last_step = last_step

    def __call__(self, latents: Latents, step: int) -> Latents:
        _, known, noise, _, hidden = self.begun
        if step != self.last_step:
            known = self.model.solver.add_noise(known, noise, step + 1)
        return (1 - hidden) * known + hidden * latents


def encoded(model: LatentDiffusionModel, pixels: Tensor, batch: int, generator: Generators) -> Latents:
    """As `image_latents`, but with one draw for each picture, whichever prompts it stands for."""
    if isinstance(generator, Sequence) and pixels.shape[1] != model.latent_channels:
        return repeated(model.encode(pixels, generator[: len(pixels)]), batch, "pictures")
    return image_latents(model, pixels, batch, generator)
