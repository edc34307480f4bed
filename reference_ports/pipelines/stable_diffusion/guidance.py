"""Guidance: how what a denoiser predicts under several conditions becomes one prediction.

Classifier-free guidance goes from the prediction for the negative prompt to that for the prompt, and further. The
denoiser may be asked for both in one pass, or one after the other in half the memory.

Conditions are tensors by name. Each has one row for each latent; what a guidance arranges has several.

Follows: Ho and Salimans, "Classifier-Free Diffusion Guidance" (arXiv:2207.12598); Lin et al., "Common Diffusion Noise
Schedules and Sample Steps are Flawed" (arXiv:2305.08891), section 3.4, for the rescaling; Meng et al., "On Distillation
of Guided Diffusion Models" (arXiv:2210.03142), for the scale as a condition; Brooks et al., "InstructPix2Pix"
(arXiv:2211.09800), for two scales. Upstream: the denoising loops of the Stable Diffusion pipelines of diffusers 0.42.1.

Differs from upstream:
- Upstream has no sequential passes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from refiners.errors import InputError

Latents = Float[Tensor, "batch channels height width"]
Conditions = Mapping[str, Tensor]
Predict = Callable[[Tensor, Conditions], Tensor]
"""One pass of the denoiser: as many rows of conditions as latents."""


class Guidance(ABC):
    """Makes one prediction of several.

    Receives:
        predict: the denoiser.
        latents: Float[Tensor, "batch channels height width"]
        conditions: what `arrange` returned, or the conditions of the prompts alone: these take one plain pass.
        scale: how far to go from one prediction to the other.

    Returns:
        Float[Tensor, "batch channels height width"]

    Raises:
        InputError: the rows of the conditions are neither.
    """

    num_rows = 2
    """Rows of arranged conditions for each latent."""

    def __call__(self, predict: Predict, latents: Latents, conditions: Conditions, scale: float) -> Latents:
        rows = {name: len(tensor) for name, tensor in conditions.items()}
        if set(rows.values()) == {len(latents)}:
            return predict(latents, conditions)
        if set(rows.values()) != {self.num_rows * len(latents)}:
            raise InputError(
                f"Conditions for {len(latents)} latents need {len(latents)} rows, or {self.num_rows * len(latents)} to "
                f"be guided by {type(self).__name__}; these have {rows}."
            )
        return self.guide(predict, latents, conditions, scale)

    def is_used(self, scale: float) -> bool:
        """Whether a scale asks for more than the prediction for the prompt."""
        return scale > 1

    def arrange(self, negative: Tensor, positive: Tensor) -> Tensor:
        """A condition of the negative prompts, then that of the prompts."""
        return torch.cat([negative, positive])

    @abstractmethod
    def guide(self, predict: Predict, latents: Latents, conditions: Conditions, scale: float) -> Latents:
        """The guided prediction, under arranged conditions."""


class ClassifierFreeGuidance(Guidance):
    """Both predictions in one pass of twice the batch.

    Receives:
        rescale: 0 … 1, how far the deviation of the guided prediction is brought back to that of the prompt's.
    """

    def __init__(self, rescale: float = 0.0) -> None:
        self.rescale = rescale

    def guide(self, predict: Predict, latents: Latents, conditions: Conditions, scale: float) -> Latents:
        negative, positive = self.predict_both(predict, latents, conditions)
        guided = negative + scale * (positive - negative)
        return rescaled(guided, positive, self.rescale) if self.rescale > 0 else guided

    def predict_both(self, predict: Predict, latents: Latents, conditions: Conditions) -> tuple[Latents, Latents]:
        """The predictions for the negative prompts and for the prompts."""
        negative, positive = predict(torch.cat([latents] * 2), conditions).chunk(2)
        return negative, positive


class SequentialGuidance(ClassifierFreeGuidance):
    """Both predictions one after the other: slower, in half the memory."""

    def predict_both(self, predict: Predict, latents: Latents, conditions: Conditions) -> tuple[Latents, Latents]:
        halves = {name: tensor.chunk(2) for name, tensor in conditions.items()}
        negative, positive = (predict(latents, {name: half[i] for name, half in halves.items()}) for i in range(2))
        return negative, positive


class EmbeddedGuidance(Guidance):
    """The scale is a condition of a denoiser that was distilled to know it: latent consistency models.

    Receives:
        embedding_dim: width of the condition.
    """

    num_rows = 1

    def __init__(self, embedding_dim: int) -> None:
        self.embedding_dim = embedding_dim

    def __call__(self, predict: Predict, latents: Latents, conditions: Conditions, scale: float) -> Latents:
        # The scale is told beside the conditions, so these are never arranged.
        return self.guide(predict, latents, conditions, scale)

    def is_used(self, scale: float) -> bool:
        return False

    def guide(self, predict: Predict, latents: Latents, conditions: Conditions, scale: float) -> Latents:
        embedding = embed_scale(torch.tensor(scale - 1).repeat(len(latents)), self.embedding_dim)
        return predict(latents, {**conditions, "timestep_condition": embedding.to(latents)})


class EditGuidance(Guidance):
    """Two scales: away from no prompt with the picture, and away from no picture at all. For InstructPix2Pix.

    Receives:
        image_scale: how far to go from no picture to the picture; guidance is used from 1 on.
    """

    num_rows = 3

    def __init__(self, image_scale: float = 1.5) -> None:
        self.image_scale = image_scale

    def is_used(self, scale: float) -> bool:
        return scale > 1 and self.image_scale >= 1

    def arrange(self, negative: Tensor, positive: Tensor) -> Tensor:
        """A condition of the prompts, then twice that of the negative prompts."""
        return torch.cat([positive, negative, negative])

    def guide(self, predict: Predict, latents: Latents, conditions: Conditions, scale: float) -> Latents:
        text, image, nothing = predict(torch.cat([latents] * 3), conditions).chunk(3)
        return nothing + scale * (text - image) + self.image_scale * (image - nothing)


def rescaled(guided: Latents, positive: Latents, share: float) -> Latents:
    """The guided prediction, by a share brought to the standard deviation of the prompt's."""
    axes = list(range(1, guided.ndim))
    deviation, guided_deviation = (x.std(dim=axes, keepdim=True) for x in (positive, guided))
    return share * (guided * (deviation / guided_deviation)) + (1 - share) * guided


def embed_scale(scale: Float[Tensor, "batch"], embedding_dim: int) -> Float[Tensor, "batch embedding_dim"]:
    """Sines and cosines of a guidance scale less 1, in float32."""
    half = embedding_dim // 2
    step = torch.log(torch.tensor(10_000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -step)
    angles = (scale * 1000.0).to(torch.float32)[:, None] * frequencies[None, :]
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return torch.nn.functional.pad(embedding, (0, embedding_dim % 2))
