"""LoRAs of peft on upstream's models, to compare ours with."""

import warnings

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
"""Of every attention of a UNet, as diffusers calls them."""


def inject_peft_loras(model: nn.Module, count: int = 1, rank: int = 4) -> nn.Module:
    """Give every projection of attention some LoRAs, all of them active."""
    names = [f"style {i}" for i in range(count)]
    with warnings.catch_warnings():
        # That there are several is what is measured.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for name in names:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS)
            inject_adapter_in_model(config, model, adapter_name=name)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(names)
    return model.eval()


def remove_peft_loras(model: nn.Module) -> None:
    """Put the layers back that peft has wrapped."""
    for path, module in [*model.named_modules()]:
        if isinstance(module, LoraLayer):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config
