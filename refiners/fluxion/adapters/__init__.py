"""Adapters that suit any tree."""

from refiners.fluxion.adapters.adapter import Adapter, lookup_top_adapter
from refiners.fluxion.adapters.checkpointing import CheckpointAdapter, CheckpointSet, inject_checkpoints
from refiners.fluxion.adapters.ia3 import IA3Adapter, inject_ia3
from refiners.fluxion.adapters.lora import (
    Conv2dLora,
    Delta,
    DeltaSpec,
    FusedLoras,
    LinearLora,
    Lora,
    LoraAdapter,
    LoraSet,
    assign_samples,
    auto_attach_loras,
    combine,
    fuse,
    inject_loras,
    unfuse,
)
from refiners.fluxion.adapters.sets import AdapterSet
from refiners.fluxion.adapters.training import Training, trainable
from refiners.fluxion.adapters.tuning import (
    BiasTuningAdapter,
    NormTuningAdapter,
    inject_bias_tuning,
    inject_norm_tuning,
)
from refiners.fluxion.adapters.weights import (
    adapter_state_dict,
    base_state_dict,
    load_adapter_state_dict,
    load_base_state_dict,
)

__all__ = [
    "Adapter",
    "AdapterSet",
    "BiasTuningAdapter",
    "CheckpointAdapter",
    "CheckpointSet",
    "Conv2dLora",
    "Delta",
    "DeltaSpec",
    "FusedLoras",
    "IA3Adapter",
    "LinearLora",
    "Lora",
    "LoraAdapter",
    "LoraSet",
    "NormTuningAdapter",
    "Training",
    "adapter_state_dict",
    "assign_samples",
    "auto_attach_loras",
    "base_state_dict",
    "combine",
    "fuse",
    "inject_bias_tuning",
    "inject_checkpoints",
    "inject_ia3",
    "inject_loras",
    "inject_norm_tuning",
    "load_adapter_state_dict",
    "load_base_state_dict",
    "lookup_top_adapter",
    "trainable",
    "unfuse",
]
