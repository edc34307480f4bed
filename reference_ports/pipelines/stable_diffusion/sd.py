"""Stable Diffusion 1 and 2: one CLIP text encoder, whose last states the denoiser attends to.

Upstream: `diffusers.StableDiffusionPipeline` and its kin 0.42.1.

Differs from upstream:
- One negative prompt may stand for a whole batch of prompts.
"""

from typing import Any

from torch import Tensor

from reference_ports.autoencoder import Autoencoder
from reference_ports.clip import CLIPTextEncoder, CLIPTokenizer
from reference_ports.pipelines.stable_diffusion.guidance import Guidance
from reference_ports.pipelines.stable_diffusion.model import LatentDiffusionModel
from reference_ports.pipelines.stable_diffusion.text import Prompt, as_prompts, last_states, negative_prompts
from reference_ports.solvers import Solver
from reference_ports.unet import UNet


class StableDiffusion_1(LatentDiffusionModel):
    """Stable Diffusion 1: pictures of 512 pixels, the text encoder of CLIP ViT-L/14. See `LatentDiffusionModel`."""

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder,
        text_encoder: CLIPTextEncoder,
        tokenizer: CLIPTokenizer,
        solver: Solver[Any],
        *,
        guidance: Guidance | None = None,
        default_size: tuple[int, int] = (512, 512),
    ) -> None:
        super().__init__(unet, autoencoder, solver, guidance=guidance, default_size=default_size)
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer

    def compute_clip_text_embedding(
        self, prompt: Prompt, negative_prompt: Prompt | None = "", *, is_guided: bool = True, clip_skip: int = 0
    ) -> Tensor:
        """The embeddings of prompts, arranged with those of negative prompts for the guidance.

        Receives:
            prompt: a text, or one for each picture.
            negative_prompt: what to go away from: a text for all, or one for each picture.
            is_guided: False leaves the negative prompts out.
            clip_skip: how many of the last layers of the text encoder not to use, for the prompts.

        Returns:
            Float[Tensor, "rows 77 embedding_dim"]

        Raises:
            InputError: prompts are no texts, or there are not as many negative ones; too many layers are skipped.
        """
        prompts = as_prompts(prompt)
        positive = last_states(self.text_encoder, self.tokenizer, prompts, clip_skip)
        if not is_guided:
            return positive
        negatives = negative_prompts(negative_prompt, len(prompts))
        return self.guidance.arrange(last_states(self.text_encoder, self.tokenizer, negatives), positive)

    def compute_conditions(
        self, prompt: Prompt, negative_prompt: Prompt | None = None, *, is_guided: bool = True, **options: Any
    ) -> dict[str, Tensor]:
        embedding = self.compute_clip_text_embedding(prompt, negative_prompt, is_guided=is_guided, **options)
        return {"clip_text_embedding": embedding}


class StableDiffusion_2(StableDiffusion_1):
    """Stable Diffusion 2: pictures of 768 pixels, the text encoder of OpenCLIP ViT-H/14 without its last layer."""
