"""Normalisations: bring activations to mean 0 and variance 1 over some axes, then scale and shift them by weights.

| layer | mean and variance over |
|---|---|
| `LayerNorm` | the last axes, those of `normalized_shape` |
| `LayerNorm2d` | the channels of each pixel |
| `GroupNorm` | each group of channels with all its pixels |
| `InstanceNorm2d` | each channel with all its pixels; it has no weights |
"""

from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.overrides import has_torch_function_variadic

from refiners.fluxion.layers.factory import Factory
from refiners.fluxion.layers.module import Module, WeightedModule


class LayerNorm(torch.nn.LayerNorm, WeightedModule):
    """Normalises over the last axes. Weights and numerics are those of `torch.nn.LayerNorm`.

    Receives:
        x: `Float[Tensor, "*shape *normalized_shape"]`

    Returns:
        `Float[Tensor, "*shape *normalized_shape"]`
    """

    def __init__(
        self, normalized_shape: int | list[int] | tuple[int, ...], eps: float = 1e-5, **factory: Unpack[Factory]
    ) -> None:
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps=eps, **factory)  # pyright: ignore[reportUnknownMemberType] (untyped device)

    def reset_parameters(self) -> None:
        """Fill with ones and zeros, as torch does; on the meta device there is nothing to fill."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Any) -> Any:  # symbolic tracing gives no tensors
        own: dict[str, Any] = self._parameters  # see WeightedModule
        try:
            weight, bias = own["weight"], own["bias"]
        except KeyError:
            return super().forward(input)
        if has_torch_function_variadic(input, weight, bias):
            return super().forward(input)
        return torch.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class GroupNorm(torch.nn.GroupNorm, WeightedModule):
    """Normalises over groups of channels. Weights and numerics are those of `torch.nn.GroupNorm`.

    `channels` comes first here and second in torch, where it is called `num_channels`.

    Receives:
        x: `Float[Tensor, "batch channels *shape"]`

    Returns:
        `Float[Tensor, "batch channels *shape"]`
    """

    def __init__(self, channels: int, num_groups: int, eps: float = 1e-5, **factory: Unpack[Factory]) -> None:
        super().__init__(num_groups, channels, eps=eps, **factory)  # pyright: ignore[reportUnknownMemberType] (untyped device)
        self.channels = channels

    def reset_parameters(self) -> None:
        """Fill with ones and zeros, as torch does; on the meta device there is nothing to fill."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Any) -> Any:  # symbolic tracing gives no tensors
        own: dict[str, Any] = self._parameters  # see WeightedModule
        try:
            weight, bias = own["weight"], own["bias"]
        except KeyError:
            return super().forward(input)
        # A single value has no variance, which torch explains.
        if has_torch_function_variadic(input, weight, bias) or input.numel() == self.num_groups:
            return super().forward(input)
        return torch.group_norm(input, self.num_groups, weight, bias, self.eps)


class LayerNorm2d(WeightedModule):
    """Normalises over the channels of each pixel.

    Computed as upstream's image models compute it: channels last, torch's layer norm, channels first again. The
    result is therefore a view whose channels lie next to each other in memory.

    Receives:
        x: `Float[Tensor, "batch channels height width"]`

    Returns:
        `Float[Tensor, "batch channels height width"]`
    """

    def __init__(self, channels: int, eps: float = 1e-6, **factory: Unpack[Factory]) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(channels, **factory))
        self.bias = torch.nn.Parameter(torch.zeros(channels, **factory))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        x = x.permute(0, 2, 3, 1)  # batch height width channels
        x = functional.layer_norm(x, (self.channels,), self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)  # batch channels height width


class InstanceNorm2d(torch.nn.InstanceNorm2d, Module):
    """Normalises each channel of each image. It has no weights and keeps no running statistics.

    Receives:
        x: `Float[Tensor, "batch num_features height width"]`

    Returns:
        `Float[Tensor, "batch num_features height width"]`
    """

    def __init__(self, num_features: int, eps: float = 1e-5, **factory: Unpack[Factory]) -> None:
        super().__init__(num_features, eps=eps, **factory)  # pyright: ignore[reportUnknownMemberType] (untyped device)
