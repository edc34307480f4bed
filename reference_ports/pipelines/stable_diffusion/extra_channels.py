"""Models whose denoiser sees a picture beside the latents, as channels of its own.

For inpainting these are a mask and the latents of the picture without what it hides, 9 channels in all; for editing,
the latents of the picture to edit, 8 in all.

Follows: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752), section 4.5;
Brooks et al., "InstructPix2Pix" (arXiv:2211.09800).
"""

import torch

from reference_ports.pipelines.stable_diffusion.guidance import Conditions, Latents
from reference_ports.pipelines.stable_diffusion.model import LatentDiffusionModel, needed
from reference_ports.pipelines.stable_diffusion.sd import StableDiffusion_1, StableDiffusion_2
from reference_ports.pipelines.stable_diffusion.xl import StableDiffusion_XL


class ExtraChannelsModel(LatentDiffusionModel):
    """Has one more condition: `extra_channels`, Float[Tensor, "rows channels height width"], put behind the latents."""

    def call_unet(self, inputs: Latents, conditions: Conditions) -> Latents:
        extra_channels = needed(conditions, "extra_channels")
        return super().call_unet(torch.cat([inputs, extra_channels], dim=1), conditions)


class InpaintingModel(ExtraChannelsModel):
    """A model that was trained to fill in what a mask hides."""


class EditingModel(ExtraChannelsModel):
    """A model that was trained to change a picture as the prompt says."""


class StableDiffusion_1_Inpainting(InpaintingModel, StableDiffusion_1):
    """Stable Diffusion 1, trained to fill in what a mask hides."""


class StableDiffusion_2_Inpainting(InpaintingModel, StableDiffusion_2):
    """Stable Diffusion 2, trained to fill in what a mask hides."""


class StableDiffusion_XL_Inpainting(InpaintingModel, StableDiffusion_XL):
    """Stable Diffusion XL, trained to fill in what a mask hides."""


class StableDiffusion_1_Editing(EditingModel, StableDiffusion_1):
    """InstructPix2Pix: Stable Diffusion 1, trained to change a picture as the prompt says."""
