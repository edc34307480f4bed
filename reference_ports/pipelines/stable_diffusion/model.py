"""Latent diffusion models: a denoiser of latents, an autoencoder, text encoders and a solver, put together.

One denoising step is one call of the model. What a whole generation does around it (where latents come from, which
steps are taken) is in `reference_ports.pipelines.stable_diffusion.tasks`.

    model.set_inference_steps(30)
    conditions = model.compute_conditions("a photo of a cat", negative_prompt="blurry")
    for step in model.steps:
        latents = model(latents, step, **conditions, condition_scale=7.5)
    pixels = model.decode(latents)

Follows: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752). Upstream:
the Stable Diffusion pipelines of diffusers 0.42.1.

Differs from upstream:
- A pipeline upstream is a task (text to image, inpainting); here a model is one class, and tasks are functions of it.
- There are no safety checker and no watermark.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor

import refiners.fluxion.layers as fl
from reference_ports.autoencoder import Autoencoder
from reference_ports.blocks.randomness import Generators
from reference_ports.pipelines.stable_diffusion.guidance import ClassifierFreeGuidance, Conditions, Guidance, Latents
from reference_ports.pipelines.stable_diffusion.loras import ModelLoras, load_loras
from reference_ports.pipelines.stable_diffusion.text import Prompt
from reference_ports.solvers import Solver
from reference_ports.unet import UNet
from refiners.conversion.loras import LoraFile
from refiners.errors import InputError

Pixels = Float[Tensor, "batch 3 height width"]


class LatentDiffusionModel(fl.Module):
    """What Stable Diffusion models share: one denoising step, and the way between pixels and latents.

    Receives:
        latents: Float[Tensor, "batch channels height width"]
        step: an index into `solver.timesteps`, one of `steps`.
        condition_scale: how far the guidance goes.
        generator: for solvers that draw noise; one, or one for each of the latents.
        conditions: as `compute_conditions` returns them.

    Returns:
        Float[Tensor, "batch channels height width"], less noisy.

    Attributes:
        unet, autoencoder, solver: the parts, which may be exchanged.
        guidance: how predictions under several conditions become one.
        default_size: height and width of the pictures that the model was trained on, in pixels.
        default_condition_scale: how far the guidance goes unless it is said.
    """

    default_condition_scale: ClassVar[float] = 7.5

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder,
        solver: Solver[Any],
        *,
        guidance: Guidance | None = None,
        default_size: tuple[int, int] = (512, 512),
    ) -> None:
        super().__init__()
        self.unet = unet
        self.autoencoder = autoencoder
        self.solver = solver
        self.guidance = ClassifierFreeGuidance() if guidance is None else guidance
        self.default_size = default_size

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        assert self.unet.device is not None  # it has weights
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the denoiser, and of latents."""
        assert self.unet.dtype is not None  # it has weights
        return self.unet.dtype

    # Denoising

    @property
    def steps(self) -> range:
        """The steps that the solver takes."""
        return self.solver.steps

    def set_inference_steps(self, num_inference_steps: int, first_step: int = 0) -> None:
        """Takes a fresh solver, with that many steps, which begins at one of them.

        Raises:
            InputError: there are no such steps.
        """
        self.solver = self.solver.rebuild(num_inference_steps, first_step=first_step).train(self.training)

    def forward(
        self,
        latents: Latents,
        step: int,
        *,
        condition_scale: float | None = None,
        generator: Generators = None,
        **conditions: Tensor,
    ) -> Latents:
        predict = partial(self.predict, step=step)
        condition_scale = self.default_condition_scale if condition_scale is None else condition_scale
        prediction = self.guidance(predict, latents, conditions, condition_scale)
        return self.solver(latents, prediction, step, generator)

    def predict(self, latents: Latents, conditions: Conditions, step: int) -> Latents:
        """What the denoiser predicts: one row of conditions for each of the latents."""
        inputs = self.solver.scale_model_input(latents, step)
        self.unet.set_timestep(self.solver.timesteps[step])
        return self.call_unet(inputs, conditions)

    def call_unet(self, inputs: Latents, conditions: Conditions) -> Latents:
        """Tells the denoiser its conditions, and calls it."""
        self.unet.set_clip_text_embedding(needed(conditions, "clip_text_embedding"))
        self.unet.set_timestep_condition(conditions.get("timestep_condition"))
        return self.unet(inputs)

    # Text

    @abstractmethod
    def compute_conditions(
        self, prompt: Prompt, negative_prompt: Prompt | None = None, *, is_guided: bool = True, **options: Any
    ) -> dict[str, Tensor]:
        """The conditions that stand for a prompt, and for a negative one where guidance is used."""

    def size_options(self, height: int, width: int) -> dict[str, Any]:
        """What `compute_conditions` has to know of the size of the picture: nothing, unless a model says otherwise."""
        return {}

    # LoRAs

    def load_loras(
        self,
        source: Path | str | Mapping[str, Tensor] | LoraFile,
        name: str = "lora",
        scale: float = 1.0,
        *,
        strict: bool = True,
    ) -> ModelLoras:
        """Puts the LoRAs of a file into the denoiser and the text encoders, or changes nothing if anything fails.

        Receives:
            source: a file in the layout of diffusers, of kohya's scripts or of peft; see `read_loras`.
            name: what the LoRAs are called.
            scale: how strong they are, 1.0 being as trained.
            strict: False leaves out what does not fit.

        Raises:
            FileFormatError: the file is truncated, corrupted, a pickle or of another format.
            ConversionError: it does not fit the model. Lists all, and says which model it looks made for.
            AdapterError: the model has LoRAs of that name already, or these would change nothing.
        """
        return load_loras(self, source, name, scale, strict=strict)

    # Pixels

    @property
    def scale_factor(self) -> int:
        """Pixels for each latent, in height and in width."""
        return self.autoencoder.downscale_factor

    @property
    def latent_channels(self) -> int:
        """Channels of latents."""
        return self.autoencoder.latent_channels

    def latents_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The shape of the latents of pictures."""
        return batch, self.latent_channels, height // self.scale_factor, width // self.scale_factor

    def encode(self, pixels: Pixels, generator: Generators = None) -> Latents:
        """Latents of pictures with values in [-1, 1], drawn from what the autoencoder deems likely.

        With a generator for each picture, each is encoded by itself.
        """
        if isinstance(generator, Sequence):
            rows = [pixels[i : i + 1] for i in range(len(pixels))]  # in their own layout, by which convolutions round
            return torch.cat([self.encode(picture, own) for picture, own in zip(rows, generator, strict=True)])
        pixels = pixels.to(self.device, self.dtype)
        return self.autoencoder.scale(self.draw_latents(pixels, generator))

    def draw_latents(self, pixels: Pixels, generator: Generator | None) -> Latents:
        """A sample of the latents of pictures, not scaled."""
        return self.autoencoder.encode(pixels).sample(generator)

    def decode(self, latents: Latents) -> Pixels:
        """Pictures of latents, with values around [-1, 1]."""
        return self.autoencoder.decode(self.autoencoder.unscale(latents))


def needed(conditions: Conditions, name: str) -> Tensor:
    """A condition that a model cannot do without.

    Raises:
        InputError: it is not there.
    """
    if name not in conditions:
        raise InputError(f"The condition {name} is missing. Give the model what its compute_conditions() returns.")
    return conditions[name]


def check_size(height: int, width: int, multiple: int = 8) -> None:
    """Checks the size of a picture.

    Raises:
        InputError: it cannot be cut into latents.
    """
    if height < multiple or width < multiple or height % multiple or width % multiple:
        raise InputError(
            f"A picture of {height}x{width} pixels cannot be made: height and width must be multiples of {multiple}."
        )
