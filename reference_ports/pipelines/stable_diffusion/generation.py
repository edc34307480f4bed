"""A generation: latents, the conditions under which they are denoised, and the steps that are left.

Iterating takes the steps:

    for latents in generation:
        ...  # the latents after one more step
    image = generation.images()[0]

Follows: the denoising loops of the Stable Diffusion pipelines of diffusers 0.42.1.

Differs from upstream:
- Gradients flow where torch records them: run a generation under `torch.no_grad()`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from reference_ports.blocks.pictures import pixels_to_images, pixels_to_unit
from reference_ports.blocks.randomness import Generators
from reference_ports.pipelines.stable_diffusion.guidance import Conditions, Latents
from reference_ports.pipelines.stable_diffusion.model import LatentDiffusionModel

if TYPE_CHECKING:
    from PIL.Image import Image
else:
    Image = object  # so that an annotation needs no Pillow

AfterStep = Callable[[Tensor, int], Tensor]
"""What is done to the latents after each step, whose index is given too."""


class Generation:
    """Pictures in the making.

    Receives:
        model: what denoises, with a solver that has taken none of the steps.
        latents: what to begin with, Float[Tensor, "batch channels height width"].
        conditions: as `LatentDiffusionModel.compute_conditions` returns them.
        steps: the steps to take, in order.
        condition_scale: how far the guidance goes.
        generator: for solvers that draw noise.
        after_step: what is done to the latents after each step.
        finish: what is done to each finished picture, such as putting it into a larger one; `pixels` are without it.
    """

    def __init__(
        self,
        model: LatentDiffusionModel,
        latents: Latents,
        conditions: Conditions,
        steps: Sequence[int],
        *,
        condition_scale: float,
        generator: Generators = None,
        after_step: AfterStep | None = None,
        finish: Callable[[Image], Image] | None = None,
    ) -> None:
        self.model = model
        self.latents = latents
        self.conditions = dict(conditions)
        self.steps = list(steps)
        self.condition_scale = condition_scale
        self.generator = generator
        self.after_step = after_step
        self.finish = finish

    def __len__(self) -> int:
        """The number of steps that are left."""
        return len(self.steps)

    def __iter__(self) -> Iterator[Latents]:
        while self.steps:
            yield self.take_step()

    def take_step(self) -> Latents:
        """The latents after one more step."""
        step = self.steps[0]
        options = {"condition_scale": self.condition_scale, "generator": self.generator}
        latents = self.model(self.latents, step, **self.conditions, **options)
        self.latents = latents if self.after_step is None else self.after_step(latents, step)
        del self.steps[0]
        return self.latents

    def run(self) -> Latents:
        """The latents after all steps."""
        for _ in self:
            pass
        return self.latents

    def pixels(self) -> Tensor:
        """The finished pictures: Float[Tensor, "batch 3 height width"], 0 … 1."""
        return pixels_to_unit(self.model.decode(self.run()))

    def images(self) -> list[Image]:
        """The finished pictures, for Pillow."""
        images = pixels_to_images(self.model.decode(self.run()))
        return images if self.finish is None else [self.finish(image) for image in images]
