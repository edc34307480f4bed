"""BERT: a transformer that reads a text in both directions at once.

Three embeddings of each token (its word, its segment, its place) are added and normalised; layers of self-attention
and feed-forward follow, each normalised after its residual. From the last states, BERT pools the first token; a
sentence encoder averages all of them and scales the result to length 1.

Follows: Devlin et al., "BERT" (arXiv:1810.04805); Reimers & Gurevych, "Sentence-BERT" (arXiv:1908.10084); Wang et
al., "MiniLM" (arXiv:2002.10957). Upstream: `transformers.BertModel` 5.23.0 with `attn_implementation="sdpa"`; mean
pooling and normalisation as in the modules `Pooling` and `Normalize` of sentence-transformers.

Differs from upstream:
- The encoder only: no decoder, no cross-attention, no cache, no language-modelling head, no dropout.
- A model returns tensors, not a record; hidden state i is `model[: i + 1](ids)`, and all of them are
  `model.with_hidden_states()(ids)`.
- Masks, segments and positions are set before the forward and hold for that one.
- A sequence longer than the table of positions is an `InputError`.
"""

from collections.abc import Callable
from typing import TypedDict, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from reference_ports.blocks.attention import FeedForward, SelfAttention
from reference_ports.blocks.pooling import Pooler
from reference_ports.blocks.text import PositionalEncoder, TextChain
from reference_ports.blocks.transformer import AttentionResidual, FeedForwardResidual, StatesAndPooled
from refiners.errors import InputError


class WordEncoder(fl.Embedding):
    """A learned vector for each word piece. That of the padding token, if there is one, is never trained.

    Receives:
        ids: Int[Tensor, "batch sequence_length"], 0 … vocabulary_size - 1

    Returns:
        Float[Tensor, "batch sequence_length embedding_dim"]
    """

    def __init__(
        self,
        vocabulary_size: int,
        embedding_dim: int,
        padding_id: int | None = 0,
        **factory: Unpack[fl.Factory],
    ) -> None:
        super().__init__(vocabulary_size, embedding_dim, **factory)
        self.vocabulary_size = vocabulary_size
        self.padding_idx = padding_id


class TokenTypeIds(fl.ContextModule):
    """The segment of each token: what the context `text` says, else the first one.

    Receives:
        ids: Int[Tensor, "batch sequence_length"]

    Returns:
        Int[Tensor, "batch sequence_length"]
    """

    def forward(self, ids: Int[Tensor, "batch sequence_length"]) -> Int[Tensor, "_ sequence_length"]:
        given: Tensor | None = self.use_context("text").get("token_type_ids")
        return torch.zeros_like(ids) if given is None else given


class TokenTypeEncoder(fl.Chain):
    """A learned vector for each segment.

    Receives:
        ids: Int[Tensor, "batch sequence_length"]

    Returns:
        Float[Tensor, "batch sequence_length embedding_dim"]
    """

    def __init__(self, num_token_types: int, embedding_dim: int, **factory: Unpack[fl.Factory]) -> None:
        self.num_token_types = num_token_types
        self.embedding_dim = embedding_dim
        super().__init__(
            TokenTypeIds(),
            fl.Embedding(num_token_types, embedding_dim, **factory),
        )


class TokenEmbeddings(fl.Sum):
    """Word, segment and place of each token, added in this order."""


class Embeddings(fl.Chain):
    """Turns ids into the first hidden state."""

    def __init__(
        self,
        vocabulary_size: int,
        embedding_dim: int,
        num_positions: int,
        num_token_types: int,
        layer_norm_eps: float,
        padding_id: int | None,
        **factory: Unpack[fl.Factory],
    ) -> None:
        super().__init__(
            TokenEmbeddings(
                WordEncoder(vocabulary_size, embedding_dim, padding_id=padding_id, **factory),
                TokenTypeEncoder(num_token_types, embedding_dim, **factory),
                PositionalEncoder(num_positions, embedding_dim, **factory),
            ),
            fl.LayerNorm(embedding_dim, eps=layer_norm_eps, **factory),
        )


class TransformerLayer(fl.Chain):
    """One layer: attention, then feed-forward, each normalised after its residual.

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
        **factory: Unpack[fl.Factory],
    ) -> None:
        super().__init__(
            AttentionResidual(SelfAttention(embedding_dim, num_heads, **factory)),
            fl.LayerNorm(embedding_dim, eps=layer_norm_eps, **factory),
            FeedForwardResidual(FeedForward(embedding_dim, feedforward_dim, activation, **factory)),
            fl.LayerNorm(embedding_dim, eps=layer_norm_eps, **factory),
        )


class BERTEncoder(TextChain):
    """The layers of BERT, without a head.

    Receives:
        ids: Int[Tensor, "batch sequence_length"]

    Returns:
        Float[Tensor, "batch sequence_length embedding_dim"], the last hidden state
    """

    def __init__(
        self,
        vocabulary_size: int = 30_522,
        embedding_dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        feedforward_dim: int = 3072,
        num_positions: int = 512,
        num_token_types: int = 2,
        activation: Callable[[], nn.Module] = fl.GeLU,
        layer_norm_eps: float = 1e-12,
        padding_id: int | None = 0,
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.vocabulary_size = vocabulary_size
        self.embedding_dim = embedding_dim
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.feedforward_dim = feedforward_dim
        self.num_positions = num_positions
        self.num_token_types = num_token_types
        self.layer_norm_eps = layer_norm_eps
        super().__init__(
            Embeddings(
                vocabulary_size, embedding_dim, num_positions, num_token_types, layer_norm_eps, padding_id, **factory
            ),
            *(
                TransformerLayer(embedding_dim, num_heads, feedforward_dim, activation, layer_norm_eps, **factory)
                for _ in range(num_layers)
            ),
        )

    def set_token_type_ids(self, token_type_ids: Tensor | None) -> None:
        """Tells the next forward which segment each token belongs to: Int[Tensor, "batch sequence_length"]."""
        self.set_context("text", {"token_type_ids": token_type_ids})


class BERTNumbers(TypedDict, total=False):
    """The numbers of a `BERTEncoder`."""

    vocabulary_size: int
    embedding_dim: int
    num_layers: int
    num_heads: int
    feedforward_dim: int
    num_positions: int
    num_token_types: int
    activation: Callable[[], nn.Module]
    layer_norm_eps: float
    padding_id: int | None


class BERTArguments(BERTNumbers, fl.Factory, total=False):
    """The keyword arguments of `BERTEncoder`, for the models that add a head to it."""


class BERT(BERTEncoder):
    """BERT with its pooler.

    Receives:
        ids: Int[Tensor, "batch sequence_length"]

    Returns:
        Float[Tensor, "batch sequence_length embedding_dim"], the last hidden state
        Float[Tensor, "batch embedding_dim"], the pooled first token

    Example:
        >>> model = BERT(vocabulary_size=100, embedding_dim=8, num_layers=2, num_heads=2, feedforward_dim=16)
        >>> states, pooled = model(torch.tensor([[2, 7, 3], [2, 3, 0]]))
        >>> states.shape, pooled.shape
        (torch.Size([2, 3, 8]), torch.Size([2, 8]))
    """

    def __init__(self, **arguments: Unpack[BERTArguments]) -> None:
        super().__init__(**arguments)
        pooler = Pooler(self.embedding_dim, device=self.device, dtype=self.dtype)
        self.append(StatesAndPooled(fl.Identity(), pooler))


class MeanPooling(fl.ContextModule):
    """Averages the states of the tokens that are text, by the context `attention`.

    Receives:
        states: Float[Tensor, "batch sequence_length embedding_dim"]

    Returns:
        Float[Tensor, "batch embedding_dim"]

    Raises:
        InputError: the attention mask that was set is a finished one, which does not tell text from padding.
    """

    def forward(
        self, states: Float[Tensor, "batch sequence_length embedding_dim"]
    ) -> Float[Tensor, "batch embedding_dim"]:
        mask: Tensor | None = self.use_context("attention").get("padding_mask")
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        if mask.ndim != 2:
            raise InputError(
                f"Mean pooling needs a mask of 1 for text and 0 for padding, (batch, sequence_length); the one that "
                f"was set has the shape {tuple(mask.shape)}. Give such a mask to set_attention_mask()."
            )
        weights = mask.unsqueeze(-1).expand(states.shape).to(states.dtype)  # batch sequence_length embedding_dim
        total = torch.sum(states * weights, dim=1)  # batch embedding_dim
        count = torch.clamp(weights.sum(dim=1), min=1e-9)  # batch embedding_dim
        return total / count


class Normalize(fl.Module):
    """Scales each vector to length 1.

    Receives:
        Float[Tensor, "batch embedding_dim"]

    Returns:
        Float[Tensor, "batch embedding_dim"]
    """

    def forward(self, x: Float[Tensor, "batch embedding_dim"]) -> Float[Tensor, "batch embedding_dim"]:
        return nn.functional.normalize(x, p=2, dim=1)


class SentenceEncoder(BERTEncoder):
    """Turns each text into one vector of length 1, close to those of texts that mean the same.

    Receives:
        ids: Int[Tensor, "batch sequence_length"]

    Returns:
        Float[Tensor, "batch embedding_dim"]

    Example:
        >>> encoder = SentenceEncoder(vocabulary_size=100, embedding_dim=8, num_layers=1, num_heads=2)
        >>> encoder.set_attention_mask(torch.tensor([[1, 1, 1], [1, 1, 0]]))
        >>> encoder(torch.tensor([[2, 7, 3], [2, 3, 0]])).shape
        torch.Size([2, 8])
    """

    def __init__(self, **arguments: Unpack[BERTArguments]) -> None:
        super().__init__(**arguments)
        self.append(MeanPooling())
        self.append(Normalize())


def bert_base(**factory: Unpack[fl.Factory]) -> BERT:
    """The numbers of `bert-base-uncased`."""
    return BERT(**factory)


def bert_large(**factory: Unpack[fl.Factory]) -> BERT:
    """The numbers of `bert-large-uncased`."""
    return BERT(embedding_dim=1024, num_layers=24, num_heads=16, feedforward_dim=4096, **factory)


def minilm_l6(**factory: Unpack[fl.Factory]) -> SentenceEncoder:
    """The numbers of `all-MiniLM-L6-v2`."""
    return SentenceEncoder(embedding_dim=384, num_layers=6, num_heads=12, feedforward_dim=1536, **factory)
