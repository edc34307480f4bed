"""A layer and its LoRAs, in the place of the layer."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import nn

from refiners.errors import AdapterTypeError, LoraNameError
from refiners.fluxion.adapters.lora.base import Lora
from refiners.fluxion.layers.adapter import Adapter
from refiners.fluxion.layers.combinators import Sum
from refiners.fluxion.layers.journal import transaction
from refiners.fluxion.layers.module import ContextModule


class LoraAdapter(Sum, Adapter[nn.Module]):
    """A layer and its LoRAs: the output of the layer, plus what each LoRA adds to it, one after the other.

    LoRAs may be of another dtype than the layer: they receive its input in theirs, and the sum is given in the dtype
    of the layer's output.

    Example:
        >>> model = fl.Chain(fl.Linear(2, 2))
        >>> adapter = LoraAdapter(model.Linear, LinearLora("style", 2, 2, rank=1)).inject(model)
        >>> adapter.scale = {"style": 0.5}
        >>> adapter.scales
        {'style': 0.5}
        >>> adapter.eject()
    """

    # Whether sets of LoRAs may add theirs, and the last one that is ejected takes the adapter along. One that was built
    # by hand is its owner's to eject, and must not take others' LoRAs with it.
    is_shared = False

    def __init__(self, target: nn.Module, /, *loras: Lora[Any]) -> None:
        for i, lora in enumerate(loras):
            _check_fits(lora, target, [other.name for other in loras[:i]])
        with self.setup_adapter(target):
            super().__init__(target, *loras)

    def _share(self, args: tuple[Any, ...]) -> Any:
        # Lazily: the input is converted after the layer has run and once for all LoRAs, since gradients add up in the
        # reverse order of the operations.
        for module in self:
            if isinstance(module, Lora):
                dtype = module.down.weight.dtype
                if args[0].dtype != dtype:
                    args = (args[0].to(dtype), *args[1:])
            yield args

    def _fold(self, folded: Any, output: Any) -> Any:
        if folded is None:
            total = super()._fold(None, output)
            return total.dtype, total
        return folded[0], super()._fold(folded[1], output)

    def _result(self, folded: Any) -> Any:
        dtype, total = folded
        return total if total.dtype == dtype else total.to(dtype)

    @property
    def lora_layers(self) -> Iterator[Lora[Any]]:
        """The LoRAs of the layer, in the order in which they are added."""
        # Children only: another adapter of LoRAs may stand inside, around the same layer.
        return iter([cast(Lora[Any], module) for module in self if isinstance(module, Lora)])

    @property
    def names(self) -> list[str]:
        """The names of the LoRAs."""
        return [lora.name for lora in self.lora_layers]

    @property
    def loras(self) -> dict[str, Lora[Any]]:
        """The LoRAs by name."""
        return {lora.name: lora for lora in self.lora_layers}

    @property
    def scales(self) -> dict[str, float]:
        """The scales by name."""
        return {lora.name: lora.scale for lora in self.lora_layers}

    @property
    def scale(self) -> dict[str, float]:
        """The scales by name. What is set may hold some of the names only.

        Raises:
            LoraNameError: (a KeyError) There is no LoRA of such a name. No scale was set.
        """
        return self.scales

    @scale.setter
    def scale(self, values: Mapping[str, float]) -> None:
        loras = self.loras
        unknown = [name for name in values if name not in loras]
        if unknown:
            raise LoraNameError(f"No LoRA of {self} is called {' or '.join(map(repr, unknown))}, only {list(loras)}.")
        for name, value in values.items():
            loras[name].scale = value

    def add_lora(self, lora: Lora[Any], /) -> None:
        """Add a LoRA behind the others.

        Raises:
            LoraNameError: (an AssertionError) There is one of that name.
            AdapterTypeError: (a TypeError) The LoRA does not fit the layer.
        """
        _check_fits(lora, self.target, self.names)
        with transaction():
            self.append(lora)
            for twin in self.copies:
                twin.append(lora.structural_copy())

    def remove_lora(self, name: str, /) -> Lora[Any] | None:
        """Take the LoRA of that name out, and return it; None if there is none."""
        lora = self.loras.get(name)
        with transaction():
            for adapter in (self, *self.copies) if lora is not None else ():
                adapter.remove(adapter.loras[name])
        return lora

    @property
    def copies(self) -> "tuple[LoraAdapter, ...]":
        """The same adapter in the other places of a layer that the tree holds several times."""
        return cast("tuple[LoraAdapter, ...]", self._twins)


def _check_fits(lora: Lora[Any], target: nn.Module, names: list[str]) -> None:
    if lora.name in names:
        raise LoraNameError(
            f"{type(target).__name__} has a LoRA called {lora.name!r} already: remove it, or choose another name."
        )
    # What a Chain in the place of a layer makes of its input is not known.
    if not isinstance(target, ContextModule):
        if not lora.is_compatible(target):
            raise AdapterTypeError(f"{lora} does not fit {target}.")
        lora.fit(target)
