"""Embeddings: a table of learned vectors, read by index."""

from typing import Unpack

import torch

from refiners.fluxion.layers.factory import Factory
from refiners.fluxion.layers.module import WeightedModule


class Embedding(torch.nn.Embedding, WeightedModule):
    """A table of `num_embeddings` vectors. Weights and numerics are those of `torch.nn.Embedding`.

    Receives:
        x: `Int[Tensor, "*shape"]`, each in 0 … num_embeddings - 1

    Returns:
        `Float[Tensor, "*shape embedding_dim"]`

    Example:
        >>> fl.Embedding(10, 4)(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 4])
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, **factory: Unpack[Factory]) -> None:
        super().__init__(num_embeddings, embedding_dim, **factory)  # pyright: ignore[reportUnknownMemberType] (untyped device)
