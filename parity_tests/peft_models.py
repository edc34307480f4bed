"""Upstream models with peft's adapters beside ports with ours: what the cases of `cases.lora` are made of."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from parity_tests.peft_layers import KEYS, Row
from refiners.conversion import KeyMap
from refiners.fluxion.adapters import LoraAdapter, base_state_dict, fuse
from refiners.fluxion.adapters.lora import Delta
from refiners.fluxion.adapters.lora.attach import attach
from refiners.fluxion.selectors import select
from refiners.parity import Case, Conversion

LINEAR_LAYERS = ["query", "key", "value", "dense", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
EMBEDDINGS = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
# What our methods call options of peft's.
OPTIONS = {"use_rslora": "rank_stabilized", "lora_bias": "bias", "use_effective_conv2d": "tucker"}
OPTIONS |= {"decompose_both": "decompose_both", "decompose_factor": "factor"}


@dataclass(frozen=True)
class Spec(Row):
    """One adapter on every selected layer, see `Row`; all of one model are of one method."""

    method: str = "lora"
    name: str = "default"


def with_peft(model: nn.Module, specs: Sequence[Spec], targets: list[str], dtype: torch.dtype | None) -> nn.Module:
    """Inject peft's layers into an upstream model, one adapter after the other, all of them active."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of grouped convolutions and biases, which cannot be merged
        for spec in specs:
            config = spec.config()
            config.target_modules = targets
            inject_adapter_in_model(config, model, adapter_name=spec.name)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.set_adapter([spec.name for spec in specs])
        for spec in specs:
            layer.set_scale(spec.name, spec.scale)
            if dtype is not None:
                layer.lora_A[spec.name].to(dtype)
                layer.lora_B[spec.name].to(dtype)
    return model.requires_grad_()


def with_ours(model: fl.Chain, specs: Sequence[Spec], targets: list[str], dtype: torch.dtype | None) -> fl.Chain:
    """Inject ours into the port. The alpha is given, and the scale is set afterwards, as a user would."""
    kinds = [nn.Linear, nn.Conv1d, nn.Conv2d, *([nn.Embedding] if EMBEDDINGS[0] in targets else [])]
    for spec in specs:
        settings = {OPTIONS[name]: value for name, value in spec.options.items()}
        for layer, parent in select(model).of(*kinds).outside(Delta).pairs:
            kind = Delta.of_method(spec.method)
            delta = kind.for_target(spec.name, layer, rank=spec.rank, alpha=spec.alpha, dtype=dtype, **settings)
            attach(delta, layer, parent)
            delta.scale = spec.scale
    return model


@dataclass
class LoraKeys:
    """The keys of peft's models, given the key map of the model without adapters."""

    base: Conversion
    # peft's key of each key of the port, known once a model was converted.
    peft_keys: dict[str, str] = field(default_factory=dict)

    def convert(self, state_dict: Mapping[str, Tensor], target: nn.Module, /) -> Mapping[str, Tensor]:
        bases = {key.replace(".base_layer.", "."): key for key in state_dict if not is_of_adapter(key)}
        base = base_state_dict(target, keep_vars=True)
        converted = self.base.convert({key: state_dict[of_peft] for key, of_peft in bases.items()}, base)
        actual = {id(tensor): key for key, tensor in target.state_dict(keep_vars=True).items()}
        # A renamed tensor keeps its storage, which tells what it was called.
        owners = {state_dict[key].data_ptr(): key for key in bases.values()}
        weights: dict[str, Tensor] = {}
        for key, tensor in converted.items():
            weights[actual[id(base[key])]] = tensor
            self.peft_keys[actual[id(base[key])]] = owners[tensor.data_ptr()]
        for path, adapter in named_adapters(target):
            layer = self.peft_keys[f"{path}.{adapter.key_of(adapter.target)}.weight"].removesuffix(".base_layer.weight")
            for name, delta in adapter.loras.items():
                for role, weight in delta.weights().items():
                    key = actual[id(weight.tensor)]
                    keys = [f"{layer}.{of_role.format(name)}" for of_role in KEYS[delta.method][role]]
                    self.peft_keys[key] = next(key for key in keys if key in state_dict)
                    weights[key] = state_dict[self.peft_keys[key]]
        left = state_dict.keys() - self.peft_keys.values()
        assert not left, f"no place in the port for {sorted(left)}"
        return weights

    def invert(self, state_dict: Mapping[str, Tensor], source: Mapping[str, Tensor], /) -> Mapping[str, Tensor]:
        return {self.peft_keys[key]: tensor for key, tensor in state_dict.items()}


def is_of_adapter(key: str) -> bool:
    """Whether peft gave a weight this key that is no weight of the model."""
    return any(mark in key for mark in (".lora_", ".hada_", ".lokr_"))


def named_adapters(model: nn.Module) -> Iterable[tuple[str, LoraAdapter]]:
    """The adapters of LoRAs with their paths."""
    adapters = select(model).of(LoraAdapter)
    return zip(adapters.paths, adapters, strict=True)


def with_loras(
    case: Case, name: str, *specs: Spec, targets: list[str] = LINEAR_LAYERS, dtype: torch.dtype | None = None
) -> Case:
    """The same case with adapters on both sides."""
    keys = {key.replace(".bias", ".base_layer.bias"): reason for key, reason in case.without_influence.items()}
    return replace(
        case,
        id=f"lora/{case.id.replace('/', '-')}.{name}",
        summary=f"{case.id}: {', '.join(spec.method for spec in specs)}, {name}",
        upstream=lambda: with_peft(case.upstream(), specs, targets, dtype),
        port=lambda: with_ours(as_chain(case.port()), specs, targets, dtype),
        key_map=LoraKeys(case.key_map),
        without_influence=keys,
        full_size={},
    )


def fused(case: Case, name: str) -> Case:
    """The same case, with the LoRAs of each layer of the port as one pair of products."""

    def run_port(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
        fuse(model)
        return case.run_port(model, inputs)

    return replace(case, id=f"{case.id}-{name}", summary=f"{case.summary}, {name}", run_port=run_port)


def as_chain(model: nn.Module) -> fl.Chain:
    """The model, which is a Chain."""
    assert isinstance(model, fl.Chain)
    return model


class Layers(nn.Module):
    """Every geometry of a Conv2d that peft computes, a Conv1d, and Linear with and without bias."""

    upstream_package = "peft"

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1)
        self.oblong = nn.Conv2d(8, 8, kernel_size=(1, 5), padding=(0, 2), bias=False)
        self.even = nn.Conv2d(8, 8, kernel_size=2, stride=(2, 1))
        self.grouped = nn.Conv2d(8, 12, kernel_size=3, padding="same", groups=4)
        self.pixels = nn.Conv2d(12, 6, kernel_size=1)
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.strided, self.oblong, self.even, self.grouped, self.pixels):
            x = torch.tanh(layer(x))
        return self.second(torch.tanh(self.first(x.flatten(2).transpose(1, 2))))


def layers_port() -> fl.Chain:
    def tanh() -> fl.Lambda:
        return fl.Lambda(torch.tanh)

    return fl.Chain(
        *(fl.Conv2d(3, 8, kernel_size=3, stride=2, padding=1), tanh()),
        *(fl.Conv2d(8, 8, kernel_size=(1, 5), padding=(0, 2), use_bias=False), tanh()),
        *(fl.Conv2d(8, 8, kernel_size=2, stride=(2, 1)), tanh()),
        *(fl.Conv2d(8, 12, kernel_size=3, padding="same", groups=4), tanh()),
        *(fl.Conv2d(12, 6, kernel_size=1), tanh()),
        *(fl.Flatten(2), fl.Transpose(1, 2)),
        *(fl.Linear(6, 10), tanh(), fl.Linear(10, 5, bias=False)),
    )


NAMES = ["strided", "oblong", "even", "grouped", "pixels", "first", "second"]
LAYERS = Case(
    id="layers",
    upstream=Layers,
    port=layers_port,
    key_map=KeyMap(
        {name: f"Conv2d_{i + 1}" for i, name in enumerate(NAMES[:5])} | {"first": "Linear_1", "second": "Linear_2"}
    ),
    inputs=lambda generator: {"x": torch.randn(2, 3, 12, 10, generator=generator)},
    batch_axis={"x": 0},
    without_cells={"padded": "pixels are not padded"},
    run_upstream=lambda model, inputs: {"y": model(inputs["x"])},
    run_port=lambda model, inputs: {"y": model(inputs["x"])},
)
