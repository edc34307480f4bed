"""A set of adapters of one kind: what one call has injected, as one object to hold.

Each adapter of a set holds its target and one leaf with its own weights, its `tuned` child, which can be switched off.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from refiners.errors import AdapterError, ConversionError
from refiners.fluxion.adapters.lora.delta import Delta
from refiners.fluxion.adapters.weights import named_base_modules, nearest
from refiners.fluxion.layers.adapter import Adapter
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.journal import all_or_nothing, note_undo, note_values
from refiners.fluxion.layers.module import WeightedModule
from refiners.fluxion.selectors import Selection


class TunedWeights(WeightedModule):
    """The weights that an adapter brings. Switched off, it leaves the target alone."""

    enabled: bool = True


class TuningAdapter(Chain, Adapter[nn.Module]):
    """An adapter with weights of its own beside its target. A subclass says what is computed."""

    @property
    def tuned(self) -> TunedWeights:
        """What it has learned."""
        return next(child for child in self if isinstance(child, TunedWeights))


class MakesAdapter(Protocol):
    """What builds the adapter of a layer."""

    def __call__(self, layer: Any, /) -> TuningAdapter: ...


class AdapterSet:
    """The adapters that one call has injected. Holding it keeps the model alive.

    Example:
        >>> model = fl.Chain(fl.LayerNorm(2), fl.Linear(2, 2))
        >>> norms = inject_norm_tuning(model)
        >>> sum(parameter.numel() for parameter in norms.parameters())
        4
        >>> with norms.disabled():
        ...     y = model(torch.ones(1, 2))
        >>> norms.eject()
    """

    def __init__(self, root: nn.Module, adapters: list[TuningAdapter]) -> None:
        self.root = root
        self._adapters = tuple(adapters)
        self._is_injected = True

    @classmethod
    @all_or_nothing
    def inject(cls, selection: Selection[Any], make: MakesAdapter) -> Self:
        """Put an adapter around each layer of a selection; all of them, or none if one fails."""
        chosen: dict[int, tuple[nn.Module, list[Any]]] = {}
        for layer, parent in selection.outside(Delta).pairs:
            chosen.setdefault(id(layer), (layer, []))[1].append(parent)
        adapters: list[TuningAdapter] = []
        for layer, parents in chosen.values():
            where = parents[0] if len({id(parent) for parent in parents}) == 1 else selection.root
            if not isinstance(where, Chain):
                raise AdapterError(
                    f"{layer} stands in {type(where).__name__}, which is no Chain, so no adapter can take its "
                    "place. Turn that module into a Chain, or select other layers."
                )
            adapters.append(make(layer).inject(where))
        return cls(selection.root, adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def __repr__(self) -> str:
        kinds = ", ".join(sorted({type(adapter).__name__ for adapter in self._adapters}))
        return f"{type(self).__name__}({len(self)} × {kinds} in {type(self.root).__name__})"

    @property
    def adapters(self) -> tuple[TuningAdapter, ...]:
        """The adapters, in the order of the tree."""
        return self._adapters

    @property
    def why_idle(self) -> str:
        """What keeps its weights from being trained, and what to do about it; "" if nothing does."""
        if not self._is_injected:
            return "it was ejected: inject it again"
        if not all(adapter.tuned.enabled for adapter in self._adapters):
            return "it is disabled: set enabled = True first"
        return ""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights of this set, for an optimizer."""
        for adapter in self._adapters:
            yield from adapter.tuned.parameters()

    @property
    def enabled(self) -> bool:
        """Whether the adapters take part. Without them the model computes what it does without the set, bit for bit."""
        return any(adapter.tuned.enabled for adapter in self._adapters)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        for adapter in self._adapters:
            adapter.tuned.enabled = value

    @contextmanager
    def disabled(self) -> Generator[None]:
        """The model without this set, for a moment."""
        before = [adapter.tuned.enabled for adapter in self._adapters]
        self.enabled = False
        try:
            yield
        finally:
            for adapter, value in zip(self._adapters, before, strict=True):
                adapter.tuned.enabled = value

    @all_or_nothing
    def eject(self) -> None:
        """Take the set out; or change nothing if one of its adapters fails.

        Raises:
            AdapterError: (a ValueError) The set was ejected already.
        """
        if not self._is_injected:
            raise AdapterError(f"{self} is not injected any more, so it cannot be ejected.")
        for adapter in self._adapters:
            if adapter.is_injected and adapter.parent is not None:
                adapter.eject()
        note_undo(lambda: setattr(self, "_is_injected", True))
        self._is_injected = False

    def state_dict(self) -> dict[str, Tensor]:
        """The weights: for each layer, by the path it has in the base."""
        return {key: parameter.detach() for key, parameter in self._by_key().items()}

    @all_or_nothing
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy other weights in. A compiled model needs no compilation for that.

        Raises:
            ConversionError: (a ValueError) Keys, shapes or values do not fit. All are listed, and nothing was loaded.
        """
        parameters = self._by_key()
        problems = [f"  {key}: missing" for key in parameters if key not in state]
        problems += [f"  {key}: unexpected{nearest(key, parameters)}" for key in state if key not in parameters]
        for key in parameters.keys() & state.keys():
            new, old = state[key], parameters[key]
            if new.shape != old.shape:
                problems.append(f"  {key}: is {list(new.shape)}, has to be {list(old.shape)}")
            elif not new.is_meta and not bool(torch.isfinite(new).all()):
                problems.append(f"  {key}: holds values that are not finite")
        if problems:
            text = "\n".join(problems)
            raise ConversionError(f"The weights do not fit {self}, and nothing was loaded.\n{text}")
        note_values(parameters.values())
        for key, parameter in parameters.items():
            parameter.detach().copy_(state[key].detach())

    def _by_key(self) -> dict[str, nn.Parameter]:
        adapters = {id(adapter.target): adapter for adapter in self._adapters}
        keys: dict[str, nn.Parameter] = {}
        for path, module in named_base_modules(self.root):
            adapter = adapters.pop(id(module), None)
            if adapter is not None:
                keys |= {f"{path}.{name}": parameter for name, parameter in adapter.tuned.named_parameters()}
        if adapters:
            raise AdapterError(f"{len(adapters)} layers of {self} are no longer in {type(self.root).__name__}.")
        return keys
