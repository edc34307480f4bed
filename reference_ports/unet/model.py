"""The UNet of Stable Diffusion: guesses the noise in a latent image, at a given time and for a given prompt.

Papers: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752); Podell et
al., "SDXL" (arXiv:2307.01952).

Follows: `UNet2DConditionModel` of diffusers 0.42.1.

Differs from upstream:
- Latents in, prediction out; everything else is set before, and travels through Context. What belongs to the prompt
  stays until it is set again, what belongs to one step holds for one forward.
- Residuals for the skips and for the middle can be set alone. Upstream takes the first without the second as those of a
  T2I-Adapter; here such an adapter is injected.
- As many residuals as skips are needed. Upstream drops what is too many.
"""

from collections.abc import Sequence
from functools import partial
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

import refiners.fluxion.layers as fl
from reference_ports.unet.embeddings import (
    TextTimeEmbedding,
    TimeEmbedding,
    TimestepEncoder,
)
from reference_ports.unet.stages import (
    BlockNumbers,
    MiddleBlock,
    Stage,
    StoreSkip,
    down_blocks,
    mirror,
    skip_channels,
    up_blocks,
)
from reference_ports.unet.transformer import TEXT, LinearCrossAttention2d
from refiners.errors import InputError
from refiners.fluxion.context import Contexts


class InputConvolution(fl.Conv2d):
    """Brings latents to the channels of the first stage.

    Raises:
        InputError: the latents are no images, or have other channels than the model.
    """

    def forward(self, input: Float[Tensor, "*_"]) -> Float[Tensor, "batch channels height width"]:
        if input.ndim != 4 or input.shape[1] != self.in_channels:
            raise InputError(
                f"The latents have the shape {tuple(input.shape)}, and this UNet takes (batch, {self.in_channels}, "
                "height, width). A model for inpainting takes 9 channels, one for editing 8: join what it is "
                "conditioned on to the latents."
            )
        return super().forward(input)


class InputBlock(fl.Chain):
    """The first convolution, whose result is the first skip."""

    def __init__(self, in_channels: int, out_channels: int, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(
            InputConvolution(in_channels, out_channels, kernel_size=3, padding=1, **factory),
            StoreSkip(),
        )


class DownBlocks(fl.Chain):
    """From the largest size to the smallest."""


class UpBlocks(fl.Chain):
    """From the smallest size to the largest."""


class AddToSkips(fl.ContextModule):
    """Adds the residuals of the context `unet`, if any were set, to the skips: one to each, the first first.

    Raises:
        InputError: there are not as many residuals as skips.
    """

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        context = self.use_context("unet")
        residuals: Sequence[Tensor] | None = context.get("additional_residuals")
        if residuals is not None:
            skips: list[Tensor] = context["residuals"]
            if len(residuals) != len(skips):
                raise InputError(
                    f"There are {len(residuals)} additional residuals and {len(skips)} skips. Give "
                    "set_additional_residuals() one for each."
                )
            skips[:] = [skip + residual for skip, residual in zip(skips, residuals, strict=True)]
        return x


class AddToMiddle(fl.ContextModule):
    """Adds the residual of the context `unet`, if one was set, to what leaves the middle."""

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        residual: Tensor | None = self.use_context("unet").get("additional_middle_residual")
        return x if residual is None else x + residual


class OutputBlock(fl.Chain):
    """The last norm and convolution."""

    def __init__(
        self, in_channels: int, out_channels: int, num_groups: int, norm_eps: float, **factory: Unpack[fl.Factory]
    ) -> None:
        super().__init__(
            fl.GroupNorm(in_channels, num_groups, eps=norm_eps, **factory),
            fl.SiLU(),
            fl.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, **factory),
        )


class UNet(fl.Chain):
    """A UNet of any shape.

    Receives:
        latents: Float[Tensor, "batch in_channels height width"]

    Returns:
        Float[Tensor, "batch out_channels height width"]: the noise, or whatever the model was trained to predict

    Contexts:
        diffusion.timestep, and diffusion.timestep_condition of consistency models
        cross_attention_block.clip_text_embedding, and .text_mask
        text_time.pooled_text_embedding and .time_ids of XL models
        class_embedding.class_labels of models with classes
        range_adapter.timestep_embedding: what `TimestepEncoder` makes of it
        unet.residuals: the skips; unet.additional_residuals, .additional_middle_residual: what is added
        sampling.shapes: the sizes of the images that transformers work on

    Example:
        >>> stage = Stage(channels=8, depths=(1,), num_heads=2, text_dim=6)
        >>> encoder = TimestepEncoder(TimeEmbedding(8, 32))
        >>> unet = UNet(encoder, (stage,), None, mirror((stage,)), timestep_dim=32, num_groups=4)
        >>> unet.set_timestep(981)
        >>> unet.set_clip_text_embedding(torch.randn(1, 5, 6))
        >>> unet(torch.randn(1, 4, 16, 16)).shape
        torch.Size([1, 4, 16, 16])
    """

    def __init__(
        self,
        timestep_encoder: TimestepEncoder,
        down: Sequence[Stage],
        middle: Stage | None,
        up: Sequence[Stage],
        *,
        timestep_dim: int,
        in_channels: int = 4,
        out_channels: int = 4,
        num_groups: int = 32,
        norm_eps: float = 1e-5,
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.in_channels = in_channels
        self.out_channels = out_channels
        stages = [
            stage for stage in (*down, middle, *up) if stage is not None and any(d is not None for d in stage.depths)
        ]
        self.text_dims = tuple(sorted({stage.text_dim for stage in stages}))
        numbers = BlockNumbers(timestep_dim=timestep_dim, num_groups=num_groups, norm_eps=norm_eps, **factory)
        skips = skip_channels(down)
        super().__init__(
            timestep_encoder,
            InputBlock(in_channels, down[0].channels, **factory),
            DownBlocks(*down_blocks(down, **numbers)),
            AddToSkips(),
            *([] if middle is None else [MiddleBlock(middle, **numbers)]),
            AddToMiddle(),
            UpBlocks(*up_blocks(up, skips, down[-1].channels, **numbers)),
            OutputBlock(up[-1].channels, out_channels, num_groups, norm_eps, **factory),
        )

    def init_context(self) -> Contexts:
        return {
            "diffusion": {"timestep": None},
            "range_adapter": {"timestep_embedding": None},
            "unet": {"residuals": [], "additional_residuals": None, "additional_middle_residual": None},
            "sampling": {"shapes": []},
            TEXT: {},
            "text_time": {},
            "class_embedding": {},
        }

    def set_timestep(self, timestep: float | Tensor) -> None:
        """Says how noisy the latents of the next forward are.

        Receives:
            timestep: 0 … 999 for the published models; one for all, or "batch". Fractions are allowed.

        Raises:
            InputError: a tensor of more than one axis.
        """
        if not isinstance(timestep, Tensor):
            # Whole numbers as fractions, so that a compiled model does not see them apart.
            timestep = torch.tensor(timestep, dtype=torch.float32)
        if timestep.ndim > 1:
            raise InputError(
                f"The timestep has the shape {tuple(timestep.shape)}. Give a number, or a tensor of () or (batch,)."
            )
        # Gradients of a double would be rounded on their way through a float.
        dtype = timestep.dtype if timestep.requires_grad else torch.float32
        self.set_context("diffusion", {"timestep": timestep.reshape(-1).to(self.device, dtype, copy=True)})

    def set_timestep_condition(self, condition: Tensor | None) -> None:
        """Sets the embedding of the guidance scale of a consistency model: Float[Tensor, "batch condition_dim"]."""
        self.set_context("diffusion", {"timestep_condition": condition})

    def set_clip_text_embedding(self, clip_text_embedding: Tensor) -> None:
        """Sets the prompts: Float[Tensor, "batch sequence_length text_dim"], one for each of the latents.

        Raises:
            InputError: the embedding has other axes, or another width than the model takes.
        """
        if clip_text_embedding.ndim != 3 or (self.text_dims and clip_text_embedding.shape[-1] not in self.text_dims):
            raise InputError(
                f"The text embedding has the shape {tuple(clip_text_embedding.shape)}, and this UNet takes (batch, "
                f"sequence_length, {' or '.join(map(str, self.text_dims))}). Compute it with the text encoder of the "
                "same model."
            )
        self.set_context(TEXT, {"clip_text_embedding": clip_text_embedding})

    def set_text_mask(self, mask: Tensor | None) -> None:
        """Hides words of the prompts: 1 for what may be attended to and 0 for the rest, "batch sequence_length".

        Hidden scores are lowered by 10000, as upstream does, so a text whose words are all hidden is seen as if none
        were.

        Raises:
            InputError: the mask does not have two axes.
        """
        if mask is not None:
            if mask.ndim != 2:
                raise InputError(f"The text mask has the shape {tuple(mask.shape)}. Give (batch, sequence_length).")
            mask = (1 - mask.to(device=self.device, dtype=self.dtype)) * -10_000.0
            mask = mask[:, None, None, :]  # batch heads query sequence_length
        self.set_context(TEXT, {"text_mask": mask})

    def set_pooled_text_embedding(self, pooled_text_embedding: Tensor) -> None:
        """Sets the vector of each whole prompt, of XL models: Float[Tensor, "batch pooled_text_dim"]."""
        self.set_context("text_time", {"pooled_text_embedding": pooled_text_embedding})

    def set_time_ids(self, time_ids: Tensor) -> None:
        """Sets how the picture was sized and cut, of XL models: Shaped[Tensor, "batch num_ids"].

        They are height and width of the original, top and left of the cut, height and width of the target. The refiner
        takes the score of beauty in the place of the last two.
        """
        self.set_context("text_time", {"time_ids": time_ids})

    def set_class_labels(self, class_labels: Tensor) -> None:
        """Sets the class of each picture, of models with classes: numbers "batch", or vectors "batch class_dim"."""
        self.set_context("class_embedding", {"class_labels": class_labels})

    def set_additional_residuals(self, skips: Sequence[Tensor] | None, middle: Tensor | None = None) -> None:
        """Adds to the skips and to the middle of the next forward, as a ControlNet does.

        Receives:
            skips: one for each skip, that of the first convolution first
            middle: Float[Tensor, "batch channels height width"]
        """
        residuals = None if skips is None else tuple(skips)
        self.set_context("unet", {"additional_residuals": residuals, "additional_middle_residual": middle})


class SD1UNet(UNet):
    """The UNet of Stable Diffusion 1.

    `in_channels` is 9 for inpainting and 8 for editing by instruction; `condition_dim` is 256 for a latent consistency
    model.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        condition_dim: int | None = None,
        **factory: Unpack[fl.Factory],
    ) -> None:
        down = (
            *(Stage(channels=channels, depths=(1, 1)) for channels in (320, 640, 1280)),
            Stage(channels=1280, depths=(None, None)),
        )
        super().__init__(
            TimestepEncoder(TimeEmbedding(320, 1280, condition_dim, **factory)),
            down,
            Stage(channels=1280, depths=(1, None)),
            mirror(down),
            timestep_dim=1280,
            in_channels=in_channels,
            out_channels=out_channels,
            **factory,
        )


class SD2UNet(UNet):
    """The UNet of Stable Diffusion 2: heads of 64, and the text of OpenCLIP ViT-H.

    `in_channels` is 9 for inpainting and 5 for a model that is given the depth.
    """

    def __init__(self, in_channels: int = 4, out_channels: int = 4, **factory: Unpack[fl.Factory]) -> None:
        linear = partial(Stage, text_dim=1024, attention=LinearCrossAttention2d)
        down = (
            *(linear(channels=channels, num_heads=channels // 64, depths=(1, 1)) for channels in (320, 640, 1280)),
            linear(channels=1280, depths=(None, None)),
        )
        super().__init__(
            TimestepEncoder(TimeEmbedding(320, 1280, **factory)),
            down,
            linear(channels=1280, num_heads=20, depths=(1, None)),
            mirror(down),
            timestep_dim=1280,
            in_channels=in_channels,
            out_channels=out_channels,
            **factory,
        )


class SDXLUNet(UNet):
    """The UNet of Stable Diffusion XL: three sizes, of which the smallest has ten transformer blocks in a row.

    `in_channels` is 9 for inpainting and 8 for editing by instruction; `condition_dim` is 256 for a latent consistency
    model.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        condition_dim: int | None = None,
        **factory: Unpack[fl.Factory],
    ) -> None:
        linear = partial(Stage, text_dim=2048, attention=LinearCrossAttention2d)
        down = (
            linear(channels=320, depths=(None, None)),
            linear(channels=640, num_heads=10, depths=(2, 2)),
            linear(channels=1280, num_heads=20, depths=(10, 10)),
        )
        super().__init__(
            TimestepEncoder(
                TimeEmbedding(320, 1280, condition_dim, **factory),
                TextTimeEmbedding(256, 1280 + 6 * 256, 1280, **factory),
            ),
            down,
            linear(channels=1280, num_heads=20, depths=(10, None)),
            mirror(down),
            timestep_dim=1280,
            in_channels=in_channels,
            out_channels=out_channels,
            **factory,
        )


class SDXLRefinerUNet(UNet):
    """The UNet of Stable Diffusion XL's refiner, which reads the text of one encoder and a score of beauty."""

    def __init__(self, in_channels: int = 4, out_channels: int = 4, **factory: Unpack[fl.Factory]) -> None:
        linear = partial(Stage, text_dim=1280, attention=LinearCrossAttention2d)
        down = (
            linear(channels=384, depths=(None, None)),
            linear(channels=768, num_heads=12, depths=(4, 4)),
            linear(channels=1536, num_heads=24, depths=(4, 4)),
            linear(channels=1536, depths=(None, None)),
        )
        super().__init__(
            TimestepEncoder(
                TimeEmbedding(384, 1536, **factory),
                TextTimeEmbedding(256, 1280 + 5 * 256, 1536, **factory),
            ),
            down,
            linear(channels=1536, num_heads=24, depths=(4, None)),
            mirror(down),
            timestep_dim=1536,
            in_channels=in_channels,
            out_channels=out_channels,
            **factory,
        )
