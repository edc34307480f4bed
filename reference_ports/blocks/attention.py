"""Self-attention whose mask comes through Context, and the feed-forward that follows it in a transformer.

The mask is prepared once a forward, outside of the tree, and read by each attention below. Its form decides which
kernel torch runs, and so the bits: a boolean "batch 1 query key" tensor where something is masked, and none at all
where nothing is, in which case a causal attention asks the kernel for its triangle.

Follows: the `sdpa` attention and `create_causal_mask`, `create_bidirectional_mask` of transformers 5.23.0.

Differs from upstream:
- There is no dropout.
- There is no other implementation than `torch.nn.functional.scaled_dot_product_attention`.
"""

from collections.abc import Callable
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import ConversionError, InputError


class Query(fl.Linear):
    """What each token looks for."""


class Key(fl.Linear):
    """What each token is found by."""


class Value(fl.Linear):
    """What each token gives to those that find it."""


class Projections(fl.Parallel):
    """Query, key and value of the same tokens."""

    def __init__(self, embedding_dim: int, use_bias: bool = True, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(
            Query(embedding_dim, embedding_dim, bias=use_bias, **factory),
            Key(embedding_dim, embedding_dim, bias=use_bias, **factory),
            Value(embedding_dim, embedding_dim, bias=use_bias, **factory),
        )


class MaskedAttention(fl.ContextModule):
    """Attends with several heads, under the mask of the context `attention`.

    Receives:
        query, key, value: Float[Tensor, "batch sequence_length embedding_dim"]

    Returns:
        Float[Tensor, "batch sequence_length embedding_dim"]

    Raises:
        ContextError: no Chain above declares the context `attention`.
    """

    def __init__(self, num_heads: int, is_causal: bool = False) -> None:
        self.num_heads = num_heads
        self.is_causal = is_causal
        super().__init__()

    def forward(
        self,
        query: Float[Tensor, "batch sequence_length embedding_dim"],
        key: Float[Tensor, "batch sequence_length embedding_dim"],
        value: Float[Tensor, "batch sequence_length embedding_dim"],
    ) -> Float[Tensor, "batch sequence_length embedding_dim"]:
        mask: Tensor | None = self.use_context("attention").get("mask")
        query, key, value = (self._split_heads(x) for x in (query, key, value))
        attended = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            # The length stands first: under torch.compile it may be a symbol, and the kernel wants a plain bool.
            is_causal=query.shape[2] > 1 and mask is None and self.is_causal,
            # A power and a reciprocal root differ in the last bit for some sizes: this is upstream's.
            scale=query.shape[-1] ** -0.5,
        )
        attended = attended.transpose(1, 2).contiguous()  # batch sequence_length num_heads head_dim
        return attended.flatten(2)  # batch sequence_length embedding_dim

    def _split_heads(self, x: Tensor) -> Tensor:
        head_dim = x.shape[-1] // self.num_heads
        return x.view(*x.shape[:-1], self.num_heads, head_dim).transpose(
            1, 2
        )  # batch num_heads sequence_length head_dim


class SelfAttention(fl.Chain):
    """Each token gathers from the others.

    Receives:
        Float[Tensor, "batch sequence_length embedding_dim"]

    Returns:
        Float[Tensor, "batch sequence_length embedding_dim"]

    Raises:
        ConversionError: (a ValueError) the heads do not divide the embedding.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        is_causal: bool = False,
        use_projection_bias: bool = True,
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.use_projection_bias = use_projection_bias
        if embedding_dim % num_heads:
            raise ConversionError(
                f"SelfAttention: embedding_dim={embedding_dim} cannot be cut into num_heads={num_heads} equal heads. "
                "Choose a multiple."
            )
        super().__init__(
            Projections(embedding_dim, use_bias=use_projection_bias, **factory),
            MaskedAttention(num_heads, is_causal=is_causal),
            fl.Linear(embedding_dim, embedding_dim, **factory),
        )


class FeedForward(fl.Chain):
    """Widens each token by itself, and narrows it again.

    Receives:
        Float[Tensor, "batch sequence_length embedding_dim"]

    Returns:
        Float[Tensor, "batch sequence_length embedding_dim"]
    """

    def __init__(
        self,
        embedding_dim: int,
        feedforward_dim: int,
        activation: Callable[[], nn.Module],
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.embedding_dim = embedding_dim
        self.feedforward_dim = feedforward_dim
        super().__init__(
            fl.Linear(embedding_dim, feedforward_dim, **factory),
            activation(),
            fl.Linear(feedforward_dim, embedding_dim, **factory),
        )


def prepare_attention_mask(mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """Puts a mask in the form that attention takes.

    Receives:
        mask: 1 (or True) for what may be attended to and 0 for padding, "batch sequence_length"; or a finished mask,
            boolean or to be added to the scores, "batch num_heads query key", returned as it is; or None.
        is_causal: whether a token attends to those before it only.

    Returns:
        "batch 1 sequence_length sequence_length", True for what is attended to; or None where nothing is masked.

    Raises:
        InputError: the mask has neither two nor four axes.
    """
    if mask is None or mask.ndim == 4:
        return mask
    if mask.ndim != 2:
        raise InputError(
            f"An attention mask has the axes (batch, sequence_length), or (batch, num_heads, query, key) when it is "
            f"finished; this one has the shape {tuple(mask.shape)}. Give one row of ones and zeros a sequence."
        )
    keys = mask.to(torch.bool)[:, None, None, :]
    if not mask.is_meta and not torch.compiler.is_compiling() and bool(keys.all()):
        return None
    length = mask.shape[1]
    positions = torch.arange(length, device=mask.device)
    seen = positions[None, :] <= positions[:, None] if is_causal else (positions >= 0)[:, None]
    return (seen & keys).expand(mask.shape[0], 1, length, length)
