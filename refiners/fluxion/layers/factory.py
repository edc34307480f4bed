"""Where, and in which precision, a layer builds its weights.

Every layer with weights takes `device` and `dtype` by name. They travel together down a tree, so a node writes
`**factory: Unpack[Factory]` in its constructor and `**factory` in each call, and never the two by hand.

    class FeedForward(fl.Chain):
        def __init__(self, embedding_dim: int, **factory: Unpack[Factory]) -> None:
            super().__init__(fl.Linear(embedding_dim, embedding_dim, **factory), fl.ReLU())
"""

from typing import TypedDict

import torch


class Factory(TypedDict, total=False):
    """The device and the dtype of new weights. An absent key, or None, means torch's current default."""

    device: torch.device | str | None
    dtype: torch.dtype | None
