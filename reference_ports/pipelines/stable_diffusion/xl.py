"""Stable Diffusion XL: two text encoders read side by side, and the size of the picture as a condition.

The base model reads CLIP ViT-L/14 and OpenCLIP ViT-bigG/14. The refiner, which finishes what the base began, reads the
second alone, and is told how beautiful the picture shall be.

Follows: Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis"
(arXiv:2307.01952). Upstream: `diffusers.StableDiffusionXLPipeline` and its kin 0.42.1.

Differs from upstream:
- The autoencoder computes in float32 while it encodes for a model in half precision, and is then as it was; upstream
  casts its weights there and back, which rounds those of a model in float64.
- In a batch, sizes that differ for the negative prompts stay with these. Upstream's text to image mixes up their order.
- The refiner, which has one text encoder, refuses a second prompt; upstream ignores it.
"""

from abc import abstractmethod
from collections.abc import Generator as Iterates
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from reference_ports.autoencoder import Autoencoder
from reference_ports.clip import CLIPTextEncoder, CLIPTextModelWithProjection, CLIPTokenizer
from reference_ports.pipelines.stable_diffusion.guidance import Conditions, Guidance, Latents
from reference_ports.pipelines.stable_diffusion.model import LatentDiffusionModel, Pixels, needed
from reference_ports.pipelines.stable_diffusion.size import AestheticCondition, Size, SizeCondition, time_ids
from reference_ports.pipelines.stable_diffusion.text import (
    Prompt,
    as_prompts,
    negative_prompts,
    penultimate_states,
    penultimate_states_and_embedding,
)
from reference_ports.solvers import Solver
from reference_ports.unet import UNet
from refiners.errors import InputError

HALF = (torch.float16, torch.bfloat16)
Condition = SizeCondition | AestheticCondition
States = Float[Tensor, "batch 77 embedding_dim"]
Pooled = Float[Tensor, "batch projection_dim"]


class XLOptions(TypedDict, total=False):
    """The keyword arguments of `XLModel`."""

    guidance: Guidance | None
    default_size: Size
    zero_negative_prompt: bool
    needs_float32: bool


class XLModel(LatentDiffusionModel):
    """What the base model and the refiner share. See `LatentDiffusionModel`.

    Attributes:
        zero_negative_prompt: whether a negative prompt that is not given is all zeros, instead of the empty text.
        needs_float32: whether the autoencoder overflows in float16, as the published one does.
    """

    default_condition_scale = 5.0

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        solver: Solver[Any],
        *,
        guidance: Guidance | None = None,
        default_size: Size = (1024, 1024),
        zero_negative_prompt: bool = True,
        needs_float32: bool = True,
    ) -> None:
        super().__init__(unet, autoencoder, solver, guidance=guidance, default_size=default_size)
        self.text_encoder_2 = text_encoder_2
        self.tokenizer_2 = tokenizer_2
        self.zero_negative_prompt = zero_negative_prompt
        self.needs_float32 = needs_float32

    # Text

    def encode_prompts(self, prompts: Sequence[str], clip_skip: int = 0) -> tuple[States, Pooled]:
        """What the second text encoder makes of texts: the states of all tokens, and the vector of each whole text."""
        return penultimate_states_and_embedding(self.text_encoder_2, self.tokenizer_2, prompts, clip_skip)

    @abstractmethod
    def encode_pairs(self, prompts: Sequence[str], prompts_2: Sequence[str], clip_skip: int) -> tuple[States, Pooled]:
        """The states that the denoiser attends to, and the vector of each whole text."""

    def compute_clip_text_embedding(
        self,
        prompt: Prompt,
        negative_prompt: Prompt | None = None,
        *,
        prompt_2: Prompt | None = None,
        negative_prompt_2: Prompt | None = None,
        is_guided: bool = True,
        clip_skip: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The embeddings of prompts, arranged with those of negative prompts for the guidance.

        Receives:
            prompt: a text, or one for each picture.
            negative_prompt: what to go away from: a text for all, or one for each picture.
            prompt_2, negative_prompt_2: other texts for the second text encoder.
            is_guided: False leaves the negative prompts out.
            clip_skip: how many more of the last layers of the text encoders not to use, for the prompts.

        Returns:
            Float[Tensor, "rows 77 embedding_dim"], Float[Tensor, "rows projection_dim"]

        Raises:
            InputError: prompts are no texts, or there are not as many negative ones; too many layers are skipped.
        """
        prompts = as_prompts(prompt)
        positive = self.encode_pairs(prompts, second_prompts(prompt_2, prompts), clip_skip)
        if not is_guided:
            return positive
        if negative_prompt is None and self.zero_negative_prompt:
            negative = torch.zeros_like(positive[0]), torch.zeros_like(positive[1])
        else:
            first, second = (
                negative_prompts(texts, len(prompts))
                for texts in (negative_prompt, negative_prompt_2 or negative_prompt)
            )
            negative = self.encode_pairs(first, second, clip_skip=0)
        return self.guidance.arrange(negative[0], positive[0]), self.guidance.arrange(negative[1], positive[1])

    def compute_conditions(
        self,
        prompt: Prompt,
        negative_prompt: Prompt | None = None,
        *,
        is_guided: bool = True,
        size: Condition | None = None,
        negative_size: Condition | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """The conditions that stand for a prompt and for sizes; these are the model's default ones unless given."""
        text, pooled = self.compute_clip_text_embedding(prompt, negative_prompt, is_guided=is_guided, **options)
        size = size or self.size_condition(*self.default_size)
        count = len(as_prompts(prompt))
        positive, negative = (
            time_ids(one, count, text.device, text.dtype) for one in (size, negative_size or self.negative_of(size))
        )
        ids = self.guidance.arrange(negative, positive) if is_guided else positive
        return {"clip_text_embedding": text, "pooled_text_embedding": pooled, "time_ids": ids}

    def call_unet(self, inputs: Latents, conditions: Conditions) -> Latents:
        self.unet.set_pooled_text_embedding(needed(conditions, "pooled_text_embedding"))
        self.unet.set_time_ids(needed(conditions, "time_ids"))
        return super().call_unet(inputs, conditions)

    def size_options(self, height: int, width: int) -> dict[str, Any]:
        return {"size": self.size_condition(height, width)}

    @abstractmethod
    def size_condition(self, height: int, width: int) -> Condition:
        """What the denoiser is told of the size of a picture, unless the caller says otherwise."""

    def negative_of(self, size: Condition) -> Condition:
        """What it is told with the negative prompts."""
        return size

    # Pixels

    def draw_latents(self, pixels: Pixels, generator: Generator | None) -> Latents:
        if not self.needs_float32 or self.dtype not in HALF:
            return super().draw_latents(pixels, generator)
        with in_float32(self.autoencoder):
            return super().draw_latents(pixels.float(), generator).to(self.dtype)

    def decode(self, latents: Latents) -> Pixels:
        if not self.needs_float32 or self.dtype != torch.float16:
            return super().decode(latents)
        with in_float32(self.autoencoder):
            return super().decode(latents.float())


class StableDiffusion_XL(XLModel):
    """The base model of Stable Diffusion XL. See `XLModel`."""

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder,
        text_encoder: CLIPTextEncoder,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        solver: Solver[Any],
        **options: Unpack[XLOptions],
    ) -> None:
        super().__init__(unet, autoencoder, text_encoder_2, tokenizer_2, solver, **options)
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer

    def encode_pairs(self, prompts: Sequence[str], prompts_2: Sequence[str], clip_skip: int) -> tuple[States, Pooled]:
        first = penultimate_states(self.text_encoder, self.tokenizer, prompts, clip_skip)
        second, pooled = self.encode_prompts(prompts_2, clip_skip)
        return torch.cat([first, second], dim=-1), pooled

    def size_condition(self, height: int, width: int) -> SizeCondition:
        return SizeCondition(original_size=(height, width), target_size=(height, width))


class StableDiffusion_XL_Refiner(XLModel):
    """The refiner of Stable Diffusion XL. See `XLModel`."""

    def encode_pairs(self, prompts: Sequence[str], prompts_2: Sequence[str], clip_skip: int) -> tuple[States, Pooled]:
        if prompts_2 != prompts:
            raise InputError("The refiner has one text encoder: leave prompt_2 and negative_prompt_2 out.")
        return self.encode_prompts(prompts, clip_skip)

    def size_condition(self, height: int, width: int) -> AestheticCondition:
        return AestheticCondition(original_size=(height, width))

    def negative_of(self, size: Condition) -> Condition:
        return AestheticCondition(original_size=size.original_size, aesthetic_score=2.5)


def second_prompts(prompt_2: Prompt | None, prompts: list[str]) -> list[str]:
    """The texts for the second encoder: those for the first, unless others are given.

    Raises:
        InputError: there are not as many.
    """
    if not prompt_2:
        return prompts
    texts = as_prompts(prompt_2)
    if len(texts) != len(prompts):
        raise InputError(
            f"There are {len(texts)} prompts for the second text encoder, and {len(prompts)} for the first."
        )
    return texts


@contextmanager
def in_float32(module: nn.Module) -> Iterates[None]:
    """Lets a module compute in float32 for a while. Its weights are then the very same as before."""
    before = {parameter: parameter.data for parameter in module.parameters()}
    try:
        for parameter in before:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data
