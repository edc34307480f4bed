"""A set of LoRAs: one name, one object to hold, for all layers of a model.

loras.scale = 0.8                       # or loras.scales["Residual.Linear"] = 0.8
with loras.disabled():                  # the base
    model(x)
loras.swap(other_specs)                 # other weights, in place
loras.merge()                           # into the weights of the layers, and out again with loras.unmerge()
loras.eject()
"""

from collections.abc import Generator, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from refiners.errors import AdapterError, ConversionError, LoraNameError
from refiners.fluxion.adapters.lora.adapter import LoraAdapter
from refiners.fluxion.adapters.lora.delta import Delta
from refiners.fluxion.adapters.lora.files import pair_weights
from refiners.fluxion.adapters.lora.fused import FusedLoras
from refiners.fluxion.adapters.lora.merge import merge_delta, unmerge_delta
from refiners.fluxion.adapters.lora.spec import DeltaSpec
from refiners.fluxion.adapters.lora.swapping import shortened, swap_specs
from refiners.fluxion.adapters.weights import nearest, paths_of
from refiners.fluxion.layers.adapter import Adapter
from refiners.fluxion.layers.branch import holders_of
from refiners.fluxion.layers.journal import all_or_nothing, note_undo


class LoraSet:
    """The LoRAs that one call has injected. Holding it keeps the model alive."""

    def __init__(self, root: nn.Module, name: str, held: list[tuple[LoraAdapter, Delta[Any]]]) -> None:
        self.root = root
        self.name = name
        # The specs that fitted nowhere, and why, if they were allowed to.
        self.left_out: dict[str, str] = {}
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
    def loras(self) -> tuple[Delta[Any], ...]:
        """The LoRAs, in the order in which they were injected."""
        return tuple(lora for _, lora in self._held)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that their layers have in the base, in the order of the tree.

        Raises:
            AdapterError: (a ValueError) Some layers are no longer in the model.
        """
        return tuple(self.by_path())

    @property
    def why_idle(self) -> str:
        """What keeps its weights from being trained, and what to do about it; "" if nothing does."""
        if not self._is_injected:
            return "it was ejected: inject it again"
        if any(lora.switch.merged for lora in self.loras):
            return "it is merged into the weights of the layers: unmerge() it first"
        return "" if self.enabled else "it is disabled: set enabled = True first"

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights of this set, for an optimizer."""
        for lora in self.loras:
            yield from lora.parameters()

    # --- strength --------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """The scale of all LoRAs. Setting it needs no new compilation.

        Raises:
            AdapterError: (a ValueError) Read, while they differ from one another.
        """
        scales = sorted({lora.scale for lora in self.loras})
        if len(scales) != 1:
            raise AdapterError(f"The LoRAs of {self} have several scales: {scales}. Read them from .scales.")
        return scales[0]

    @scale.setter
    def scale(self, value: float) -> None:
        for lora in self.loras:
            lora.scale = value

    @property
    def scales(self) -> MutableMapping[str, float]:
        """The scales by the path of the layer. What is written into it is the scale from then on."""
        return _Scales(self.by_path())

    @property
    def enabled(self) -> bool:
        """Whether the LoRAs take part. Without them, outputs are those of the base to the last bit.

        Under `torch.compile`, each of the two states is compiled once.
        """
        return all(lora.switch.enabled for lora in self.loras)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enable([value] * len(self))

    @contextmanager
    def disabled(self) -> Generator[None]:
        """As long as this is open, the LoRAs take no part."""
        before = [lora.switch.enabled for lora in self.loras]
        self.enabled = False
        try:
            yield
        finally:
            self._enable(before)

    def _enable(self, values: list[bool]) -> None:
        for lora, value in zip(self.loras, values, strict=True):
            lora.switch.set("enabled", value)
            lora.switch.changed()

    # --- merging ---------------------------------------------------------------------------------------------------

    @property
    def is_merged(self) -> bool:
        """Whether the LoRAs are merged into the weights of their layers."""
        return bool(self._held) and all(lora.switch.merged for lora in self.loras)

    @all_or_nothing
    def merge(self) -> None:
        """Fold the LoRAs into the weights of their layers, which then cost what the base costs; or change nothing.

        The layers keep their own weights aside, so this takes their memory once more until `unmerge`. Scales and other
        weights may still be set; each time, the merged weights are computed anew.

        Raises:
            AdapterError: (a ValueError) The set is merged or ejected already, or some LoRAs cannot be: merged weights
                would not be finite, there is no weight that does the same, or the layer is not for them alone.
        """
        self._check_injected("merged")
        if any(lora.switch.merged for lora in self.loras):
            raise AdapterError(f"{self} is merged already. Unmerge it first.")
        problems: list[str] = []
        for adapter, lora in self._held:
            try:
                _check_alone(adapter, lora)
                merge_delta(adapter.target, lora)
                adapter.refuse()
            except AdapterError as error:
                problems.append(f"  {adapter.get_path()}: {error}")
        if problems:
            raise AdapterError("\n".join([f"{self} cannot be merged. Nothing was.", *shortened(problems)]))

    @all_or_nothing
    def unmerge(self) -> None:
        """The inverse of `merge`: the weights are the very same bits as before.

        Other sets that are merged stay so, and sets may be unmerged in any order.

        Raises:
            AdapterError: (a ValueError) The set is not merged.
        """
        if not any(lora.switch.merged for lora in self.loras):
            raise AdapterError(f"{self} is not merged, so there is nothing to undo.")
        for adapter, lora in self._held:
            unmerge_delta(adapter.target, lora)
            adapter.refuse()

    @contextmanager
    def merged(self) -> Generator[None]:
        """As long as this is open, the LoRAs are merged."""
        self.merge()
        try:
            yield
        finally:
            self.unmerge()

    # --- leaving ---------------------------------------------------------------------------------------------------

    @all_or_nothing
    def eject(self) -> None:
        """Take the LoRAs of this set out, and the adapters that hold no other; or change nothing if one fails.

        What is merged is unmerged. What has left the model before, alone or with an adapter around it, is passed over.

        Raises:
            AdapterError: (a ValueError) The set was ejected already.
        """
        self._check_injected("ejected")
        for adapter, lora in self._held:
            if not adapter.is_injected or adapter.parent is None:
                continue
            if not adapter.has_others_than(lora):
                adapter.eject()
            elif lora in adapter:
                adapter.remove_lora(lora.name)
        note_undo(lambda: setattr(self, "_is_injected", True))
        self._is_injected = False

    def _check_injected(self, what: str) -> None:
        if not self._is_injected:
            raise AdapterError(f"{self} is not injected any more, so it cannot be {what}.")

    # --- weights ---------------------------------------------------------------------------------------------------

    def specs(self) -> dict[str, DeltaSpec]:
        """The LoRAs as data, by the path that their layers have in the base. Tensors share the parameters' memory."""
        return {path: lora.spec() for path, lora in self.by_path().items()}

    def swap(self, specs: Mapping[str, DeltaSpec]) -> None:
        """Put other weights of the same or of smaller ranks in, in place. Scales stay, alphas become the specs'.

        The tree is not edited, and a compiled model needs no compilation. What is fused stays so, and what is merged is
        merged anew.

        Raises:
            AdapterError: (a ValueError) Specs are missing, are for other layers, do not fit, or hold values that are
                not finite. All are listed, and nothing was written.
        """
        self._check_injected("given other weights")
        swap_specs(self.by_path(), specs, str(self))

    def state_dict(self) -> dict[str, Tensor]:
        """The weights: for each layer, by the path it has in the base, `down.weight`, `up.weight` and `alpha`, if any.

        `Lora.from_dict` reads them, and `auto_attach_loras` finds the layers again. Other methods have other names, see
        `DeltaSpec`.
        """
        state: dict[str, Tensor] = {}
        for path, lora in self.by_path().items():
            for role, weight in lora.weights().items():
                state[f"{path}.{_NAMES.get(role, role)}"] = weight.tensor.detach()
            if lora.alpha is not None:
                state[f"{path}.alpha"] = torch.tensor(lora.alpha, dtype=torch.float64)
        return state

    @all_or_nothing
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy other weights of the same shapes in. A compiled model needs no compilation for that.

        Raises:
            ConversionError: (a ValueError) Keys or shapes do not fit. All are listed, and nothing was loaded.
        """
        loras = self.by_path()
        specs = self._specs_in(state, loras)
        problems = [f"  {path}: missing" for path in loras if path not in specs]
        problems += [f"  {path}: unexpected" for path in specs if path not in loras]
        for path in loras.keys() & specs.keys():
            shapes = [list(weight.tensor.shape) for weight in loras[path].weights().values()]
            given = [list(tensor.shape) for tensor in specs[path].tensors.values()]
            if shapes != given:
                roles = " and ".join(loras[path].weights())
                problems.append(f"  {path}: {roles} of shapes {given}, have to be {shapes}")
        if problems:
            text = "\n".join(problems)
            raise ConversionError(f"The weights do not fit {self}, and nothing was loaded.\n{text}")
        for path, lora in loras.items():
            lora.load_spec(specs[path])

    def _specs_in(self, state: Mapping[str, Tensor], loras: Mapping[str, Delta[Any]]) -> dict[str, DeltaSpec]:
        if all(lora.weights().keys() == {"down", "up"} for lora in loras.values()):
            pairs = pair_weights(state)
            return {
                path: DeltaSpec("lora", {"down": down, "up": up}, alpha, path in loras and loras[path].rank_stabilized)
                for path, (down, up, alpha) in pairs.items()
            }
        specs: dict[str, DeltaSpec] = {}
        left = dict(state)
        for path, lora in loras.items():
            names = {role: f"{path}.{_NAMES.get(role, role)}" for role in lora.weights()}
            tensors = {role: left.pop(name) for role, name in names.items() if name in left}
            alpha = left.pop(f"{path}.alpha", None)
            if tensors:
                strength = (None if alpha is None else float(alpha), lora.rank_stabilized, lora.rank)
                specs[path] = DeltaSpec(lora.method, tensors, *strength)
        return specs | {name: DeltaSpec("", {}) for name in left}

    def by_path(self) -> dict[str, Delta[Any]]:
        """The LoRAs by the path that their layers have in the base, in the order of the tree.

        Raises:
            AdapterError: (a ValueError) Some layers are no longer in the model.
        """
        loras = {id(adapter.target): lora for adapter, lora in self._held}
        paths = paths_of(self.root, [adapter.target for adapter, _ in self._held])
        if len(paths) < len(loras):
            lost = f"{len(loras) - len(paths)} layers of {self}"
            raise AdapterError(f"{lost} are no longer in {cast(Any, self.root)}.")
        return {path: loras[id(layer)] for path, layer in paths.items()}


# What the roles of specs are called in a state.
_NAMES = {"down": "down.weight", "up": "up.weight", "up_bias": "up.bias"}


class _Scales(MutableMapping[str, float]):
    """The scales of a set by path. It has the paths of the set, no more and no fewer."""

    def __init__(self, loras: Mapping[str, Delta[Any]]) -> None:
        self._loras = loras

    def __getitem__(self, path: str) -> float:
        return self._at(path).scale

    def __setitem__(self, path: str, value: float) -> None:
        self._at(path).scale = value

    def __delitem__(self, path: str) -> None:
        raise AdapterError(f"Each layer has a scale. To switch {path} off, set it to 0.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._loras)

    def __len__(self) -> int:
        return len(self._loras)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _at(self, path: str) -> Delta[Any]:
        if path not in self._loras:
            raise LoraNameError(f"{path!r} is no layer of this set{nearest(path, self._loras)}.")
        return self._loras[path]


def _check_alone(adapter: LoraAdapter, lora: Delta[Any]) -> None:
    """Whether nothing else makes use of the layer: neither between it and its LoRAs, nor in another place."""
    target = adapter.target
    if adapter[0] is not target:
        raise AdapterError(f"{adapter[0]} stands between {target} and its LoRAs, and needs the weights as they are")
    for holder in holders_of(target):
        if isinstance(holder, Adapter) and not holder.is_injected:
            continue  # one that was ejected, or not yet injected
        # Twins and structural copies of the adapter share the switch, so they know that it is merged.
        if not isinstance(holder, LoraAdapter) or all(other.switch is not lora.switch for other in holder.lora_layers):
            raise AdapterError(f"{target} stands in other places too, where it has no such LoRA")


@all_or_nothing
def fuse(model: nn.Module) -> int:
    """Run the LoRAs that stand on one layer as one pair of products, of the sum of their ranks; see `fused`.

    Outputs are the same up to rounding. LoRAs that come to these layers later join in. What cannot be fused runs as
    before: other methods, LoRAs with a bias, and those of an Embedding or of a convolution with groups.

    Returns:
        How many layers have fused LoRAs now.

    Raises:
        AdapterError: (a ValueError) No layer of the model has any that can be fused.
    """
    found = [module for module in model.modules() if isinstance(module, LoraAdapter) and module.is_injected]
    adapters = {id(adapter.original): adapter.original for adapter in found}.values()
    for adapter in adapters:
        adapter.fuse()
    count = sum(any(isinstance(module, FusedLoras) for module in adapter) for adapter in adapters)
    if not count:
        raise AdapterError(
            f"{type(model).__name__} has no LoRAs that can be fused: inject some first, or unfuse the structural "
            "copy in which they are."
        )
    return count


@all_or_nothing
def unfuse(model: nn.Module) -> None:
    """Run each LoRA by itself again."""
    for adapter in [module for module in model.modules() if isinstance(module, LoraAdapter)]:
        adapter.unfuse()
