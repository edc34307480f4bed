"""What a checkpoint looks like, told from its keys and shapes.

The families differ in what surrounds their UNets, whatever the sizes: SD 1 enters its transformers through a 1x1
convolution, SD 2 through a linear layer; SDXL is told the size of the picture beside the text, and its refiner lacks
the first of the two text encoders.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from refiners.conversion import Bundle

Shapes = Mapping[str, torch.Size]

_UNETS = ("model.diffusion_model.", "unet/")
_FIRST_TEXT_ENCODER = ("conditioner.embedders.0.transformer.", "text_encoder/")
_ANY_TEXT_ENCODER = ("cond_stage_model.", "conditioner.", "text_encoder")


@dataclass(frozen=True)
class Traits:
    """What tells one kind of Stable Diffusion from another.

    Attributes:
        family: `SD 1`, `SD 2`, `SDXL` or `SDXL refiner`.
        in_channels: what its UNet reads: latents (4), with a mask and a masked picture (9), with a picture (8).

    Example:
        >>> shapes = {"unet/conv_in.weight": (32, 9, 3, 3), "unet/mid_block.attentions.0.proj_in.weight": (32, 32)}
        >>> Traits.of({**shapes, "text_encoder/embeddings.token_embedding.weight": (100, 32)})
        Traits(family='SD 2', in_channels=9)
    """

    family: str
    in_channels: int

    @classmethod
    def of(cls, shapes: Shapes) -> "Traits | None":
        """The traits of a whole model, None when it is no Stable Diffusion, or not all of it."""
        first = _shape(shapes, "input_blocks.0.0.weight") or _shape(shapes, "conv_in.weight")
        entries = [shape for key, shape in shapes.items() if key.startswith(_UNETS) and key.endswith("proj_in.weight")]
        if first is None or not entries or not _has(shapes, _ANY_TEXT_ENCODER):
            return None
        told_sizes = _shape(shapes, "label_emb.0.0.weight") or _shape(shapes, "add_embedding.linear_1.weight")
        if told_sizes is None:
            family = "SD 1" if len(entries[0]) == 4 else "SD 2"
        else:
            family = "SDXL" if _has(shapes, _FIRST_TEXT_ENCODER) else "SDXL refiner"
        return cls(family, first[1])


def _shape(shapes: Shapes, key: str) -> torch.Size | None:
    found = [shapes[prefix + key] for prefix in _UNETS if prefix + key in shapes]
    return found[0] if found else None


def _has(shapes: Shapes, prefixes: str | tuple[str, ...]) -> bool:
    return any(key.startswith(prefixes) for key in shapes)


def _holds(parts: tuple[str, ...], shapes: Shapes) -> bool:
    return any(part in key for key in shapes for part in parts)


def _begins(prefixes: tuple[str, ...], shapes: Shapes) -> bool:
    return bool(shapes) and all(key.startswith(prefixes) for key in shapes)


def _upscales(shapes: Shapes) -> bool:
    traits = Traits.of(shapes)
    return traits is not None and traits.in_channels == 7


_SIGHTS: Mapping[str, Callable[[Shapes], bool]] = {
    "SD 3": partial(_holds, ("joint_blocks.0.", "transformer_blocks.0.norm1_context.")),
    "Flux": partial(_holds, ("double_blocks.0.", "single_transformer_blocks.0.")),
    "a ControlNet": partial(_holds, ("control_model.", "controlnet_cond_embedding.")),
    "a LoRA": partial(_holds, ("lora_unet_", "lora_te", ".lora_A.", ".lora_down.", ".lora.down.")),
    "the x4 upscaler of SD 2": _upscales,
    "an autoencoder alone": partial(_begins, ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "loss.")),
    "a UNet alone": partial(_begins, ("down_blocks.", "mid_block.", "up_blocks.", "conv_", "time_embedding.", "add_")),
    "a text encoder alone": partial(
        _begins, ("text_model.", "text_projection.", "embeddings.", "encoder.layers.", "final_layer_norm.")
    ),
}

KNOWN_BY_SIGHT = tuple(Bundle(name=title, title=title, recognises=sight) for title, sight in _SIGHTS.items())
"""What people try to convert, and no port reads as a whole model."""
