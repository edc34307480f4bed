"""Nodes that make one vector of the states of a sequence."""

from collections.abc import Callable
from typing import Unpack

from jaxtyping import Float
from torch import Tensor, nn

import refiners.fluxion.layers as fl


class FirstToken(fl.Module):
    """The state of the first token of each sequence.

    Receives:
        Float[Tensor, "batch sequence_length embedding_dim"]

    Returns:
        Float[Tensor, "batch embedding_dim"]
    """

    def forward(
        self, states: Float[Tensor, "batch sequence_length embedding_dim"]
    ) -> Float[Tensor, "batch embedding_dim"]:
        return states[:, 0]


class Pooler(fl.Chain):
    """What a transformer was trained to tell of a whole sequence, from its first token.

    Receives:
        Float[Tensor, "batch sequence_length embedding_dim"]

    Returns:
        Float[Tensor, "batch output_dim"]; `output_dim` is `embedding_dim` unless given
    """

    def __init__(
        self,
        embedding_dim: int,
        output_dim: int | None = None,
        activation: Callable[[], nn.Module] = nn.Tanh,
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.embedding_dim = embedding_dim
        self.output_dim = output_dim
        super().__init__(
            FirstToken(),
            fl.Linear(embedding_dim, output_dim or embedding_dim, **factory),
            activation(),
        )
