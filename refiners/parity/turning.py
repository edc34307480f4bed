"""Rotary positions that turn other pairs of elements: told only where it is proved.

What both sides do looks much alike in every layout, and text that is joined in front of a picture looks like halves.
So the words are told if the port, on values in the other order, makes upstream's values in the other order.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from refiners.parity import flow
from refiners.parity.mending import first_that_mend, operations_of
from refiners.parity.replay import Edit
from refiners.parity.trial import Making, Trial


def layouts(trial: Trial, pairs: Sequence[tuple[int, int]]) -> str:
    """That both sides turn other pairs of elements: told only where values in the other order are turned alike."""
    told = flow.rope_layouts(*operations_of(trial, pairs)) if pairs else ""
    whole = (trial.port.root, trial.upstream.root)
    tried = ([*pairs], [whole], first_that_mend(trial)) if told else ()
    is_proved = any(some and all(_turns_in_another_order(trial.part(*pair)) for pair in some) for some in tried)
    return told if is_proved else ""


def _turns_in_another_order(part: Trial) -> bool:
    port, root = part.port, part.port.root
    shape = part.upstream.values[part.upstream.root].shape
    for leaf in (n for n in port.leaves() if port.values[n].is_floating_point() and n != root):
        size = port.values[leaf].shape[-1] if port.values[leaf].ndim > 1 else 0
        if not size or shape[-1:] != (size,):
            continue
        for turned, paired in itertools.product((size, size // 2, size // 4), (False, True)):
            if turned % 2 == 0 and part.holds(_reorder(leaf, root, shape, turned, paired)):
                return True
    return False


def _reorder(leaf: int, root: int, shape: torch.Size, turned: int, paired: bool) -> Making:
    """Pairs side by side in the place of halves, or the reverse, before; and back behind."""

    def order(x: Tensor, apart: bool) -> Tensor:
        first, rest = x[..., :turned], x[..., turned:]
        pairs = first.reshape(*first.shape[:-1], *((-1, 2) if apart else (2, -1))).transpose(-1, -2)
        return torch.cat((pairs.reshape(first.shape), rest), dim=-1)

    def before(x: Tensor) -> Tensor:
        return order(x, paired)

    def behind(x: Tensor) -> Tensor:
        return order(x.reshape(shape), not paired)

    return lambda port, upstream: Edit(values={leaf: before, root: behind})
