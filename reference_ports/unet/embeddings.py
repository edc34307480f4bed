"""What a UNet is told beside its latents: the time, and for some models a class or the size of the picture.

All of it becomes one vector. `TimestepEncoder` computes it once a forward and leaves it in the context
`range_adapter`, where each residual block reads it.

Follows: `Timesteps`, `TimestepEmbedding` and `UNet2DConditionModel.get_class_embed`, `.get_aug_embed` of diffusers
0.42.1.

Differs from upstream:
- Cosines stand before sines and the frequencies are not shifted, as in every published model; upstream has switches.
"""

import math
from typing import Unpack

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import InputError


class Sinusoids(fl.Module):
    """Cosines, then sines of each number, at frequencies from 1 down to almost 1/10000; always in float32.

    Receives:
        numbers: Shaped[Tensor, "batch"], whole or not

    Returns:
        Float[Tensor, "batch embedding_dim"], the last column 0 if `embedding_dim` is odd
    """

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim

    def forward(self, numbers: Shaped[Tensor, "batch"]) -> Float[Tensor, "batch embedding_dim"]:
        half = self.embedding_dim // 2
        exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=numbers.device)
        angles = numbers[:, None].float() * torch.exp(exponents / half)[None, :]  # batch half
        embedding = torch.cat((torch.cos(angles), torch.sin(angles)), dim=-1)
        return nn.functional.pad(embedding, (0, 1)) if self.embedding_dim % 2 else embedding


class Timestep(fl.UseContext):
    """The timestep of each of the latents, by the context `diffusion`.

    Receives:
        latents: Float[Tensor, "batch channels height width"], read for their batch and device alone

    Returns:
        Shaped[Tensor, "batch"]

    Raises:
        ContextError: no timestep was set.
        InputError: there is neither one timestep nor one for each of the latents.
    """

    def __init__(self) -> None:
        super().__init__("diffusion", "timestep")

    def forward(self, latents: Float[Tensor, "batch *_"]) -> Shaped[Tensor, "batch"]:  # pyright: ignore[reportIncompatibleMethodOverride]  # one that reads its input as well
        timestep: Tensor = super().forward()
        batch = latents.shape[0]
        if timestep.shape[0] not in (1, batch):
            raise InputError(
                f"There are {timestep.shape[0]} timesteps and {batch} latents. Give set_timestep() one timestep, or "
                "one for each of the latents."
            )
        # One row for each of the latents, even if all are alike: a product of a single row rounds otherwise.
        return timestep.expand(batch)


class TimeCondition(fl.Linear, fl.ContextModule):
    """Adds what else the sampler says of this forward, such as the guidance scale of a consistency model, if it does.

    Receives:
        Float[Tensor, "batch embedding_dim"]

    Returns:
        Float[Tensor, "batch embedding_dim"]
    """

    def __init__(self, condition_dim: int, embedding_dim: int, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(condition_dim, embedding_dim, bias=False, **factory)

    def forward(self, input: Float[Tensor, "batch embedding_dim"]) -> Float[Tensor, "batch embedding_dim"]:
        condition: Tensor | None = self.use_context("diffusion").get("timestep_condition")
        return input if condition is None else input + super().forward(condition)


class TimeEmbedding(fl.Chain):
    """The vector of a timestep, and of a condition beside it where the model takes one.

    Receives:
        latents: Float[Tensor, "batch channels height width"], read for their batch alone

    Returns:
        Float[Tensor, "batch timestep_dim"]
    """

    def __init__(
        self, embedding_dim: int, timestep_dim: int, condition_dim: int | None = None, **factory: Unpack[fl.Factory]
    ) -> None:
        self.condition_dim = condition_dim
        super().__init__(
            Timestep(),
            Sinusoids(embedding_dim),
            fl.Converter(set_device=False),
            *(() if condition_dim is None else (TimeCondition(condition_dim, embedding_dim, **factory),)),
            *_two_layers(embedding_dim, timestep_dim, **factory),
        )


class ClassLabels(fl.UseContext):
    """The class of each picture, by the context `class_embedding`."""

    def __init__(self) -> None:
        super().__init__("class_embedding", "class_labels")


class ClassEmbedding(fl.Chain):
    """The vector of a class; what it is made of depends on what a class is in the model.

    Receives:
        latents: not read

    Returns:
        Float[Tensor, "batch timestep_dim"]
    """

    def __init__(self, *layers: fl.Module) -> None:
        super().__init__(ClassLabels(), *layers)


def numbered_class(num_classes: int, timestep_dim: int, **factory: Unpack[fl.Factory]) -> ClassEmbedding:
    """A class is a number of a table: the noise level of the upscaler."""
    return ClassEmbedding(fl.Embedding(num_classes, timestep_dim, **factory))


def vector_class(class_dim: int, timestep_dim: int, **factory: Unpack[fl.Factory]) -> ClassEmbedding:
    """A class is a vector, such as the embedding of a picture: unCLIP."""
    return ClassEmbedding(*_two_layers(class_dim, timestep_dim, **factory))


def timed_class(embedding_dim: int, timestep_dim: int, **factory: Unpack[fl.Factory]) -> ClassEmbedding:
    """A class is a number on a line, seen as a timestep is."""
    layers = _two_layers(embedding_dim, timestep_dim, **factory)
    return ClassEmbedding(Sinusoids(embedding_dim), fl.Converter(set_device=False), *layers)


def _two_layers(in_features: int, timestep_dim: int, **factory: Unpack[fl.Factory]) -> list[fl.Module]:
    return [
        fl.Linear(in_features, timestep_dim, **factory),
        fl.SiLU(),
        fl.Linear(timestep_dim, timestep_dim, **factory),
    ]


class PooledText(fl.UseContext):
    """One vector for the whole prompt: Float[Tensor, "batch pooled_text_dim"], by the context `text_time`."""

    def __init__(self) -> None:
        super().__init__("text_time", "pooled_text_embedding")


class SizeSinusoids(fl.UseContext):
    """Sinusoids of the numbers that say how the picture was cut and sized, one after the other.

    Receives:
        latents: not read

    Returns:
        Float[Tensor, "batch num_ids*embedding_dim"]
    """

    def __init__(self, embedding_dim: int) -> None:
        super().__init__("text_time", "time_ids")
        self.sinusoids = Sinusoids(embedding_dim)

    def forward(self, latents: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:  # pyright: ignore[reportIncompatibleMethodOverride]  # one that reads its input as well
        time_ids: Tensor = super().forward()
        return self.sinusoids(time_ids.flatten()).reshape(time_ids.shape[0], -1)


class PooledTextAndSize(fl.Concatenate):
    """The vector of the prompt, then those of the size."""


class TextTimeProjection(fl.Linear):
    """The first layer over the joined vectors.

    Raises:
        InputError: they have another length than the model takes.
    """

    def forward(self, input: Float[Tensor, "batch text_time_dim"]) -> Float[Tensor, "batch timestep_dim"]:
        if input.shape[-1] != self.in_features:
            raise InputError(
                f"The pooled text embedding and the time ids make {input.shape[-1]} numbers, and this UNet takes "
                f"{self.in_features}. A base model of Stable Diffusion XL takes 6 time ids and the refiner 5."
            )
        return super().forward(input)


class TextTimeEmbedding(fl.Chain):
    """The vector of the whole prompt and of the size of the picture: Stable Diffusion XL.

    Receives:
        latents: not read

    Returns:
        Float[Tensor, "batch timestep_dim"]
    """

    def __init__(self, size_dim: int, text_time_dim: int, timestep_dim: int, **factory: Unpack[fl.Factory]) -> None:
        self.size_dim = size_dim
        self.text_time_dim = text_time_dim
        super().__init__(
            PooledTextAndSize(PooledText(), SizeSinusoids(size_dim), dim=-1),
            fl.Converter(set_device=False),
            TextTimeProjection(text_time_dim, timestep_dim, **factory),
            fl.SiLU(),
            fl.Linear(timestep_dim, timestep_dim, **factory),
        )


class EmbeddingSum(fl.Sum):
    """Time, class and size, added up."""


class TimestepEncoder(fl.Passthrough):
    """Leaves the vector of the time, and of whatever else is given, in the context `range_adapter`.

    Receives:
        latents: Float[Tensor, "batch channels height width"], returned as they are
    """

    def __init__(self, *embeddings: fl.Chain) -> None:
        super().__init__(
            EmbeddingSum(*embeddings),
            fl.SetContext("range_adapter", "timestep_embedding"),
        )
