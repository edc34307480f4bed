"""Nodes that make one vector of the states of a sequence."""

from jaxtyping import Float
from torch import Tensor

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
