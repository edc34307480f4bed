"""Training adapters alone: everything else is frozen, and afterwards as it was.

    with trainable(loras) as training:
        optimizer = torch.optim.AdamW(training.parameters())
        …

A frozen weight gets no gradient and costs no memory for one; the gradients of the activations pass it on their way to
the adapters below.
"""

from collections.abc import Iterator
from typing import Protocol, Self

from torch import nn

from refiners.errors import AdapterError


class TrainedSet(Protocol):
    """What holds injected adapters: a `LoraSet` and its like."""

    @property
    def root(self) -> nn.Module:
        """The model."""
        ...

    @property
    def why_idle(self) -> str:
        """What keeps its weights from being trained, and what to do about it; "" if nothing does."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights of the adapters."""
        ...


class Training:
    """A model of which only some weights are trained. See `trainable`.

    Attributes:
        num_trained: how many numbers are trained.
        num_frozen: how many stay as they are.
    """

    def __init__(self, sets: tuple[TrainedSet, ...]) -> None:
        idle = [f"  {adapters!r}: {adapters.why_idle}" for adapters in sets if adapters.why_idle]
        if idle:
            lines = "\n".join(idle)
            raise AdapterError(f"What takes no part in what the model computes cannot be trained.\n{lines}")
        wanted = {id(parameter): parameter for adapters in sets for parameter in adapters.parameters()}
        rest = {id(parameter): parameter for adapters in sets for parameter in adapters.root.parameters()}
        self._parameters = list(wanted.values())
        self._before = {parameter: parameter.requires_grad for parameter in {**rest, **wanted}.values()}
        self.num_trained = sum(parameter.numel() for parameter in self._parameters)
        self.num_frozen = sum(parameter.numel() for parameter in self._before) - self.num_trained
        fixed = [list(parameter.shape) for parameter in self._parameters if not parameter.is_floating_point()]
        if not self._parameters or fixed:
            problem = (
                f"weights of the shapes {fixed} are no floating point numbers" if fixed else "they have no weights"
            )
            raise AdapterError(f"{', '.join(map(repr, sets))} cannot be trained: {problem}.")
        for parameter in self._before:
            parameter.requires_grad_(id(parameter) in wanted)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"Training({self.num_trained:,} of {self.num_trained + self.num_frozen:,} weights)"

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained, for an optimizer."""
        return iter(self._parameters)

    def restore(self) -> None:
        """Let each weight want its gradient, or not, as it did before. The gradients that were computed stay."""
        for parameter, requires_grad in self._before.items():
            parameter.requires_grad_(requires_grad)
        self._before = {}


def trainable(*sets: TrainedSet) -> Training:
    """Freeze all weights of a model but those of some sets of adapters.

    Args:
        *sets: What is trained, such as `inject_loras` returns; of one model or of several.

    Returns:
        What undoes it: a context manager, or its `restore()`.

    Raises:
        AdapterError: (a ValueError) There is nothing to train, or a set is ejected, merged or disabled.

    Example:
        >>> import refiners.fluxion.layers as fl
        >>> from refiners.fluxion.adapters import inject_loras, trainable
        >>> model = fl.Chain(fl.Linear(4, 4), fl.Linear(4, 4))
        >>> loras = inject_loras(model, name="style", rank=1)
        >>> with trainable(loras) as training:
        ...     training
        Training(16 of 56 weights)
    """
    return Training(sets)
