"""The activations that `transformers` configurations name, each with upstream's own sequence of operations.

The several spellings of GELU agree to a few parts in a million and never to the last bit: a port that must equal its
upstream uses the very same one.

Follows: `transformers.activations.ACT2FN` 5.23.0.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

import refiners.fluxion.layers as fl


class NewGeLU(fl.Activation):
    """GELU through tanh, written out: Google's BERT and GPT-2 (`gelu_new`)."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class FastGeLU(fl.Activation):
    """GELU through tanh with the constant written as a decimal (`gelu_fast`)."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


class ErrorFunctionGeLU(fl.Activation):
    """Exact GELU, written out with erf (`gelu_python`)."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class TanhGeLU(fl.Activation):
    """GELU through tanh with the factors of `gelu_new` in another order (`gelu_python_tanh`)."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return x * 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class ClippedGeLU(fl.Activation):
    """Exact GELU held between two bounds (`gelu_10`)."""

    def __init__(self, minimum: float = -10, maximum: float = 10) -> None:
        self.minimum = minimum
        self.maximum = maximum
        super().__init__()

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.clip(nn.functional.gelu(x), self.minimum, self.maximum)


class SquaredReLU(fl.Activation):
    """ReLU, squared (`relu2`)."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.square(nn.functional.relu(x))


quick_gelu = partial(fl.GeLU, fl.GeLUApproximation.SIGMOID)
"""GELU through a sigmoid: OpenAI's CLIP."""

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "gelu": fl.GeLU,
    "gelu_10": ClippedGeLU,
    "gelu_fast": FastGeLU,
    "gelu_new": NewGeLU,
    "gelu_python": ErrorFunctionGeLU,
    "gelu_python_tanh": TanhGeLU,
    "gelu_pytorch_tanh": partial(fl.GeLU, fl.GeLUApproximation.TANH),
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "quick_gelu": quick_gelu,
    "relu": fl.ReLU,
    "relu2": SquaredReLU,
    "relu6": nn.ReLU6,
    "sigmoid": fl.Sigmoid,
    "silu": fl.SiLU,
    "swish": fl.SiLU,
    "tanh": nn.Tanh,
}
"""Upstream's name (`hidden_act`) → how to build it."""

NAMES_OF_SILU: Mapping[str, Callable[[], nn.Module]] = {name: ACTIVATIONS[name] for name in ("silu", "swish")}
"""What diffusers calls the one activation of the models that have no other."""
