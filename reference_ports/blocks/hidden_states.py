"""Every hidden state of an encoder at once, by an edit of its tree.

Hidden state 0 is what the embeddings give, hidden state i what layer i gives. One of them is a slice,
`encoder[: i + 1]`; all of them are the same tree with a note taken after each child.
"""

from typing import TypeVar

from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.fluxion.context import Contexts

TChain = TypeVar("TChain", bound=fl.Chain)

CONTEXT, KEY = "hidden_states", "all"


class KeepState(fl.SetContext):
    """Adds the state that passes through to those kept so far."""

    def __init__(self) -> None:
        super().__init__(CONTEXT, KEY, callback=_keep)


class AllStates(fl.UseContext):
    """Returns what was kept, as a tuple."""

    def __init__(self) -> None:
        super().__init__(CONTEXT, KEY)
        self.compose(_as_tuple)


def _keep(states: list[Tensor], state: Tensor) -> None:
    states.append(state)


def _as_tuple(states: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(states)


def declare_hidden_states() -> Contexts:
    """The context of an encoder whose states can be kept, for its `init_context`."""
    return {CONTEXT: {KEY: []}}


def keep_hidden_states(encoder: TChain, num_states: int) -> TChain:
    """A copy of an encoder that returns its first `num_states` states, and shares its weights."""
    copy = encoder[:num_states]
    for position in range(num_states, 0, -1):
        copy.insert(position, KeepState())
    copy.append(AllStates())
    return copy
