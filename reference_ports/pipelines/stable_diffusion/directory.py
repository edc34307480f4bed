"""A Stable Diffusion model put together from a directory, as diffusers publishes it or as `refiners convert` writes it.

What the model is (base, refiner, for inpainting, distilled) is told from its weights and configurations.

Follows: `from_pretrained` of the Stable Diffusion pipelines of diffusers 0.42.1, which correct outdated configurations
of solvers: an offset of the timesteps other than 1, and clipping of samples.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reference_ports import solvers
from reference_ports.clip import CLIPTokenizer
from reference_ports.pipelines.stable_diffusion.checkpoints import BUNDLES
from reference_ports.pipelines.stable_diffusion.extra_channels import (
    StableDiffusion_1_Editing,
    StableDiffusion_1_Inpainting,
    StableDiffusion_2_Inpainting,
    StableDiffusion_XL_Inpainting,
)
from reference_ports.pipelines.stable_diffusion.guidance import (
    ClassifierFreeGuidance,
    EditGuidance,
    EmbeddedGuidance,
    Guidance,
)
from reference_ports.pipelines.stable_diffusion.model import LatentDiffusionModel
from reference_ports.pipelines.stable_diffusion.sd import StableDiffusion_1, StableDiffusion_2
from reference_ports.pipelines.stable_diffusion.tokenizer_files import read_tokenizer
from reference_ports.pipelines.stable_diffusion.xl import StableDiffusion_XL, StableDiffusion_XL_Refiner
from refiners.conversion import OpenedModel, open_directory
from refiners.errors import FileFormatError

FIRST_STEPS = 50
"""Of a model just opened; tasks choose their own number."""

CLASSES: Mapping[str, type[LatentDiffusionModel]] = {
    "sd15": StableDiffusion_1,
    "sd15-inpainting": StableDiffusion_1_Inpainting,
    "instruct-pix2pix": StableDiffusion_1_Editing,
    "sd21": StableDiffusion_2,
    "sd21-base": StableDiffusion_2,
    "sd2-inpainting": StableDiffusion_2_Inpainting,
    "sdxl": StableDiffusion_XL,
    "sdxl-inpainting": StableDiffusion_XL_Inpainting,
    "sdxl-refiner": StableDiffusion_XL_Refiner,
}
"""The name of a bundle → its model."""


def from_directory(
    path: Path | str,
    *,
    solver: str | None = None,
    variant: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LatentDiffusionModel:
    """The model of a directory, with its weights, ready to be used.

    Receives:
        path: the directory: one folder for each part, or what `refiners convert` has written.
        solver: a name of `solvers.SOLVERS`, which reads the noise from the configuration; the configuration's own
            solver unless given.
        variant: which of several sets of weights to take, such as `fp16`.
        device, dtype: of the weights; by default those of the files, on the CPU.

    Raises:
        ConversionError: it is another model, or something in it cannot be honoured.
        FileFormatError: files are missing, or are not what they should be.
        InputError: there is no such solver.
    """
    opened = open_directory(path, BUNDLES, variant=variant)
    parts = {name: opened.load(name, device, dtype).eval() for name in opened.parts}
    tokenizers = {name: _tokenizer(opened, name) for name in opened.bundle.tokenizers}
    model = CLASSES[opened.kind](
        **parts, **tokenizers, solver=_solver(opened, solver), guidance=_guidance(opened), **_options(opened)
    )
    return model.eval()


def _tokenizer(opened: OpenedModel, name: str) -> CLIPTokenizer:
    if name not in opened.tokenizers:
        raise FileFormatError(
            f"{opened.path} lacks the folder {name}, the vocabulary of its text encoder. Download it too; a single "
            "file has none: convert it with the tokenizer of the published model."
        )
    return read_tokenizer(opened.tokenizers[name])


def _solver(opened: OpenedModel, name: str | None) -> solvers.Solver[Any]:
    file = opened.path / "scheduler" / "scheduler_config.json"
    if opened.layout == "folder" and name is None and not file.is_file():
        raise FileFormatError(f"{opened.path} lacks scheduler/{file.name}. Download it too, or name a solver.")
    solver = solvers.from_config(opened.scheduler, FIRST_STEPS, solver=name)
    # Upstream's pipelines pass an η of 0 to every scheduler that takes one, also to TCD, whose own is 0.3.
    corrected: dict[str, Any] = {"eta": 0.0}
    if not _is_xl(opened):
        corrected |= {"steps_offset": 1, "clip_sample": False}
    changes = {field: value for field, value in corrected.items() if hasattr(solver.params, field)}
    return solver.rebuild(FIRST_STEPS, **changes)


def _guidance(opened: OpenedModel) -> Guidance:
    embedding_dim = opened.parts["unet"].config.get("time_cond_proj_dim")
    if embedding_dim is not None:
        return EmbeddedGuidance(embedding_dim)
    return EditGuidance() if CLASSES[opened.kind] is StableDiffusion_1_Editing else ClassifierFreeGuidance()


def _options(opened: OpenedModel) -> dict[str, Any]:
    """What the configurations say beside the weights."""
    autoencoder = opened.parts["autoencoder"].config
    scale = 2 ** (len(autoencoder.get("block_out_channels", (1, 1, 1, 1))) - 1)
    size = opened.parts["unet"].config.get("sample_size", 128 if _is_xl(opened) else 64)
    height, width = (size, size) if isinstance(size, int) else size
    options: dict[str, Any] = {"default_size": (height * scale, width * scale)}
    if _is_xl(opened):
        options["zero_negative_prompt"] = bool(opened.pipeline.get("force_zeros_for_empty_prompt", True))
        options["needs_float32"] = bool(autoencoder.get("force_upcast", True))
    return options


def _is_xl(opened: OpenedModel) -> bool:
    return "text_encoder_2" in opened.parts
