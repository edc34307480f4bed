"""The transformer layer that normalises before each residual, and what every transformer names alike."""

from collections.abc import Callable
from typing import Unpack

from torch import nn

import refiners.fluxion.layers as fl
from reference_ports.blocks.attention import FeedForward, SelfAttention


class AttentionResidual(fl.Residual):
    """Adds what each token gathers from the others."""


class FeedForwardResidual(fl.Residual):
    """Adds what each token makes of itself."""


class TransformerLayer(fl.Chain):
    """One layer: attention, then feed-forward, each on normalised states.

    Receives:
        Float[Tensor, "batch sequence_length embedding_dim"]

    Returns:
        Float[Tensor, "batch sequence_length embedding_dim"]
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        feedforward_dim: int,
        activation: Callable[[], nn.Module],
        layer_norm_eps: float,
        is_causal: bool = False,
        use_projection_bias: bool = True,
        **factory: Unpack[fl.Factory],
    ) -> None:
        super().__init__(
            AttentionResidual(
                fl.LayerNorm(embedding_dim, eps=layer_norm_eps, **factory),
                SelfAttention(
                    embedding_dim, num_heads, is_causal=is_causal, use_projection_bias=use_projection_bias, **factory
                ),
            ),
            FeedForwardResidual(
                fl.LayerNorm(embedding_dim, eps=layer_norm_eps, **factory),
                FeedForward(embedding_dim, feedforward_dim, activation, **factory),
            ),
        )


class StatesAndPooled(fl.Parallel):
    """The last hidden state as it is, and the one vector made of it."""
