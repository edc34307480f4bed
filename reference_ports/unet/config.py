"""Configurations of `UNet2DConditionModel`, as diffusers publishes them, read in full or refused."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import refiners.fluxion.layers as fl
from reference_ports.blocks.activations import NAMES_OF_SILU
from reference_ports.unet.embeddings import (
    ClassEmbedding,
    TextTimeEmbedding,
    TimeEmbedding,
    TimestepEncoder,
    numbered_class,
    timed_class,
    vector_class,
)
from reference_ports.unet.model import UNet
from reference_ports.unet.stages import Stage
from reference_ports.unet.transformer import (
    CrossAttention2d,
    LinearCrossAttention2d,
    TextOnlyTransformerBlock,
    TextProjection,
    TransformerBlock,
)
from refiners.conversion import DIFFUSERS_NEUTRAL, ConfigReader
from refiners.errors import ConversionError

_ONLY: Mapping[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
}
_NEUTRAL: Mapping[str, str] = {
    **DIFFUSERS_NEUTRAL,
    "sample_size": "the size of the latents that pipelines make; the model takes any",
    "dropout": "dropout acts in training only, and the port has none",
    "upcast_attention": "upstream's AttnProcessor2_0 does not read it",
    "addition_embed_type_num_heads": "read for addition_embed_type 'text' only, which is refused",
    "mid_block_only_cross_attention": "read for another kind of middle, which is refused",
}
_MIDDLES = {"UNetMidBlock2DCrossAttn": 2, "UNetMidBlock2D": 1, None: 0}
"""Kind of middle → how many residual blocks it has."""

Nested = int | Sequence[int]


def _is_integer(value: Any) -> bool:
    return type(value) is int


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_depth(value: Any) -> bool:
    return _is_integer(value) or (_is_list(value) and all(_is_integer(entry) for entry in value))


class UNetConfig:
    """The numbers of a UNet, one entry for each stage from the largest image to the smallest.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        with ConfigReader(config, "UNet2DConditionModel", only=_ONLY, neutral=_NEUTRAL) as read:
            self.channels = read.integers("block_out_channels", (320, 640, 1280, 1280))
            self.in_channels = read.integer("in_channels", 4)
            self.out_channels = read.integer("out_channels", 4)
            self.num_groups = read.integer("norm_num_groups", 32)
            self.norm_eps = read.number("norm_eps", 1e-5)
            self.is_linear = read.flag("use_linear_projection", False)
            read.choice("act_fn", NAMES_OF_SILU, "silu")
            self._read_stages(read)
            self._read_embeddings(read)

    def _read_stages(self, read: ConfigReader) -> None:
        self.down = self._kinds(
            read, "down_block_types", "DownBlock2D", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
        )
        self.up = self._kinds(read, "up_block_types", "UpBlock2D", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
        kinds = ", ".join(map(repr, _MIDDLES))
        middle = read.value(
            "mid_block_type", lambda v: v is None or (type(v) is str and v in _MIDDLES), f"one of {kinds}",
            "UNetMidBlock2DCrossAttn",
        )  # fmt: skip
        self.middle: int = _MIDDLES[middle]
        self.num_layers = self._each(read, "layers_per_block", 2)
        self.num_heads = self._each(read, "attention_head_dim", 8)
        self.text_dims = self._each(read, "cross_attention_dim", 1280)
        self.is_text_only = self._each(read, "only_cross_attention", False, "true or false", _is_flag)
        nested = "a whole number or a list of them"
        self.depths: tuple[Nested, ...] = self._each(read, "transformer_layers_per_block", 1, nested, _is_depth)
        self.up_depths: tuple[Nested, ...] = tuple(reversed(self.depths))
        if read.has("reverse_transformer_layers_per_block"):
            self.up_depths = self._each(read, "reverse_transformer_layers_per_block", 1, nested, _is_depth)
        else:
            read.value("reverse_transformer_layers_per_block", lambda _: True, "", None)

    def _read_embeddings(self, read: ConfigReader) -> None:
        def optional(name: str) -> int | None:
            return read.value(name, lambda v: v is None or _is_integer(v), "a whole number or null", None)

        self.timestep_dim = optional("time_embedding_dim") or 4 * self.channels[0]
        self.condition_dim = optional("time_cond_proj_dim")
        self.num_classes = optional("num_class_embeds")
        self.projection_dim = optional("projection_class_embeddings_input_dim")
        self.size_dim = optional("addition_time_embed_dim")
        self.encoder_dim = optional("encoder_hid_dim")
        self.class_kind = self._kind(read, "class_embed_type", "timestep", "projection", "identity")
        self.addition_kind = self._kind(read, "addition_embed_type", "text_time")
        self.encoder_kind = self._kind(read, "encoder_hid_dim_type", "text_proj")

    @staticmethod
    def _kind(read: ConfigReader, name: str, *kinds: str) -> str | None:
        allowed = " or ".join(map(repr, (*kinds, None)))
        return read.value(name, lambda v: v is None or (type(v) is str and v in kinds), allowed, None)

    def _kinds(self, read: ConfigReader, name: str, plain: str, default: tuple[str, ...]) -> tuple[bool, ...]:
        """For each block, whether it has transformers."""
        count = len(self.channels)
        expected = f"a list of {count} (as block_out_channels), each {plain!r} or 'CrossAttn{plain}'"
        kinds = (plain, f"CrossAttn{plain}")
        value = read.value(
            name, lambda v: _is_list(v) and len(v) == count and all(kind in kinds for kind in v), expected, default,
            (plain,) * count,
        )  # fmt: skip
        return tuple(kind != plain for kind in value)

    def _each(
        self, read: ConfigReader, name: str, default: Any, what: str = "a whole number", fits: Any = _is_integer
    ) -> tuple[Any, ...]:
        """One value for each stage; a value that is no list stands for all."""
        count = len(self.channels)
        value = read.value(
            name,
            lambda v: (
                (_is_list(v) and len(v) == count and all(fits(entry) for entry in v)) or (fits(v) and not _is_list(v))
            ),
            f"{what}, or {count} of them (as block_out_channels)",
            default,
            default,
        )
        return tuple(value) if _is_list(value) else (value,) * count

    def _depths(self, depth: Nested, has_transformers: bool, num_layers: int, name: str) -> tuple[int | None, ...]:
        if not has_transformers:
            return (None,) * num_layers
        depths = (depth,) * num_layers if isinstance(depth, int) else tuple(depth)
        if len(depths) != num_layers:
            raise ConversionError(
                f"The configuration of UNet2DConditionModel cannot be honoured: {name} gives {len(depths)} depths "
                f"where there are {num_layers} layers. Give one for each."
            )
        return depths

    def _stage(self, i: int, depths: tuple[int | None, ...]) -> Stage:
        return Stage(
            channels=self.channels[i],
            depths=depths,
            num_heads=self.num_heads[i],
            text_dim=self.text_dims[i],
            attention=LinearCrossAttention2d if self.is_linear else CrossAttention2d,
            block=TextOnlyTransformerBlock if self.is_text_only[i] else TransformerBlock,
        )

    def down_stages(self) -> tuple[Stage, ...]:
        """From the largest image to the smallest."""
        name = "transformer_layers_per_block"
        return tuple(
            self._stage(i, self._depths(self.depths[i], self.down[i], self.num_layers[i], name))
            for i in range(len(self.channels))
        )

    def middle_stage(self) -> Stage | None:
        """The smallest image, or None if nothing is done to it between the way down and the way up."""
        if self.middle == 0:
            return None
        depth = self.depths[-1] if isinstance(self.depths[-1], int) else self.depths[-1][0]
        stage = self._stage(len(self.channels) - 1, (None,) if self.middle == 1 else (depth, None))
        return replace(stage, block=TransformerBlock)

    def up_stages(self) -> tuple[Stage, ...]:
        """From the smallest image to the largest."""
        last = len(self.channels) - 1
        name = "reverse_transformer_layers_per_block (or the other reversed)"
        return tuple(
            self._stage(last - i, self._depths(depth, self.up[i], self.num_layers[last - i] + 1, name))
            for i, depth in enumerate(self.up_depths)
        )

    def timestep_encoder(self, **factory: Unpack[fl.Factory]) -> TimestepEncoder:
        """Time, class, and size."""
        embeddings: list[fl.Chain] = [
            TimeEmbedding(self.channels[0], self.timestep_dim, self.condition_dim, **factory),
            *self._class_embedding(**factory),
        ]
        if self.addition_kind is not None:
            size_dim, dim = self._need("addition_time_embed_dim", self.size_dim), self._projection_dim()
            embeddings.append(TextTimeEmbedding(size_dim, dim, self.timestep_dim, **factory))
        return TimestepEncoder(*embeddings)

    def _class_embedding(self, **factory: Unpack[fl.Factory]) -> list[ClassEmbedding]:
        match self.class_kind:
            case "timestep":
                return [timed_class(self.channels[0], self.timestep_dim, **factory)]
            case "projection":
                return [vector_class(self._projection_dim(), self.timestep_dim, **factory)]
            case "identity":
                return [ClassEmbedding()]
            case _ if self.num_classes is not None:
                return [numbered_class(self.num_classes, self.timestep_dim, **factory)]
            case _:
                return []

    def _projection_dim(self) -> int:
        return self._need("projection_class_embeddings_input_dim", self.projection_dim)

    def _need(self, name: str, value: int | None) -> int:
        if value is None:
            raise ConversionError(
                f"The configuration of UNet2DConditionModel cannot be honoured: {name} is required beside "
                f"encoder_hid_dim_type={self.encoder_kind!r}, "
                f"class_embed_type={self.class_kind!r} and addition_embed_type={self.addition_kind!r}; it is missing."
            )
        return value

    def build(self, **factory: Unpack[fl.Factory]) -> UNet:
        """The tree."""
        unet = UNet(
            self.timestep_encoder(**factory),
            self.down_stages(),
            self.middle_stage(),
            self.up_stages(),
            timestep_dim=self.timestep_dim,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            num_groups=self.num_groups,
            norm_eps=self.norm_eps,
            **factory,
        )
        # Upstream takes the kind for granted when only the width is given.
        if self.encoder_dim is not None or self.encoder_kind is not None:
            encoder_dim = self._need("encoder_hid_dim", self.encoder_dim)
            unet.insert_after_type(TimestepEncoder, TextProjection(encoder_dim, self.text_dims[0], **factory))
            unet.text_dims = (encoder_dim,)
        return unet


def from_config(config: Mapping[str, Any], **factory: Unpack[fl.Factory]) -> UNet:
    """The tree of a configuration of `UNet2DConditionModel`, as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    return UNetConfig(config).build(**factory)
