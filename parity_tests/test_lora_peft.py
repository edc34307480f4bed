"""LoRA beside peft's: outputs and all gradients of trees with injected LoRAs, in every lane.

Each case is an upstream model into which peft 0.21.2 has injected its unmerged LoRA layers, and the port into which
`inject_loras` has injected ours. All weights are drawn by the engine, so no LoRA is zero, and the weights of the base
train too.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from parity_tests.cases import bert, clip
from refiners.conversion import KeyMap
from refiners.fluxion.adapters import LoraAdapter, base_state_dict, inject_loras
from refiners.fluxion.selectors import select
from refiners.parity import Case, CaseRunner, Conversion, Lane, Verdict

LINEAR_LAYERS = ["query", "key", "value", "dense", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One LoRA on every selected layer."""

    name: str = "default"
    rank: int = 4
    alpha: float = 4
    scale: float = 1.0


def peft_layers(model: nn.Module) -> Iterable[LoraLayer]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def with_peft(model: nn.Module, specs: Sequence[Spec], targets: list[str], dtype: torch.dtype | None) -> nn.Module:
    """Inject peft's layers into an upstream model, one adapter after the other, all of them active."""
    for spec in specs:
        config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, lora_dropout=0.0, target_modules=targets)
        inject_adapter_in_model(config, model, adapter_name=spec.name)
    for layer in peft_layers(model):
        layer.set_adapter([spec.name for spec in specs])
        for spec in specs:
            layer.set_scale(spec.name, spec.scale)
            if dtype is not None:
                layer.lora_A[spec.name].to(dtype)
                layer.lora_B[spec.name].to(dtype)
    return model.requires_grad_()


def with_ours(model: fl.Chain, specs: Sequence[Spec], dtype: torch.dtype | None) -> fl.Chain:
    """Inject ours into the port. The alpha is given, and the scale is set afterwards, as a user would."""
    for spec in specs:
        layers = select(model).of(nn.Linear, nn.Conv2d)
        loras = inject_loras(layers, name=spec.name, rank=spec.rank, alpha=spec.alpha, dtype=dtype)
        loras.scale = spec.scale
    return model


@dataclass
class LoraKeys:
    """The keys of peft's models, given the key map of the model without LoRAs."""

    base: Conversion
    # peft's key of each key of the port, known once a model was converted.
    peft_keys: dict[str, str] = field(default_factory=dict)

    def convert(self, state_dict: Mapping[str, Tensor], target: nn.Module, /) -> Mapping[str, Tensor]:
        bases = {without_base_layer(key): key for key in state_dict if ".lora_" not in key}
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
            for name, lora in adapter.loras.items():
                for side, module in (("A", lora.down), ("B", lora.up)):
                    key = f"{path}.{adapter.key_of(lora)}.{lora.key_of(module)}.weight"
                    self.peft_keys[key] = f"{layer}.lora_{side}.{name}.weight"
                    weights[key] = state_dict[self.peft_keys[key]]
        left = state_dict.keys() - self.peft_keys.values()
        assert not left, f"no place in the port for {sorted(left)}"
        return weights

    def invert(self, state_dict: Mapping[str, Tensor], source: Mapping[str, Tensor], /) -> Mapping[str, Tensor]:
        return {self.peft_keys[key]: tensor for key, tensor in state_dict.items()}


def without_base_layer(key: str) -> str:
    return key.replace(".base_layer.", ".")


def named_adapters(model: nn.Module) -> Iterable[tuple[str, LoraAdapter]]:
    adapters = select(model).of(LoraAdapter)
    return zip(adapters.paths, adapters, strict=True)


def with_loras(
    case: Case, name: str, *specs: Spec, targets: list[str] = LINEAR_LAYERS, dtype: torch.dtype | None = None
) -> Case:
    """The same case with LoRAs on both sides."""
    keys = {key.replace(".bias", ".base_layer.bias"): reason for key, reason in case.without_influence.items()}
    keys |= {f"*.lora_{side}.{spec.name}.weight": "its scale is 0" for spec in specs if not spec.scale for side in "AB"}
    return replace(
        case,
        id=f"lora/{case.id.replace('/', '-')}.{name}",
        upstream=lambda: with_peft(case.upstream(), specs, targets, dtype),
        port=lambda: with_ours(as_chain(case.port()), specs, dtype),
        key_map=LoraKeys(case.key_map),
        without_influence=keys,
        full_size={},
    )


def as_chain(model: nn.Module) -> fl.Chain:
    assert isinstance(model, fl.Chain)
    return model


class Layers(nn.Module):
    """Every geometry of a Conv2d that peft computes, and Linear with and without bias."""

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
    run_upstream=lambda model, inputs: {"y": model(inputs["x"])},
    run_port=lambda model, inputs: {"y": model(inputs["x"])},
)
STACKED = (Spec(name="a", rank=4, alpha=3, scale=0.7), Spec(name="b", rank=8, alpha=20, scale=-1.3))
CLIP = {case.id: case for case in clip.CASES}

CASES = (
    with_loras(LAYERS, "alpha-is-rank", Spec(), targets=NAMES),
    with_loras(LAYERS, "alpha", Spec(rank=4, alpha=7), targets=NAMES),
    with_loras(LAYERS, "alpha-and-scale", Spec(rank=12, alpha=5, scale=0.3), targets=NAMES),
    with_loras(LAYERS, "stacked", *STACKED, targets=NAMES),
    with_loras(LAYERS, "scale-0", Spec(name="a", scale=0.0), Spec(name="b"), targets=NAMES),
    # peft's own default for models in half precision: its weights are kept in float32.
    replace(
        with_loras(LAYERS, "float32-weights", *STACKED, targets=NAMES, dtype=torch.float32),
        lanes=("bfloat16", "float16"),
    ),
    with_loras(bert.TINY_CASE, "one", Spec(alpha=6)),
    with_loras(bert.TINY_CASE, "stacked", *STACKED),
    replace(
        with_loras(bert.TINY_CASE, "float32-weights", *STACKED, dtype=torch.float32), lanes=("bfloat16", "float16")
    ),
    with_loras(CLIP["clip/text-l"], "stacked", *STACKED),
    with_loras(CLIP["clip/image-no-projection"], "stacked", *STACKED, targets=[*LINEAR_LAYERS, "patch_embedding"]),
)


@pytest.mark.parametrize(
    ("case", "lane"),
    [pytest.param(case, lane, id=f"{case.id}[{lane}]") for case in CASES for lane in case.lanes],
)
def test_outputs_and_gradients_are_those_of_peft(case: Case, lane: str) -> None:
    result = CaseRunner(case).run(Lane(lane))
    assert result.verdict is Verdict.BITWISE, (result.reason, result.worst, result.traceback)


def lose_alpha(model: fl.Chain) -> None:
    for multiply in model.layers(fl.Multiply):
        multiply.scale = 1.0


def swap_the_order(model: fl.Chain) -> None:
    for adapter in list(model.layers(LoraAdapter)):
        first = next(adapter.lora_layers)
        adapter.remove(first)
        adapter.append(first)


@pytest.mark.parametrize("fault", [lose_alpha, swap_the_order])
@pytest.mark.parametrize("case", [case for case in CASES if case.id.endswith("stacked")], ids=lambda case: case.id)
def test_a_planted_fault_is_found(case: Case, fault: Callable[[fl.Chain], None]) -> None:
    def run_faulty(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
        fault(as_chain(model))
        return case.run_port(model, inputs)

    faulty = replace(case, run_port=run_faulty)
    assert CaseRunner(faulty).run(Lane("float32")).verdict is not Verdict.BITWISE
