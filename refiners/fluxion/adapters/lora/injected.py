"""A set of LoRAs: one name, one scale and one call for all layers of a model.

    loras = inject_loras(select(model).of(fl.Linear).inside(Attention).expect(48), name="style", rank=4, alpha=8)
    loras.scale = 0.8
    loras.eject()

Sets stack: several may stand on one layer, which then has one adapter with a LoRA of each, added in the order of their
injection. They are ejected in any order.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from refiners.errors import AdapterError, ConversionError
from refiners.fluxion.adapters.lora.adapter import LoraAdapter
from refiners.fluxion.adapters.lora.attach import attach, nothing_is_garbage
from refiners.fluxion.adapters.lora.base import Lora
from refiners.fluxion.adapters.lora.files import pair_weights
from refiners.fluxion.adapters.weights import named_base_modules
from refiners.fluxion.layers.branch import holders_of
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.factory import Factory
from refiners.fluxion.layers.journal import transaction
from refiners.fluxion.selectors import Selection, select


def inject_loras(
    where: nn.Module | Selection[Any],
    /,
    name: str,
    rank: int = 16,
    scale: float = 1.0,
    *,
    alpha: float | None = None,
    **factory: Unpack[Factory],
) -> "LoraSet":
    """Give each layer of a selection a new LoRA, on its device, in its dtype and training mode; or none, if one fails.

    Args:
        where: The layers. A model stands for all its Linear. The layers of LoRAs that are in already are left alone.
        name: What the LoRAs are called.
        rank: See `Lora`.
        scale: See `Lora`.
        alpha: See `Lora`.
        **factory: Another device or dtype than the layers'.

    Returns:
        What holds them all.

    Raises:
        SelectionError: (a LookupError) There is no layer.
        AdapterError: (a ValueError) A layer can take no LoRA, or has one of that name. The model is as before.

    Example:
        >>> model = fl.Chain(fl.Linear(2, 2), fl.Linear(2, 2))
        >>> loras = inject_loras(model, name="style", rank=1)
        >>> loras.scale = 0.5
        >>> list(loras.state_dict())[:2]
        ['Linear_1.down.weight', 'Linear_1.up.weight']
        >>> loras.eject()
    """
    selection = where if isinstance(where, Selection) else select(where).of(nn.Linear)
    selection = selection.outside(Lora)
    held: list[tuple[LoraAdapter, Lora[Any]]] = []
    with transaction(), nothing_is_garbage():
        for layer, parents in _by_layer(selection):
            lora = Lora.for_target(name, layer, rank=rank, scale=scale, alpha=alpha, **factory)
            held.append((attach(lora, layer, parents[0], _top(selection, layer, parents)), lora))
    return LoraSet(selection.root, name, held)


def _by_layer(selection: Selection[nn.Module]) -> list[tuple[nn.Module, list[Any]]]:
    layers: dict[int, tuple[nn.Module, list[Any]]] = {}
    for layer, parent in selection.pairs:
        if not isinstance(parent, Chain):
            raise AdapterError(
                f"{layer} stands in {type(parent).__name__}, which is no Chain, so no adapter can take its place. "
                "Turn that module into a Chain, or select other layers."
            )
        layers.setdefault(id(layer), (layer, []))[1].append(parent)
    return list(layers.values())


def _top(selection: Selection[nn.Module], layer: nn.Module, parents: list[Any]) -> Chain | None:
    """Where to adapt a layer that stands in several Chains. None: in its only one."""
    if len({id(parent) for parent in parents}) == 1:
        return None
    root = selection.root
    if not isinstance(root, Chain):
        raise AdapterError(f"{layer} stands in several Chains: select it below a Chain that holds them all.")
    below = [holder for holder in holders_of(layer) if any(above is root for above in (holder, *holder.get_parents()))]
    if {id(holder) for holder in below} != {id(parent) for parent in parents}:
        raise AdapterError(f"{layer} stands in more Chains than are selected: select all of them, or only one.")
    return root


class LoraSet:
    """The LoRAs that one call has injected. Holding it keeps the model alive."""

    def __init__(self, root: nn.Module, name: str, held: list[tuple[LoraAdapter, Lora[Any]]]) -> None:
        self.root = root
        self.name = name
        self._held = held
        self._is_injected = True

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return f"LoraSet({self.name!r}, {len(self)} layers of {type(self.root).__name__})"

    @property
    def adapters(self) -> tuple[LoraAdapter, ...]:
        """The adapters that hold the LoRAs of this set, perhaps beside others'."""
        return tuple(adapter for adapter, _ in self._held)

    @property
    def loras(self) -> tuple[Lora[Any], ...]:
        """The LoRAs, in the order of the tree."""
        return tuple(lora for _, lora in self._held)

    @property
    def scale(self) -> float:
        """The scale of all LoRAs. Setting it needs no new compilation.

        Raises:
            AdapterError: (a ValueError) Read, while they differ from one another.
        """
        scales = sorted({lora.scale for lora in self.loras})
        if len(scales) != 1:
            raise AdapterError(f"The LoRAs of {self} have several scales: {scales}. Read them one by one, from .loras.")
        return scales[0]

    @scale.setter
    def scale(self, value: float) -> None:
        for lora in self.loras:
            lora.scale = value

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights of this set, for an optimizer."""
        for lora in self.loras:
            yield from lora.parameters()

    def eject(self) -> None:
        """Take the LoRAs of this set out, and the adapters that hold no other; or change nothing if one fails.

        What has left the model before, alone or with an adapter around it, is passed over.

        Raises:
            AdapterError: (a ValueError) The set was ejected already.
        """
        if not self._is_injected:
            raise AdapterError(f"{self} is not injected any more, so it cannot be ejected.")
        with transaction():
            for adapter, lora in self._held:
                if not adapter.is_injected or adapter.parent is None or lora not in adapter:
                    continue
                if len(adapter.names) == 1:
                    adapter.eject()
                else:
                    adapter.remove_lora(lora.name)
        self._is_injected = False

    def state_dict(self) -> dict[str, Tensor]:
        """The weights: for each layer, by the path it has in the base, `down.weight`, `up.weight` and `alpha`, if any.

        `Lora.from_dict` reads them, and `auto_attach_loras` finds the layers again.
        """
        state: dict[str, Tensor] = {}
        for path, lora in self._by_path().items():
            state[f"{path}.down.weight"] = lora.down.weight.detach()
            state[f"{path}.up.weight"] = lora.up.weight.detach()
            if lora.alpha is not None:
                state[f"{path}.alpha"] = torch.tensor(lora.alpha, dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy other weights of the same shapes in. A compiled model needs no compilation for that.

        Raises:
            ConversionError: (a ValueError) Keys or shapes do not fit. All are listed, and nothing was loaded.
        """
        pairs = pair_weights(state)
        loras = self._by_path()
        problems = [f"  {path}: missing" for path in loras if path not in pairs]
        problems += [f"  {path}: unexpected" for path in pairs if path not in loras]
        for path in loras.keys() & pairs.keys():
            shapes = [list(layer.weight.shape) for layer in (loras[path].down, loras[path].up)]
            given = [list(tensor.shape) for tensor in pairs[path][:2]]
            if shapes != given:
                problems.append(f"  {path}: down and up of shapes {given}, have to be {shapes}")
        if problems:
            text = "\n".join(problems)
            raise ConversionError(f"The weights do not fit {self}, and nothing was loaded.\n{text}")
        for path, lora in loras.items():
            down, up, alpha = pairs[path]
            lora.load_weights(down, up)
            lora.alpha, lora.scale = alpha, lora.scale

    def _by_path(self) -> dict[str, Lora[Any]]:
        loras = {id(adapter.target): lora for adapter, lora in self._held}
        paths: dict[str, Lora[Any]] = {}
        for path, module in named_base_modules(self.root):
            lora = loras.pop(id(module), None)
            if lora is not None:
                paths[path] = lora
        if loras:
            raise AdapterError(f"{len(loras)} layers of {self} are no longer in {cast(Any, self.root)}.")
        return paths
