"""Stable Diffusion 1, 2 and XL: models that make pictures of texts. See README.md beside this file."""

from reference_ports.pipelines.stable_diffusion.directory import from_directory
from reference_ports.pipelines.stable_diffusion.extra_channels import (
    EditingModel,
    ExtraChannelsModel,
    InpaintingModel,
    StableDiffusion_1_Editing,
    StableDiffusion_1_Inpainting,
    StableDiffusion_2_Inpainting,
    StableDiffusion_XL_Inpainting,
)
from reference_ports.pipelines.stable_diffusion.generation import Generation
from reference_ports.pipelines.stable_diffusion.guidance import (
    ClassifierFreeGuidance,
    EditGuidance,
    EmbeddedGuidance,
    Guidance,
    SequentialGuidance,
)
from reference_ports.pipelines.stable_diffusion.inpainting import inpaint
from reference_ports.pipelines.stable_diffusion.loras import ModelLoras, load_loras
from reference_ports.pipelines.stable_diffusion.model import LatentDiffusionModel
from reference_ports.pipelines.stable_diffusion.sd import StableDiffusion_1, StableDiffusion_2
from reference_ports.pipelines.stable_diffusion.size import AestheticCondition, SizeCondition
from reference_ports.pipelines.stable_diffusion.tasks import edit, image_to_image, text_to_image
from reference_ports.pipelines.stable_diffusion.text import PromptTooLongWarning
from reference_ports.pipelines.stable_diffusion.tokenizer_files import read_tokenizer
from reference_ports.pipelines.stable_diffusion.xl import StableDiffusion_XL, StableDiffusion_XL_Refiner, XLModel

__all__ = [
    "AestheticCondition",
    "ClassifierFreeGuidance",
    "EditGuidance",
    "EditingModel",
    "EmbeddedGuidance",
    "ExtraChannelsModel",
    "Generation",
    "Guidance",
    "InpaintingModel",
    "LatentDiffusionModel",
    "ModelLoras",
    "PromptTooLongWarning",
    "SequentialGuidance",
    "SizeCondition",
    "StableDiffusion_1",
    "StableDiffusion_1_Editing",
    "StableDiffusion_1_Inpainting",
    "StableDiffusion_2",
    "StableDiffusion_2_Inpainting",
    "StableDiffusion_XL",
    "StableDiffusion_XL_Inpainting",
    "StableDiffusion_XL_Refiner",
    "XLModel",
    "edit",
    "from_directory",
    "image_to_image",
    "inpaint",
    "load_loras",
    "read_tokenizer",
    "text_to_image",
]
