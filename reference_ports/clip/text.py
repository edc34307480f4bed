"""CLIP's text encoder: a causal transformer, read at the end of the text. See `reference_ports.clip.model`."""

from collections.abc import Callable
from typing import TypedDict, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from reference_ports.blocks.activations import quick_gelu
from reference_ports.blocks.text import PositionalEncoder, TextChain
from reference_ports.blocks.transformer import StatesAndPooled, TransformerLayer
from refiners.fluxion.context import Contexts


class TokenEncoder(fl.Embedding):
    """A learned vector for each token of the vocabulary.

    Receives:
        ids: Int[Tensor, "batch sequence_length"], 0 … vocabulary_size - 1

    Returns:
        Float[Tensor, "batch sequence_length embedding_dim"]
    """


class TextEmbeddings(fl.Sum):
    """Token and place of each token, added."""

    def __init__(
        self, vocabulary_size: int, embedding_dim: int, num_positions: int, **factory: Unpack[fl.Factory]
    ) -> None:
        super().__init__(
            TokenEncoder(vocabulary_size, embedding_dim, **factory),
            PositionalEncoder(num_positions, embedding_dim, **factory),
        )


class CLIPTextEncoder(TextChain):
    """CLIP's text transformer, without a head.

    Receives:
        ids: Int[Tensor, "batch sequence_length"]

    Returns:
        Float[Tensor, "batch sequence_length embedding_dim"], the last hidden state, normalised

    Example:
        >>> encoder = CLIPTextEncoder(vocabulary_size=100, embedding_dim=8, num_layers=3, num_heads=2)
        >>> ids = torch.tensor([[98, 7, 99]])
        >>> encoder(ids).shape
        torch.Size([1, 3, 8])
        >>> penultimate = encoder[:-2]  # neither the last layer nor the norm: clip skip 1, as Stable Diffusion XL does
        >>> penultimate(ids).shape
        torch.Size([1, 3, 8])
    """

    is_causal = True

    def __init__(
        self,
        vocabulary_size: int = 49_408,
        embedding_dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        feedforward_dim: int = 3072,
        num_positions: int = 77,
        activation: Callable[[], nn.Module] = quick_gelu,
        layer_norm_eps: float = 1e-5,
        **factory: Unpack[fl.Factory],
    ) -> None:
        self.vocabulary_size = vocabulary_size
        self.embedding_dim = embedding_dim
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.feedforward_dim = feedforward_dim
        self.num_positions = num_positions
        self.layer_norm_eps = layer_norm_eps
        super().__init__(
            TextEmbeddings(vocabulary_size, embedding_dim, num_positions, **factory),
            *(
                TransformerLayer(embedding_dim, num_heads, feedforward_dim, activation, layer_norm_eps, True, **factory)
                for _ in range(num_layers)
            ),
            fl.LayerNorm(embedding_dim, eps=layer_norm_eps, **factory),
        )


class CLIPTextNumbers(TypedDict, total=False):
    """The numbers of a `CLIPTextEncoder`."""

    vocabulary_size: int
    embedding_dim: int
    num_layers: int
    num_heads: int
    feedforward_dim: int
    num_positions: int
    activation: Callable[[], nn.Module]
    layer_norm_eps: float


class CLIPTextArguments(CLIPTextNumbers, fl.Factory, total=False):
    """The keyword arguments of `CLIPTextEncoder`, for the models that add a head to it."""


class HighestId(fl.Module):
    """Where the end of each text is: at its highest id, the first one where there are several.

    So reads a configuration whose `eos_token_id` is 2, as published ones are. An added token, whose id is higher than
    that of the end, breaks this rule.

    Receives:
        ids: Int[Tensor, "batch sequence_length"]

    Returns:
        Int[Tensor, "batch"]
    """

    def forward(self, ids: Int[Tensor, "batch sequence_length"]) -> Int[Tensor, "batch"]:
        return ids.to(torch.int).argmax(dim=-1)


class FirstId(fl.Module):
    """Where the end of each text is: at the first token of that id.

    Receives:
        ids: Int[Tensor, "batch sequence_length"]

    Returns:
        Int[Tensor, "batch"], 0 where there is no such token
    """

    def __init__(self, token_id: int = 49_407) -> None:
        self.token_id = token_id
        super().__init__()

    def forward(self, ids: Int[Tensor, "batch sequence_length"]) -> Int[Tensor, "batch"]:
        return (ids.to(torch.int) == self.token_id).int().argmax(dim=-1)


class FindEndOfText(fl.Passthrough):
    """Notes where each text ends, and passes its ids on."""

    def __init__(self, end_of_text: nn.Module) -> None:
        super().__init__(end_of_text, fl.SetContext("clip_text", "end_of_text"))


class EndOfTextState(fl.ContextModule):
    """The state of the token that ends each text.

    Receives:
        states: Float[Tensor, "batch sequence_length embedding_dim"]

    Returns:
        Float[Tensor, "batch embedding_dim"]
    """

    def forward(
        self, states: Float[Tensor, "batch sequence_length embedding_dim"]
    ) -> Float[Tensor, "batch embedding_dim"]:
        end: Tensor = self.use_context("clip_text")["end_of_text"]
        return states[torch.arange(states.shape[0], device=states.device), end]


class TextEmbedding(fl.Chain):
    """One vector for each text, in the space that texts and pictures share.

    Receives:
        states: Float[Tensor, "batch sequence_length embedding_dim"]

    Returns:
        Float[Tensor, "batch projection_dim"]
    """

    def __init__(self, embedding_dim: int, projection_dim: int, **factory: Unpack[fl.Factory]) -> None:
        super().__init__(
            EndOfTextState(),
            fl.Linear(embedding_dim, projection_dim, bias=False, **factory),
        )


class TextModelChain(fl.Chain):
    """What CLIP's text models with a pooled output share: the knobs of the encoder in them."""

    def init_context(self) -> Contexts:
        return {"clip_text": {"end_of_text": None}}

    @property
    def encoder(self) -> CLIPTextEncoder:
        """The transformer, whose knobs and slices are of use by themselves."""
        return self.ensure_find(CLIPTextEncoder)

    def set_attention_mask(self, mask: Tensor | None) -> None:
        """Hides padding from the next forward; see `CLIPTextEncoder.set_attention_mask`."""
        self.encoder.set_attention_mask(mask)

    def set_position_ids(self, position_ids: Tensor | None) -> None:
        """Places the tokens of the next forward; see `CLIPTextEncoder.set_position_ids`."""
        self.encoder.set_position_ids(position_ids)


class CLIPTextModel(TextModelChain):
    """CLIP's text encoder with the state of the end of each text.

    Receives:
        ids: Int[Tensor, "batch sequence_length"]

    Returns:
        Float[Tensor, "batch sequence_length embedding_dim"], the last hidden state, normalised
        Float[Tensor, "batch embedding_dim"], that of the end of each text
    """

    def __init__(
        self, end_of_text: Callable[[], nn.Module] = HighestId, **arguments: Unpack[CLIPTextArguments]
    ) -> None:
        super().__init__(
            FindEndOfText(end_of_text()),
            CLIPTextEncoder(**arguments),
            StatesAndPooled(fl.Identity(), EndOfTextState()),
        )


class CLIPTextModelWithProjection(TextModelChain):
    """CLIP's text encoder with one vector for each text, in the space that texts and pictures share.

    Receives:
        ids: Int[Tensor, "batch sequence_length"]

    Returns:
        Float[Tensor, "batch sequence_length embedding_dim"], the last hidden state, normalised
        Float[Tensor, "batch projection_dim"], the embedding of each text
    """

    def __init__(
        self,
        projection_dim: int = 768,
        end_of_text: Callable[[], nn.Module] = HighestId,
        **arguments: Unpack[CLIPTextArguments],
    ) -> None:
        self.projection_dim = projection_dim
        encoder = CLIPTextEncoder(**arguments)
        embedding = TextEmbedding(encoder.embedding_dim, projection_dim, device=encoder.device, dtype=encoder.dtype)
        super().__init__(
            FindEndOfText(end_of_text()),
            encoder,
            StatesAndPooled(fl.Identity(), embedding),
        )
