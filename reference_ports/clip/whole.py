"""The whole of CLIP: how well each text fits each picture. See `reference_ports.clip.model`."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from reference_ports.clip.image import CLIPImageModelWithProjection
from reference_ports.clip.text import CLIPTextModelWithProjection


class Direction(fl.Module):
    """Scales each vector to length 1.

    Receives:
        Float[Tensor, "batch projection_dim"]

    Returns:
        Float[Tensor, "batch projection_dim"]
    """

    def forward(self, x: Float[Tensor, "batch projection_dim"]) -> Float[Tensor, "batch projection_dim"]:
        # Upstream spells the norm as powers, which rounds otherwise than torch's own.
        return x / torch.pow(torch.sum(torch.pow(x, 2), dim=-1, keepdim=True), 0.5)


class TextDirection(fl.Chain):
    """The direction of each text."""

    def __init__(self, model: CLIPTextModelWithProjection) -> None:
        super().__init__(model, fl.GetArg(1), Direction())


class ImageDirection(fl.Chain):
    """The direction of each picture."""

    def __init__(self, model: CLIPImageModelWithProjection) -> None:
        super().__init__(model, fl.GetArg(1), Direction())


class Directions(fl.Distribute):
    """Texts and pictures, each by their own half."""


class Similarity(fl.WeightedModule):
    """The scaled cosine of each text with each picture.

    Receives:
        texts: Float[Tensor, "num_texts projection_dim"], of length 1
        images: Float[Tensor, "num_images projection_dim"], of length 1

    Returns:
        Float[Tensor, "num_texts num_images"]
    """

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(math.log(1 / 0.07), device=device, dtype=dtype))

    def forward(
        self, texts: Float[Tensor, "num_texts projection_dim"], images: Float[Tensor, "num_images projection_dim"]
    ) -> Float[Tensor, "num_texts num_images"]:
        return torch.matmul(texts, images.t()) * self.weight.exp()


class CLIP(fl.Chain):
    """Both halves of CLIP, and the similarity of what they see.

    Receives:
        ids: Int[Tensor, "num_texts sequence_length"]
        pixels: Float[Tensor, "num_images channels height width"]

    Returns:
        Float[Tensor, "num_texts num_images"], the logits of each text over the pictures; transposed, of each picture
        over the texts
    """

    def __init__(self, text: CLIPTextModelWithProjection, image: CLIPImageModelWithProjection) -> None:
        super().__init__(
            Directions(TextDirection(text), ImageDirection(image)),
            Similarity(device=text.device, dtype=text.dtype),
        )

    @property
    def text(self) -> CLIPTextModelWithProjection:
        """The half that reads texts, which has the knobs for them."""
        return self.ensure_find(CLIPTextModelWithProjection)

    @property
    def image(self) -> CLIPImageModelWithProjection:
        """The half that reads pictures."""
        return self.ensure_find(CLIPImageModelWithProjection)
