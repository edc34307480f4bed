"""Sets of LoRAs beside peft's: merged, combined, for each sample of a batch, and fused.

Both sides share the memory of all weights. What peft computes in one way only is equal to the last bit; where our way
is another (merged or fused against peft's unmerged layers), the verifier's rule of ROUNDING decides.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraModel
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.fluxion.adapters import DeltaSpec, LoraSet, assign_samples, combine, fuse, inject_loras
from refiners.parity.rounding import ErrorPair, relative_error, typical_magnitude, why_not_rounding

NAMES = {
    "convolution": "Conv2d_1",
    "strided": "Conv2d_2",
    "pixels": "Conv2d_3",
    "first": "Linear_1",
    "second": "Linear_2",
}
ADAPTERS = {"a": (4, 3.0), "b": (4, 6.0), "c": (2, 1.0)}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Layers(nn.Module):
    """Convolutions and Linear, some without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, kernel_size=3, padding=1)
        self.strided = nn.Conv2d(8, 8, kernel_size=(1, 5), stride=(1, 2), bias=False)
        self.pixels = nn.Conv2d(8, 6, kernel_size=1)
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.convolution, self.strided, self.pixels):
            x = torch.tanh(layer(x))
        return self.second(torch.tanh(self.first(x.flatten(2).transpose(1, 2))))


def port() -> fl.Chain:
    def tanh() -> fl.Lambda:
        return fl.Lambda(torch.tanh)

    return fl.Chain(
        *(fl.Conv2d(3, 8, kernel_size=3, padding=1), tanh()),
        *(fl.Conv2d(8, 8, kernel_size=(1, 5), stride=(1, 2), use_bias=False), tanh()),
        *(fl.Conv2d(8, 6, kernel_size=1), tanh()),
        *(fl.Flatten(2), fl.Transpose(1, 2)),
        *(fl.Linear(6, 10), tanh(), fl.Linear(10, 7, bias=False)),
    )


@dataclass
class Pair:
    """Both sides, with the same weights and the same LoRAs."""

    peft: Any
    tree: fl.Chain
    sets: dict[str, LoraSet]
    x: Tensor

    def layer(self, name: str) -> Any:
        return getattr(self.peft.model, name)

    def weights(self) -> dict[str, Tensor]:
        """The weights and biases that our layers show now."""
        shown: dict[str, Tensor] = {}
        targets = {path: adapter.target for adapter, path in zip(self.sets["a"].adapters, NAMES.values(), strict=True)}
        for name, path in NAMES.items():
            shown |= {f"{name}.{key}": tensor.detach() for key, tensor in targets[path].named_parameters()}
        return shown


def pair(dtype: torch.dtype, names: tuple[str, ...] = ("a", "b", "c")) -> Pair:
    torch.manual_seed(0)
    upstream = Layers().to(dtype)
    tree = port().to(dtype=dtype)
    tree.load_state_dict(dict(zip(tree.state_dict(), upstream.state_dict().values(), strict=True)), assign=True)
    for i, name in enumerate(names):
        rank, alpha = ADAPTERS[name]
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(NAMES))
        if i == 0:
            model = LoraModel(upstream, {name: config}, name)
        else:
            model.peft_config[name] = config
            model.inject_adapter(model.model, name)
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    model.set_adapter(list(names))
    # peft freezes the base, and torch chooses the kernel of a product by whether the weight requires a gradient.
    model.to(dtype).requires_grad_()
    sets = {name: inject_loras(tree, specs_of(model, name), name=name) for name in names}
    for name, loras in sets.items():
        specs = specs_of(model, name)
        for path, lora in loras.by_path().items():
            for role, weight in lora.weights().items():
                # Where a matrix lies in memory can change the last bit of a product.
                weight.tensor.data = specs[path].tensors[role]
    return Pair(model.eval(), tree.eval(), sets, torch.randn(3, 3, 6, 9, dtype=torch.float64).to(dtype))


def specs_of(model: Any, name: str) -> dict[str, DeltaSpec]:
    """What peft holds, as specs for our tree."""
    specs: dict[str, DeltaSpec] = {}
    for upstream, path in NAMES.items():
        layer = getattr(model.model, upstream)
        tensors = {"down": layer.lora_A[name].weight.detach(), "up": layer.lora_B[name].weight.detach()}
        specs[path] = DeltaSpec("lora", tensors, alpha=layer.scaling[name] * len(tensors["down"]))
    return specs


def is_same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [("a",), ("b", "a"), ("a", "c", "b")], ids="-".join)
def test_merged_weights_are_those_of_peft_and_unmerged_ones_are_the_own_bits(
    dtype: torch.dtype, order: tuple[str, ...]
) -> None:
    both = pair(dtype)
    own = {name: tensor.clone() for name, tensor in both.weights().items()}
    for name in order:
        both.sets[name].merge()
    merged = both.weights()
    for name in order:
        both.sets[name].unmerge()
    assert all(is_same(tensor, own[name]) for name, tensor in both.weights().items())
    # peft writes into the weights, which both sides share.
    both.peft.merge_adapter(adapter_names=list(order))
    for name, tensor in merged.items():
        layer, _, key = name.partition(".")
        assert is_same(tensor, getattr(both.layer(layer).base_layer, key)), name


def run_unmerged(both: Pair) -> Tensor:
    with torch.no_grad():
        return both.peft.model(both.x)


def run_merged(both: Pair) -> Tensor:
    for loras in both.sets.values():
        loras.merge()
    with torch.no_grad():
        return both.tree(both.x)


def run_fused(both: Pair) -> Tensor:
    assert fuse(both.tree) == len(NAMES)
    with torch.no_grad():
        return both.tree(both.x)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("run", [run_merged, run_fused])
def test_merged_and_fused_sets_differ_from_unmerged_ones_by_rounding_only(run: Any, dtype: torch.dtype) -> None:
    both = pair(dtype)
    truth = truth_of(both)
    magnitude = typical_magnitude(truth, gradient=False)
    theirs, ours = (relative_error(output, truth, magnitude) for output in (run_unmerged(both), run(both)))
    assert not why_not_rounding([ErrorPair("y", theirs, ours)], [], dtype)


def truth_of(both: Pair) -> Tensor:
    """The output in float64, of the same rounded weights."""
    wide = pair(torch.float64)
    values: Mapping[str, Tensor] = both.peft.state_dict()
    wide.peft.load_state_dict({key: tensor.double() for key, tensor in values.items()})
    wide.x = both.x.double()
    return run_unmerged(wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerged_sets_are_bitwise_those_of_peft_and_so_is_the_base_without_them(dtype: torch.dtype) -> None:
    both = pair(dtype)
    with torch.no_grad():
        assert is_same(both.tree(both.x), run_unmerged(both))
        for loras in both.sets.values():
            loras.enabled = False
        both.peft.disable_adapter_layers()
        assert is_same(both.tree(both.x), run_unmerged(both))
        both.peft.enable_adapter_layers()
        both.peft.set_adapter("b")
        both.sets["b"].enabled = True
        assert is_same(both.tree(both.x), run_unmerged(both))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("how", "upstream", "names", "weights"),
    [
        ("concatenate", "cat", ["a", "c"], [0.7, -1.3]),
        ("concatenate", "cat", ["a", "b", "c"], [0.3, 0.5, 2.0]),
        ("linear", "linear", ["a", "b"], [0.7, -1.3]),
        ("svd", "svd", ["a", "c"], [0.7, -1.3]),
    ],
)
def test_combined_sets_are_those_of_peft(
    how: Any, upstream: Any, names: list[str], weights: list[float], dtype: torch.dtype
) -> None:
    if how == "svd" and dtype in (torch.bfloat16, torch.float16):
        return  # torch has no decomposition in half precision, so peft fails
    both = pair(dtype)
    options = {"svd_full_matrices": False, "svd_rank": 3} if how == "svd" else {}
    both.peft.add_weighted_adapter(names, weights, "sum", combination_type=upstream, **options)
    specs = combine(*(both.sets[name].specs() for name in names), weights=weights, how=how, rank=3 if options else None)
    for name, path in NAMES.items():
        layer, tensors = both.layer(name), specs[path].tensors
        assert layer.scaling["sum"] == 1.0
        assert is_same(tensors["down"], layer.lora_A["sum"].weight), name
        assert is_same(tensors["up"], layer.lora_B["sum"].weight), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_with_loras_of_their_own_are_those_of_peft(dtype: torch.dtype) -> None:
    both = pair(dtype)
    names = ["b", None, "a"]
    hooks = [(lambda _, args, kwargs: (args, {**kwargs, "adapter_names": [name or "__base__" for name in names]}))]
    layers = [both.layer(name) for name in NAMES]
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers for hook in hooks]
    with torch.no_grad(), assign_samples(both.tree, names):
        assert is_same(both.tree(both.x), run_unmerged(both))
    for handle in handles:
        handle.remove()


def test_peft_itself_does_not_get_its_weights_back() -> None:
    both = pair(torch.float32)
    own = {name: tensor.clone() for name, tensor in both.weights().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both.peft.merge_adapter()
        both.peft.unmerge_adapter()
    layers = {name: getattr(both.layer(name.partition(".")[0]).base_layer, name.partition(".")[2]) for name in own}
    assert any(not torch.equal(layers[name], tensor) for name, tensor in own.items())
