"""Other LoRAs for each sample of a batch.

    with assign_samples(model, ["style", None, ("style", "other")]):
        model(x)                            # x has three samples; the second is for the base alone

As in peft 0.21.2 (`adapter_names`), the layer runs once for the whole batch, and each LoRA for the samples that have
it. Samples of the same LoRAs are computed together, with the operations they would have in a batch of their own.

A sample is a row of the first axis of what a layer receives. A layer that receives one row for the whole batch, as
those that see a time step of all samples, cannot tell the samples apart, and that is an error.

The assignment is a context of the model, so it reaches layers as all contexts do: two threads or asyncio tasks that run
one model with other assignments open a `context_scope()` each, and what runs again in the backward pass, as a
checkpoint, has the assignment of the forward. Adapters that never had one do not ask.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refiners.errors import AdapterError, InputError, LoraNameError
from refiners.fluxion.context import find_context

if TYPE_CHECKING:
    from refiners.fluxion.adapters.lora.adapter import LoraAdapter
    from refiners.fluxion.layers.chain import Chain

CONTEXT, KEY = "lora", "samples"

# The LoRAs of one sample: none, one, or several by name.
Names = str | Iterable[str] | None


@contextmanager
def assign_samples(model: nn.Module, samples: Sequence[Names]) -> Generator[None]:
    """As long as this is open, each sample of a batch has LoRAs of its own.

    Args:
        model: Where the LoRAs are. All threads that run it see the assignment, unless a `context_scope()` is open.
        samples: For each sample the name of its LoRAs, several names, or None for the base alone.

    Raises:
        LoraNameError: (a KeyError) No LoRA of the model has such a name.
        AdapterError: (a ValueError) LoRAs are merged, so that no sample can be without; or samples are assigned
            already.
        InputError: (a ValueError) A layer is called with another number of rows than there are samples.
    """
    from refiners.fluxion.adapters.lora.adapter import LoraAdapter

    adapters = [module for module in model.modules() if isinstance(module, LoraAdapter)]
    plan = tuple(_names(names) for names in samples)
    known = {name for adapter in adapters for name in adapter.names}
    unknown = sorted(frozenset[str]().union(*plan) - known)
    if unknown:
        raise LoraNameError(f"No LoRA of the model is called {' or '.join(map(repr, unknown))}, only {sorted(known)}.")
    if any(lora.switch.merged for adapter in adapters for lora in adapter.lora_layers):
        raise AdapterError("Some LoRAs are merged into the weights, which all samples share: unmerge them first.")
    if any(samples_of(adapter) is not None for adapter in adapters):
        raise AdapterError(
            "The samples of this model have LoRAs of their own already: leave that assignment first, or open a "
            "context_scope() of the model for each thread."
        )
    providers = [top.provider for top in _tops(model, adapters)]
    for adapter in adapters:
        adapter.may_have_samples = True
    for provider in providers:
        provider.set_context(CONTEXT, {KEY: plan})
    try:
        yield
    finally:
        for provider in providers:
            provider.remove_context(CONTEXT)


def _tops(model: nn.Module, adapters: "list[LoraAdapter]") -> "list[Chain]":
    """The topmost Chains below a model, or the model itself, that hold the adapters."""
    below = {id(module) for module in model.modules()}
    tops: dict[int, Chain] = {}
    for adapter in adapters:
        top = next(chain for chain in reversed([adapter, *adapter.get_parents()]) if id(chain) in below)
        tops[id(top)] = top
    return list(tops.values())


def samples_of(adapter: "LoraAdapter") -> tuple[frozenset[str], ...] | None:
    """For each sample of a batch the names of its LoRAs; None: all LoRAs for all samples."""
    context = find_context(adapter, CONTEXT)
    return None if context is None else context.get(KEY)


def _names(names: Names) -> frozenset[str]:
    if names is None:
        return frozenset()
    return frozenset([names] if isinstance(names, str) else names)


def run_samples(adapter: "LoraAdapter", samples: tuple[frozenset[str], ...], args: tuple[Any, ...]) -> Tensor:
    """The output of a layer and of those LoRAs that each sample has."""
    output: Tensor = adapter[0](*args)
    if len(output) != len(samples) or len(args[0]) != len(samples):
        raise InputError(
            f"{adapter.get_path()} receives {len(args[0])} rows, and {len(samples)} samples have LoRAs of their own. "
            "Give each sample a row there, or leave LoRAs off that layer."
        )
    active = [lora for lora in adapter.lora_layers if lora.switch.enabled and lora.scaling]
    present = frozenset(lora.name for lora in active)
    groups: dict[frozenset[str], list[int]] = {}
    for i, names in enumerate(samples):
        if names & present:
            groups.setdefault(names & present, []).append(i)
    result = output
    for names, rows in groups.items():
        index = torch.tensor(rows, device=output.device)
        inputs = (args[0][index], *args[1:])
        total = output[index]
        for lora in active:
            if lora.name in names:
                total = adapter.add(total, lora, inputs)
        result = result.index_copy(0, index, total.to(output.dtype))
    return result
