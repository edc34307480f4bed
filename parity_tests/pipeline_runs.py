"""Pipelines as modules, their inputs, and how each side of a case is run: every latent, and the picture."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from reference_ports.pipelines import stable_diffusion as port

Inputs = Mapping[str, Any]
Outputs = Mapping[str, Tensor]
Options = Mapping[str, Any]
Task = Callable[..., port.Generation]

IDS = torch.arange(77)[None]


class Upstream(nn.Module):
    """A pipeline of upstream, with its models as submodules."""

    upstream_package = "diffusers"

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        super().__init__()
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline
        for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
            if getattr(pipeline, name, None) is not None:
                self.add_module(name, getattr(pipeline, name))


def pictures(generator: torch.Generator, *, mask: bool = False, batch: int = 1) -> Inputs:
    inputs = {"image": torch.rand(batch, 3, 32, 32, generator=generator)}
    if mask:
        inputs["mask"] = (torch.rand(batch, 1, 32, 32, generator=generator) > 0.5).to(torch.get_default_dtype())
    return inputs


def images(generator: torch.Generator) -> Inputs:
    """A picture for Pillow and a mask that hides a little of it."""
    levels = torch.randint(256, (45, 60, 3), dtype=torch.uint8, generator=generator)
    mask = Image.new("L", (60, 45))
    mask.paste(255, (20, 25, 33, 31))
    return {"image": Image.frombytes("RGB", (60, 45), levels.numpy().tobytes()), "mask": mask}


def begun(generator: torch.Generator) -> Inputs:
    """Latents that another model has begun, and a mask."""
    return {**masked(generator), "image": torch.randn(1, 4, 16, 16, generator=generator)}


def picture_aside(generator: torch.Generator) -> Inputs:
    """A picture for tasks that need none: every layer has to run, so it is encoded for itself."""
    return {"picture": torch.rand(1, 3, 16, 16, generator=generator)}


masked = partial(pictures, mask=True)


def generators(options: Options) -> Any:
    """One generator, or one for each picture where `each` is set."""
    count = len(options["prompt"]) * options.get("num_images_per_prompt", 1) if options.get("each") else 0
    made = [torch.Generator().manual_seed(7 + i) for i in range(count or 1)]
    return made if count else made[0]


def named(latents: list[Tensor], image: Tensor | list[Image.Image]) -> dict[str, Tensor]:
    if isinstance(image, list):
        image = torch.stack([torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8) for one in image])
    return {**{f"latents {i + 1}": one for i, one in enumerate(latents)}, "image": image}


UPSTREAM_NAMES = {"condition_scale": "guidance_scale", "mask": "mask_image"}
ASIDE = {"each", "picture"}
"""Inputs and options of the case, not of the pipelines."""


def run_upstream(model: nn.Module, inputs: Inputs, options: Options, **more: Any) -> Outputs:
    assert isinstance(model, Upstream)
    latents: list[Tensor] = []

    def keep(pipeline: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        latents.append(given["latents"])
        return {}

    call: Callable[..., Any] = type(model.pipeline).__call__.__wrapped__  # without no_grad
    given = {UPSTREAM_NAMES.get(key, key): v for key, v in {**inputs, **options}.items() if key not in ASIDE}
    output = call(
        model.pipeline,
        **given,
        **more,
        generator=generators(options),
        callback_on_step_end=keep,
        output_type="pil" if "padding_mask_crop" in options else "pt",
    )
    outputs = named(latents, output.images)
    if "picture" in inputs:
        outputs["encoded"] = model.pipeline.vae.encode(inputs["picture"]).latent_dist.mode()
    if hasattr(model, "text_encoder_2") and hasattr(model, "text_encoder"):
        outputs["first text"] = model.text_encoder(IDS).last_hidden_state
    return outputs


def run_port(model: nn.Module, inputs: Inputs, options: Options, task: Task) -> Outputs:
    assert isinstance(model, port.LatentDiffusionModel)
    given = {key: value for key, value in {**inputs, **options}.items() if key not in ASIDE}
    solver = model.solver
    try:
        generation = task(model, **given, generator=generators(options))
        latents = list(generation)
        outputs = named(latents, generation.images() if "padding_mask_crop" in options else generation.pixels())
    finally:
        model.solver = solver  # planted faults are told by a model that is as it was
    if "picture" in inputs:
        outputs["encoded"] = model.autoencoder.encode(inputs["picture"]).mode()
    if isinstance(model, port.StableDiffusion_XL):
        outputs["first text"] = model.text_encoder(IDS)
    return outputs
