"""Adapters that suit any tree."""

from refiners.fluxion.adapters.adapter import Adapter, lookup_top_adapter
from refiners.fluxion.adapters.checkpointing import CheckpointAdapter, CheckpointSet, inject_checkpoints
from refiners.fluxion.adapters.lora import (
    Conv2dLora,
    LinearLora,
    Lora,
    LoraAdapter,
    LoraSet,
    auto_attach_loras,
    inject_loras,
)
from refiners.fluxion.adapters.weights import (
    adapter_state_dict,
    base_state_dict,
    load_adapter_state_dict,
    load_base_state_dict,
)

__all__ = [
    "Adapter",
    "CheckpointAdapter",
    "CheckpointSet",
    "Conv2dLora",
    "LinearLora",
    "Lora",
    "LoraAdapter",
    "LoraSet",
    "adapter_state_dict",
    "auto_attach_loras",
    "base_state_dict",
    "inject_checkpoints",
    "inject_loras",
    "load_adapter_state_dict",
    "load_base_state_dict",
    "lookup_top_adapter",
]
