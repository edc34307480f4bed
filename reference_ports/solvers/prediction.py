"""What a denoiser predicts, and what follows from it: the clean sample x₀ and the noise ε.

A noisy sample is x = α x₀ + σ ε. A denoiser is trained to predict ε, x₀, or the velocity v = α ε - σ x₀
(arXiv:2202.00512); each gives the other two.

α, σ and the other numbers of a step are tensors without axes, and stand on the side of a product where upstream has
them: in bfloat16 and float16 torch rounds such a factor to the dtype of the product where it stands on the left, and
not where it stands on the right.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from reference_ports.blocks.randomness import Generators, draw_normal
from reference_ports.solvers.parameters import ClippingParameters, PredictionType
from refiners.errors import InputError

Sample = Float[Tensor, "batch channels *size"]
Number = Float[Tensor, ""]
"""A number of a step, in float32 on the CPU."""


def clean_sample(kind: PredictionType, x: Sample, prediction: Sample, alpha: Number, sigma: Number) -> Sample:
    """The clean sample that a prediction stands for."""
    if kind == "epsilon":
        return (x - sigma * prediction) / alpha
    if kind == "v_prediction":
        return alpha * x - sigma * prediction
    return prediction


def noise_of(kind: PredictionType, x: Sample, prediction: Sample, alpha: Number, sigma: Number) -> Sample:
    """The noise that a prediction stands for."""
    if kind == "sample":
        return (x - alpha * prediction) / sigma
    if kind == "v_prediction":
        return alpha * prediction + sigma * x
    return prediction


def clipped(parameters: ClippingParameters, sample: Sample) -> Sample:
    """The predicted sample within its bounds."""
    if parameters.thresholding:
        return thresholded(sample, parameters.dynamic_thresholding_ratio, parameters.sample_max_value)
    if parameters.clip_sample:
        return sample.clamp(-parameters.clip_sample_range, parameters.clip_sample_range)
    return sample


def thresholded(sample: Sample, ratio: float, maximum: float) -> Sample:
    """The sample cut at a quantile of its own absolute values, and divided by it where that is above 1."""
    wide = sample if sample.dtype in (torch.float32, torch.float64) else sample.float()
    flat = wide.flatten(1)  # batch values
    bound = torch.quantile(flat.abs(), ratio, dim=1).clamp(min=1, max=maximum).unsqueeze(1)  # batch 1
    return (torch.clamp(flat, -bound, bound) / bound).reshape(sample.shape).to(sample.dtype)


def draw(like: Sample, generator: Generators, dtype: torch.dtype | None = None) -> Sample:
    """Normal noise of the shape and the device of a tensor.

    Raises:
        InputError: there is no generator, or not one for each item of the batch.
    """
    if generator is None:
        raise InputError(
            "This step draws noise and has no generator: pass generator=torch.Generator().manual_seed(…). "
            "Solvers leave the global random state alone."
        )
    return draw_normal(like.shape, generator, like.device, like.dtype if dtype is None else dtype)
