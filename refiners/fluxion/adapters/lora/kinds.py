"""The LoRAs of layers that know no place: of a Linear and of an Embedding. Those of convolutions are in `conv`."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from refiners.errors import AdapterTypeError
from refiners.fluxion.adapters.lora.base import Lora
from refiners.fluxion.adapters.lora.building import Strength, linear_without_initial_weights
from refiners.fluxion.adapters.lora.half import in_full_precision
from refiners.fluxion.layers.factory import Factory
from refiners.fluxion.layers.linear import Linear
from refiners.fluxion.layers.module import WeightedModule


class LinearLora(Lora[Linear]):
    """The LoRA of a Linear.

    Receives:
        x: `Float[Tensor, "*shape in_features"]`

    Returns:
        `Float[Tensor, "*shape out_features"]`

    Example:
        >>> lora = LinearLora("style", in_features=320, out_features=128, rank=4, alpha=8)
        >>> lora.scaling
        2.0
    """

    layer_type = nn.Linear
    weight_axes = 2

    def __init__(
        self,
        name: str,
        /,
        in_features: int,
        out_features: int,
        rank: int = 16,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float | None = None,
        rank_stabilized: bool = False,
        bias: bool = False,
    ) -> None:
        self.__dict__.update(in_features=in_features, out_features=out_features)
        strength = Strength(scale=scale, alpha=alpha, rank_stabilized=rank_stabilized)
        super().__init__(name, rank=rank, device=device, dtype=dtype, bias=bias, **strength)

    def lora_layers(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[nn.Module, ...]:
        factory = Factory(device=device, dtype=dtype)
        return (
            linear_without_initial_weights(self.in_features, self.rank, bias=False, **factory),
            linear_without_initial_weights(self.rank, self.out_features, bias=self.bias, **factory),
        )

    @classmethod
    def like_layer(cls, name: str, /, layer: nn.Linear, **settings: Any) -> "LinearLora":
        return cls(name, in_features=layer.in_features, out_features=layer.out_features, **settings)

    @classmethod
    def is_pair(cls, down: Tensor, up: Tensor) -> bool:
        return down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1]

    @classmethod
    def like_weights(cls, name: str, /, down: torch.Size, up: torch.Size, **settings: Any) -> "LinearLora":
        return cls(name, in_features=down[1], out_features=up[0], rank=down[0], **settings)

    def is_compatible(self, layer: nn.Module, /) -> bool:
        return (
            isinstance(layer, nn.Linear)
            and layer.in_features == self.in_features
            and layer.out_features == self.out_features
        )

    def delta_weight(self) -> Tensor:
        return in_full_precision(lambda down, up: (up @ down) * self.scaling, self.down.weight, self.up.weight)


class ColumnLookup(WeightedModule):
    """Reads the columns of a weight by index: an Embedding whose table lies on its side, as peft stores it.

    Receives:
        x: `Int[Tensor, "*shape"]`, each in 0 … num_embeddings - 1

    Returns:
        `Float[Tensor, "*shape embedding_dim"]`
    """

    def __init__(self, embedding: nn.Embedding, embedding_dim: int, **factory: Any) -> None:
        super().__init__()
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = embedding.padding_idx
        self.scale_grad_by_freq = embedding.scale_grad_by_freq
        self.sparse = embedding.sparse
        self.weight = nn.Parameter(torch.empty(embedding_dim, embedding.num_embeddings, **factory))

    def forward(self, x: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape embedding_dim"]:
        return functional.embedding(
            x,
            self.weight.T,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )


class EmbeddingLora(Lora[nn.Embedding]):
    """The LoRA of an Embedding. `down` has the shape [rank, num_embeddings].

    Differs from upstream: peft hands the `max_norm` of the layer on, which would overwrite columns of `down` in the
    forward. A layer with a `max_norm` is refused.

    Receives:
        x: `Int[Tensor, "*shape"]`

    Returns:
        `Float[Tensor, "*shape embedding_dim"]`

    Raises:
        AdapterTypeError: (a ValueError) The layer has a `max_norm`, or the LoRA a bias.
    """

    layer_type = nn.Embedding

    def __init__(
        self,
        name: str,
        /,
        embedding: nn.Embedding,
        rank: int = 16,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float | None = None,
        rank_stabilized: bool = False,
        bias: bool = False,
    ) -> None:
        if embedding.max_norm is not None:
            raise AdapterTypeError(f"{embedding} has a max_norm, which changes weights in the forward: it takes none.")
        if bias:
            raise AdapterTypeError(f"{type(self).__name__} {name!r} takes no bias: {embedding} has none either.")
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding.embedding_dim
        self.__dict__["_embedding"] = embedding
        strength = Strength(scale=scale, alpha=alpha, rank_stabilized=rank_stabilized)
        super().__init__(name, rank=rank, device=device, dtype=dtype, **strength)
        del self.__dict__["_embedding"]

    def lora_layers(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[nn.Module, ...]:
        factory = Factory(device=device, dtype=dtype)
        return (
            ColumnLookup(self.__dict__["_embedding"], self.rank, **factory),
            linear_without_initial_weights(self.rank, self.embedding_dim, bias=False, **factory),
        )

    @classmethod
    def like_layer(cls, name: str, /, layer: nn.Embedding, **settings: Any) -> "EmbeddingLora":
        return cls(name, layer, **settings)

    def is_compatible(self, layer: nn.Module, /) -> bool:
        return (
            isinstance(layer, nn.Embedding)
            and layer.num_embeddings == self.num_embeddings
            and layer.embedding_dim == self.embedding_dim
        )

    def delta_weight(self) -> Tensor:
        return in_full_precision(lambda down, up: (up @ down).T * self.scaling, self.down.weight, self.up.weight)
