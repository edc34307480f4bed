"""Linear layers: y = x·Wᵀ + b on the last axis."""

from itertools import pairwise
from typing import Any, Unpack

import torch
from torch.nn import functional

from refiners.errors import InputError
from refiners.fluxion.layers.activations import ReLU
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.factory import Factory
from refiners.fluxion.layers.module import Module, WeightedModule


class Linear(torch.nn.Linear, WeightedModule):
    """A linear map of the last axis. Weights and numerics are those of `torch.nn.Linear`.

    Receives:
        x: `Float[Tensor, "*shape in_features"]`

    Returns:
        `Float[Tensor, "*shape out_features"]`

    Example:
        >>> fl.Linear(32, 128)(torch.randn(2, 32)).shape
        torch.Size([2, 128])
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **factory: Unpack[Factory]) -> None:
        super().__init__(in_features, out_features, bias, **factory)  # pyright: ignore[reportUnknownMemberType] (untyped device)

    def reset_parameters(self) -> None:
        """Draw new weights, as torch does; on the meta device there is nothing to draw."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Any) -> Any:  # symbolic tracing gives no tensors
        own: dict[str, Any] = self._parameters  # see WeightedModule
        try:
            weight, bias = own["weight"], own["bias"]
        except KeyError:
            return super().forward(input)
        return functional.linear(input, weight, bias)


class MultiLinear(Chain):
    """A perceptron of `num_layers` linear layers with a ReLU between any two of them.

    With one layer it is a single `Linear(input_dim, output_dim)`.

    Receives:
        x: `Float[Tensor, "*shape input_dim"]`

    Returns:
        `Float[Tensor, "*shape output_dim"]`

    Raises:
        InputError: (an AssertionError) `num_layers` is below 1.

    Example:
        >>> [str(key) for key in fl.MultiLinear(4, 2, inner_dim=8, num_layers=2).state_dict()]
        ['Linear_1.weight', 'Linear_1.bias', 'Linear_2.weight', 'Linear_2.bias']
    """

    def __init__(
        self, input_dim: int, output_dim: int, inner_dim: int, num_layers: int, **factory: Unpack[Factory]
    ) -> None:
        if num_layers < 1:
            raise InputError(f"MultiLinear needs num_layers of at least 1, got {num_layers}.")
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.inner_dim = inner_dim
        self.num_layers = num_layers
        dims = [input_dim, *[inner_dim] * (num_layers - 1), output_dim]
        layers: list[Module] = []
        for in_features, out_features in pairwise(dims):
            layers += [Linear(in_features, out_features, **factory), ReLU()]
        super().__init__(*layers[:-1])
