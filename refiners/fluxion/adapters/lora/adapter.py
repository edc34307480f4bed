"""A layer and its LoRAs, in the place of the layer."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from refiners.errors import AdapterTypeError, LoraNameError
from refiners.fluxion.adapters.lora.delta import Delta
from refiners.fluxion.adapters.lora.fused import FusedLoras, fuse_loras, unfuse_loras
from refiners.fluxion.adapters.lora.merge import unmerge_delta
from refiners.fluxion.adapters.lora.samples import run_samples, samples_of
from refiners.fluxion.adapters.merging import merge_of
from refiners.fluxion.layers.adapter import Adapter
from refiners.fluxion.layers.branch import holders_of
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.combinators import Sum
from refiners.fluxion.layers.failure import chain_error
from refiners.fluxion.layers.journal import all_or_nothing, note_undo
from refiners.fluxion.layers.linear import Linear
from refiners.fluxion.layers.module import ContextModule
from refiners.fluxion.layers.observation import PASS_THROUGH, calls_are_observed

# What computes a tensor that nobody else holds.
_PLAIN_LINEAR = (nn.Linear.forward, Linear.forward)


class LoraAdapter(Sum, Adapter[nn.Module]):
    """A layer and its LoRAs: the output of the layer, plus what each LoRA adds to it, one after the other.

    A LoRA whose scale is 0 takes no part: the output is that of the layer to the last bit, whatever its weights are.

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
    # Whether LoRAs that can be run as one pair of products are; see `fused`.
    is_fused = False
    # Whether samples may have LoRAs of their own, see `samples`: then each call asks the context.
    may_have_samples = False

    def __init__(self, target: nn.Module, /, *loras: Delta[Any]) -> None:
        for i, lora in enumerate(loras):
            _check_fits(lora, target, [other.name for other in loras[:i]])
        with self.setup_adapter(target):
            super().__init__(target, *loras)

    def forward(self, *args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._forward_traced(*args)
        if self.may_have_samples and (samples := samples_of(self)) is not None:
            return run_samples(self, samples, args)
        provider = self._provider
        outer = provider.enter() if provider is not None else None
        direct = self._children_are_plain and not calls_are_observed()
        total: Any = None
        dtype: Any = None
        inputs: tuple[Any, ...] = args
        direct_layer: Any = None
        layer: Any = None
        layers: tuple[Any, ...] = tuple(self.__dict__["_modules"].values())
        if type(layers[-1]) is FusedLoras and layers[-1].is_live and layers[1:-1] == layers[-1].loras:
            layers = layers[:1] + layers[-1:]  # the others run in the last one
        try:
            for layer in layers:
                is_delta = isinstance(layer, Delta)
                if is_delta and not (layer.scaling and (layer.switch.is_on or self._runs_alone(layer))):
                    continue
                if (
                    direct
                    and not layer._forward_hooks
                    and not layer._forward_pre_hooks
                    and not layer._backward_hooks
                    and not layer._backward_pre_hooks
                    and layer._compiled_call_impl is None
                ):
                    call = layer.forward
                else:
                    call = layer
                if is_delta:
                    # Converted after the layer has run and once for all LoRAs of a dtype, since gradients add up in
                    # the reverse order of the operations.
                    inputs = layer.inputs_from(inputs)
                    total = self._add(total, layer, call, inputs)
                elif type(layer) is FusedLoras:
                    # What a plain Linear has just computed, and no hook has seen, may be overwritten.
                    is_new = direct_layer is not None and cast(Any, type(direct_layer)).forward in _PLAIN_LINEAR
                    total = call(args[0], total, is_new)
                else:
                    output = call(*args)
                    total = output if total is None and type(output) is Tensor else self._fold(total, output)
                    output = None  # or it would live for as long as this runs
                    if dtype is None:
                        dtype = total.dtype
                    direct_layer = layer if call is not layer else None
            layer = None
            return total if total.dtype == dtype else total.to(dtype)
        except PASS_THROUGH:
            raise
        except Exception as error:
            if torch.compiler.is_compiling():
                raise
            raise chain_error(self, layer, inputs, error) from error
        finally:
            if provider is not None:
                provider.leave(outer)

    def _run_traced(self, args: tuple[Any, ...]) -> Any:
        if self.may_have_samples and (samples := samples_of(self)) is not None:
            return run_samples(self, samples, args)
        total: Any = None
        dtype: Any = None
        inputs = args
        for layer in self.__dict__["_modules"].values():
            if isinstance(layer, Delta):
                if not (layer.switch.is_on or self._runs_alone(layer)):
                    continue
                inputs = layer.inputs_from(inputs)
                changed = self._add(total, cast(Any, layer), layer, inputs)
                # A number that decides what runs would be compiled anew whenever it is set.
                total = torch.where(layer.is_active, changed, total)
            elif isinstance(layer, FusedLoras):
                total = layer(args[0], total)
            else:
                total = self._fold(total, layer(*args))
                dtype = dtype or total.dtype
        return total if total.dtype == dtype else total.to(dtype)

    def _runs_alone(self, delta: Any) -> bool:
        """Whether a LoRA that is fused is not fused here, but in a structural copy of this adapter."""
        switch = delta.switch
        if not switch.enabled or switch.merged or not switch.fused:
            return False
        for module in reversed(self.__dict__["_modules"].values()):
            if type(module) is not FusedLoras:
                break  # what is fused stands behind all else
            if module.has(delta):
                return False
        return True

    def add(self, total: Tensor, delta: Delta[Any], inputs: tuple[Any, ...]) -> Tensor:
        """Add what one LoRA makes of inputs to what is there so far."""
        return self._add(total, delta, delta, delta.inputs_from(inputs))

    def _add(self, total: Tensor, delta: Delta[Any], call: Any, inputs: tuple[Any, ...]) -> Tensor:
        if not delta.rewrites_output:
            return total + call(*inputs)
        target = cast(Any, self.target)
        merge = merge_of(target)
        weight = target.weight if merge is None else merge.parameters["weight"]
        return call(*inputs, total, weight, self._bias())

    def _bias(self) -> Tensor | None:
        """The bias that is in the output: that of the layer, or of what tunes the layer, which stands next to it."""
        inner: Any = self[0]
        while isinstance(inner, LoraAdapter):
            inner = inner[0]
        bias_in_use = None if inner is self.target else getattr(inner, "bias_in_use", None)
        return bias_in_use() if bias_in_use is not None else cast(Any, getattr(self.target, "bias", None))

    @property
    def lora_layers(self) -> Iterator[Delta[Any]]:
        """The LoRAs of the layer, in the order in which they are added."""
        # Children only: another adapter of LoRAs may stand inside, around the same layer.
        # No cast of each: torch.compile does not know `Delta[Any]`.
        deltas: list[Any] = [module for module in self.__dict__["_modules"].values() if isinstance(module, Delta)]
        return iter(deltas)

    def has_others_than(self, lora: Delta[Any]) -> bool:
        """Whether it holds other LoRAs beside one, or instead of it."""
        return any(module is not lora and isinstance(module, Delta) for module in self.__dict__["_modules"].values())

    @property
    def names(self) -> list[str]:
        """The names of the LoRAs."""
        return [lora.name for lora in self.lora_layers]

    @property
    def loras(self) -> dict[str, Delta[Any]]:
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

    @all_or_nothing
    def add_lora(self, lora: Delta[Any], /) -> None:
        """Add a LoRA behind the others.

        Raises:
            LoraNameError: (an AssertionError) There is one of that name.
            AdapterTypeError: (a TypeError) The LoRA does not fit the layer.
        """
        _check_fits(lora, self.target, self.names)
        with self._taken_apart():
            self.append(lora)
            for twin in self.copies:
                twin.append(lora.structural_copy())

    @all_or_nothing
    def remove_lora(self, name: str, /) -> Delta[Any] | None:
        """Take the LoRA of that name out, and return it; None if there is none."""
        lora = self.loras.get(name)
        if lora is None:
            return None
        with self._taken_apart():
            unmerge_delta(self.target, lora)
            for adapter in (self, *self.copies):
                adapter.remove(adapter.loras[name])
        return lora

    @all_or_nothing
    def fuse(self) -> None:
        """Run those LoRAs that can be as one pair of products, from now on; see `FusedLoras`."""
        adapter = self.original
        with adapter._taken_apart():
            _set_fused(adapter, value=True)

    @all_or_nothing
    def unfuse(self) -> None:
        """Run each LoRA by itself again."""
        adapter = self.original
        with adapter._taken_apart():
            _set_fused(adapter, value=False)

    def refuse(self) -> None:
        """Fuse anew, if this adapter is fused: what may be fused has changed."""
        if self.is_fused:
            self.fuse()

    @contextmanager
    def _taken_apart(self) -> Generator[None]:
        """Change the LoRAs inside of this and of a transaction: they are fused again afterwards, if they were."""
        for fused in [module for module in self if isinstance(module, FusedLoras)]:
            unfuse_loras(fused)
            for adapter in (self, *self.copies):
                adapter.remove(fused)
        yield
        if self.is_fused:
            for fused in fuse_loras(cast(Any, self.lora_layers)):
                for adapter in (self, *self.copies):
                    adapter.append(fused)

    def eject(self) -> None:
        """Put the layer back, with the weights it had; see `Adapter.eject`."""
        if self.is_injected:
            if self.is_fused:
                with self._taken_apart():
                    _set_fused(self, value=False)
            for lora in self.__dict__["_modules"].values():
                if isinstance(lora, Delta) and lora.switch.merged:
                    unmerge_delta(self.target, cast("Delta[Any]", lora))
        super().eject()

    def _outermost(self, target: nn.Module) -> nn.Module:
        first, *others = self.__dict__["_modules"].values()
        for other in others:
            if not isinstance(other, Delta | FusedLoras):
                first = None
        # As a rule nothing has to be searched.
        return target if first is target else super()._outermost(target)

    @property
    def copies(self) -> "tuple[LoraAdapter, ...]":
        """The same adapter in the other places of a layer that the tree holds several times."""
        return cast("tuple[LoraAdapter, ...]", self._twins)

    @property
    def original(self) -> "LoraAdapter":
        """The adapter that this one is a copy of, where a layer stands in several places; else this one."""
        for holder in holders_of(self.target):
            above: Any = holder
            # Other adapters may stand between the two.
            while isinstance(above, Adapter):
                if isinstance(above, LoraAdapter) and any(copied is self for copied in above.copies):
                    return above
                above = cast(Chain, above).parent
        return self


def _set_fused(adapter: LoraAdapter, value: bool) -> None:
    before = adapter.is_fused
    if before == value:
        return
    note_undo(lambda: _mark(adapter, before))
    _mark(adapter, value)


def _mark(adapter: LoraAdapter, is_fused: bool) -> None:
    # The class says what is so as a rule.
    adapter.__dict__.pop("is_fused", None)
    if is_fused:
        adapter.is_fused = True


def _check_fits(lora: Delta[Any], target: nn.Module, names: list[str]) -> None:
    if lora.name in names:
        raise LoraNameError(
            f"{type(target).__name__} has a LoRA called {lora.name!r} already: remove it, or choose another name."
        )
    # What a Chain in the place of a layer makes of its input is not known.
    if not isinstance(target, ContextModule):
        if not lora.is_compatible(target):
            raise AdapterTypeError(f"{lora} does not fit {target}.")
        lora.fit(target)
    elif lora.rewrites_output:
        raise AdapterTypeError(f"{lora} needs the weight of its layer, and {target} stands in the layer's place.")
