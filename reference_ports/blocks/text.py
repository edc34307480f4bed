"""What every model that reads token ids shares: positions, and the knobs that travel through Context.

The knobs hold for one forward: the Chain that declares them puts its defaults back when it returns.
"""

from typing import Self, Unpack

import torch
from jaxtyping import Int
from torch import Tensor

import refiners.fluxion.layers as fl
from reference_ports.blocks.attention import prepare_attention_mask
from reference_ports.blocks.hidden_states import declare_hidden_states, keep_hidden_states
from refiners.errors import InputError
from refiners.fluxion.context import Contexts


class TextChain(fl.Chain):
    """A Chain that reads token ids: Int[Tensor, "batch sequence_length"].

    Contexts:
        attention.mask: which tokens see which, in the form that attention takes; None where nothing is masked.
        attention.padding_mask: 1 for text and 0 for padding, as given; None when not given.
        text.position_ids, text.token_type_ids: as given; None for 0, 1, 2 … and for zeros.
    """

    is_causal: bool = False
    num_layers: int

    def init_context(self) -> Contexts:
        return {
            "attention": {"mask": None, "padding_mask": None},
            "text": {"position_ids": None, "token_type_ids": None},
            **declare_hidden_states(),
        }

    def with_hidden_states(self) -> Self:
        """A copy that shares the weights and returns all hidden states: a tuple of `num_layers + 1` tensors.

        Its knobs are its own: set the mask of the copy, not that of the original.
        """
        return keep_hidden_states(self, self.num_layers + 1)

    def set_attention_mask(self, mask: Tensor | None) -> None:
        """Hides padding from the next forward.

        Receives:
            mask: 1 for text and 0 for padding, "batch sequence_length"; or a finished mask, boolean or to be added to
                the scores, "batch num_heads sequence_length sequence_length"; or None.

        Raises:
            InputError: the mask has neither two nor four axes.
        """
        if mask is not None and self.device is not None:
            mask = mask.to(self.device)
        prepared = prepare_attention_mask(mask, is_causal=self.is_causal)
        self.set_context("attention", {"mask": prepared, "padding_mask": mask})

    def set_position_ids(self, position_ids: Tensor | None) -> None:
        """Places the tokens of the next forward: Int[Tensor, "batch sequence_length"], 0 … num_positions - 1."""
        self.set_context("text", {"position_ids": position_ids})


class PositionIds(fl.ContextModule):
    """The place of each token: what the context `text` says, else 0, 1, 2 …

    Receives:
        ids: Int[Tensor, "batch sequence_length"]

    Returns:
        Int[Tensor, "1 sequence_length"], or what was given.

    Raises:
        InputError: the sequence is longer than the model has places.
    """

    def __init__(self, num_positions: int) -> None:
        self.num_positions = num_positions
        super().__init__()

    def forward(self, ids: Int[Tensor, "batch sequence_length"]) -> Int[Tensor, "_ sequence_length"]:
        given: Tensor | None = self.use_context("text").get("position_ids")
        if given is not None:
            return given
        length = ids.shape[1]
        if length > self.num_positions:
            raise InputError(
                f"The sequences have {length} tokens and the model has {self.num_positions} positions. "
                "Cut the sequences, or give position ids with set_position_ids()."
            )
        return torch.arange(length, device=ids.device)[None, :]


class PositionalEncoder(fl.Chain):
    """A learned vector for each place.

    Receives:
        ids: Int[Tensor, "batch sequence_length"]

    Returns:
        Float[Tensor, "1 sequence_length embedding_dim"], or with the batch of the position ids that were given.
    """

    def __init__(self, num_positions: int, embedding_dim: int, **factory: Unpack[fl.Factory]) -> None:
        self.num_positions = num_positions
        self.embedding_dim = embedding_dim
        super().__init__(
            PositionIds(num_positions),
            fl.Embedding(num_positions, embedding_dim, **factory),
        )
