"""Gradient checkpointing: less memory in training, for more time.

A backward pass needs what the forward computed. A checkpointed module keeps its inputs only, and runs a second time
when the backward comes to it (Chen et al., arXiv 1604.06174). Gradients are equal to the last bit.

The second run sees the contexts as they were when the first began, whoever sets them meanwhile and whatever thread it
is in. What it writes into contexts is dropped: the first run has written it already.

    checkpoints = inject_checkpoints(select(model).of(TransformerLayer).expect(12))
    …
    checkpoints.eject()
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint

from refiners.errors import AdapterError
from refiners.fluxion.adapters.frozen import freeze
from refiners.fluxion.context import ContextProvider, Contexts, open_scope, providers_of, running_frames
from refiners.fluxion.layers.adapter import Adapter
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.journal import all_or_nothing
from refiners.fluxion.selectors import Selection

_checkpoint = cast(Callable[..., Any], torch_checkpoint.checkpoint)  # pyright: ignore[reportUnknownMemberType] (torch does not annotate it)


class CheckpointAdapter(Chain, Adapter[nn.Module]):
    """Runs its target a second time in the backward pass instead of keeping what it computed.

    It changes nothing where no gradients are recorded. The state of the default random generators is that of the first
    run, so dropout drops the same. Where the target changes something else than contexts (a counter, the statistics of
    a BatchNorm), that is changed twice, as in `torch.utils.checkpoint`, which does the work.

    Contexts are kept with their dicts, lists, sets and tuples; an object of another class in them must not change
    between forward and backward, nor may tensors, which is an error of torch's.

    Receives:
        What the target receives.

    Returns:
        What the target returns.

    Example:
        >>> model = fl.Chain(fl.Chain(fl.Linear(2, 2), fl.ReLU()), fl.Linear(2, 1))
        >>> adapter = CheckpointAdapter(model.Chain).inject()
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> model.CheckpointAdapter.Chain.Linear.weight.grad.shape
        torch.Size([2, 2])
        >>> adapter.eject()
    """

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target)

    def forward(self, *args: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return super().forward(*args)
        if torch.compiler.is_compiling():
            # The compiler knows what to recompute, and with which contexts.
            return _checkpoint(super().forward, *args, use_reentrant=False)
        tensors, later = freeze((args, running_frames(), self._waiting_values()))
        first: list[tuple[Any, ...]] = [args]

        def run(*tensors: Tensor) -> Any:
            if first:
                return Chain.forward(self, *first.pop())
            args, frames, held = later.thaw(tensors)
            with open_scope(self, held, frames):
                return Chain.forward(self, *args)

        # The tensors are arguments, so that torch knows what is kept: an outer checkpoint keeps none of it.
        return _checkpoint(run, *tensors, use_reentrant=False)

    def _waiting_values(self) -> dict[ContextProvider, Contexts]:
        """What the providers hold whose Chains are not running: those above, and those that are about to run."""
        running = running_frames()
        above = providers_of(self)
        below = [module.own_provider for module in self.target.modules() if isinstance(module, Chain)]
        waiting = [provider for provider in (*above, *below) if provider is not None and provider not in running]
        return {provider: provider.values for provider in waiting}


@all_or_nothing
def inject_checkpoints(where: Selection[Any], /) -> "CheckpointSet":
    """Checkpoint each module of a selection; or none, if one fails. They may lie inside one another.

    Raises:
        SelectionError: (a LookupError) There is no module.
        AdapterError: (a ValueError) A module stands in something that is no Chain, or is checkpointed already. The
            model is as before.

    Example:
        >>> from refiners.fluxion.selectors import select
        >>> model = fl.Chain(fl.Residual(fl.Linear(2, 2)), fl.Residual(fl.Linear(2, 2)))
        >>> checkpoints = inject_checkpoints(select(model).of(fl.Residual).expect(2))
        >>> checkpoints.eject()
    """
    modules: dict[int, tuple[nn.Module, list[Chain]]] = {}
    for module, parent in where.pairs:
        modules.setdefault(id(module), (module, []))[1].append(_checked(module, parent))
    adapters: list[CheckpointAdapter] = []
    for module, parents in modules.values():
        # A module that stands in several places is checkpointed in all of them.
        root = where.root if len(parents) > 1 and isinstance(where.root, Chain) else parents[0]
        adapters.append(CheckpointAdapter(module).inject(root))
    return CheckpointSet(adapters)


def _checked(module: nn.Module, parent: nn.Module) -> Chain:
    if not isinstance(parent, Chain):
        raise AdapterError(
            f"{module} stands in {type(parent).__name__}, which is no Chain, so no adapter can take its place. "
            "Turn that module into a Chain, or select other modules."
        )
    if isinstance(parent, CheckpointAdapter):
        raise AdapterError(f"{module} is checkpointed already: leave it out, or eject {parent} first.")
    return parent


class CheckpointSet:
    """The checkpoints that one call has injected."""

    def __init__(self, adapters: list[CheckpointAdapter]) -> None:
        self.adapters = tuple(adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    def __repr__(self) -> str:
        return f"CheckpointSet({len(self)} modules)"

    @all_or_nothing
    def eject(self) -> None:
        """Take all of them out, or none if one fails.

        Raises:
            AdapterError: (a ValueError) One is not injected any more.
        """
        for adapter in reversed(self.adapters):
            adapter.eject()
