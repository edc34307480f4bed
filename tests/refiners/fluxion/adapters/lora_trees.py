"""A small tree of convolutions and linear layers, and sets of LoRAs for it that are no longer new."""

from typing import Any

import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.fluxion.adapters import DeltaSpec, LoraSet, inject_loras
from refiners.fluxion.selectors import select
from refiners.parity.rounding import agrees_in_float64, relative_error, typical_magnitude

X = torch.randn(4, 3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def model() -> fl.Chain:
    return fl.Chain(
        fl.Conv2d(3, 6, kernel_size=3, padding=1),
        fl.Permute(0, 2, 3, 1),
        fl.Residual(fl.Linear(6, 6), fl.ReLU(), fl.Linear(6, 6, bias=False)),
        fl.Linear(6, 4),
    ).to(dtype=torch.float64)


def trained(tree: nn.Module, name: str, rank: int = 2, **settings: Any) -> LoraSet:
    loras = inject_loras(select(tree).of(fl.Linear, fl.Conv2d), name=name, rank=rank, alpha=3, **settings)
    for parameter in loras.parameters():
        nn.init.normal_(parameter, std=0.5)
    return loras


def is_close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors in float64 are the same up to rounding."""
    return agrees_in_float64(relative_error(a, b, typical_magnitude(b, gradient=True)))


def copied(loras: LoraSet) -> dict[str, DeltaSpec]:
    return {
        path: DeltaSpec(spec.method, {role: tensor.clone() for role, tensor in spec.tensors.items()}, spec.alpha)
        for path, spec in loras.specs().items()
    }


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().numpy().tobytes()


def memory(tree: nn.Module) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tree.state_dict().values()}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
