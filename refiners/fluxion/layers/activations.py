"""Activations: the functions between two linear layers that keep them from being one.

They have no weights, so a tree shows them by name only, and exchanging one is a tree edit:
`for gelu, parent in model.walk(fl.GeLU): parent.replace(gelu, fl.SiLU())`.
"""

from abc import ABC, abstractmethod
from enum import StrEnum

import torch
from jaxtyping import Num
from torch import Tensor
from torch.nn import functional

from refiners.errors import InputError
from refiners.fluxion.layers.module import Module


class Activation(Module, ABC):
    """The base of all activations: one tensor in, one tensor out.

    Receives:
        x: `Num[Tensor, "*shape"]`

    Returns:
        `Num[Tensor, "*shape"]`, except for `GLU`, which halves the last axis.
    """

    @abstractmethod
    def forward(self, x: Num[Tensor, "..."]) -> Num[Tensor, "..."]: ...


class SiLU(Activation):
    """The sigmoid linear unit, also called swish: x · sigmoid(x)."""

    def forward(self, x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
        return functional.silu(x)


class ReLU(Activation):
    """The rectifier: max(x, 0)."""

    def forward(self, x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
        return functional.relu(x)


class Sigmoid(Activation):
    """The logistic function: 1 / (1 + exp(-x))."""

    def forward(self, x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
        return x.sigmoid()


class GeLUApproximation(StrEnum):
    """How `GeLU` evaluates the Gaussian distribution function."""

    NONE = "none"
    """Exactly, with erf."""
    TANH = "tanh"
    """With tanh, as torch does for `approximate="tanh"`."""
    SIGMOID = "sigmoid"
    """With sigmoid(1.702 · x), the "quick GELU" of CLIP."""


class GeLU(Activation):
    """The Gaussian error linear unit: x · Φ(x) (arXiv 1606.08415)."""

    def __init__(self, approximation: GeLUApproximation = GeLUApproximation.NONE) -> None:
        super().__init__()
        self.approximation = GeLUApproximation(approximation)

    def forward(self, x: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
        match self.approximation:
            case GeLUApproximation.NONE:
                return functional.gelu(x)
            case GeLUApproximation.TANH:
                return functional.gelu(x, approximate="tanh")
            case GeLUApproximation.SIGMOID:
                return x * torch.sigmoid(1.702 * x)


class GLU(Activation):
    """The gated linear unit (arXiv 2002.05202): the second half of the last axis, activated, gates the first.

    Receives:
        x: `Num[Tensor, "*shape 2*dim"]`

    Returns:
        `Num[Tensor, "*shape dim"]`

    Raises:
        InputError: (an AssertionError) the last axis is odd.

    Example:
        >>> fl.GLU(fl.GeLU())(torch.randn(1, 8)).shape
        torch.Size([1, 4])
    """

    def __init__(self, activation: Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Num[Tensor, "*shape twice_dim"]) -> Num[Tensor, "*shape dim"]:
        if x.shape[-1] % 2:
            raise InputError(
                f"GLU splits the last axis in two halves, and got one of size {x.shape[-1]} "
                f"(input shape {tuple(x.shape)}). Give the layer before it an even number of outputs."
            )
        output, gate = x.chunk(2, dim=-1)
        return output * self.activation(gate)
