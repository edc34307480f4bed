"""The leaves that are torch's own layers under our names: same bits, same weights, and a line in the tree."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportUnknownVariableType] (torch has no stubs here)
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from refiners.errors import InputError
from refiners.fluxion.layers.activations import ReLU
from refiners.fluxion.layers.attentions import Attention, SelfAttention, SelfAttention2d
from refiners.fluxion.layers.basics import Parameter
from refiners.fluxion.layers.conv import Conv2d, ConvTranspose2d
from refiners.fluxion.layers.embedding import Embedding
from refiners.fluxion.layers.linear import Linear, MultiLinear
from refiners.fluxion.layers.module import Module, WeightedModule
from refiners.fluxion.layers.norm import GroupNorm, InstanceNorm2d, LayerNorm, LayerNorm2d
from refiners.fluxion.layers.padding import ReflectionPad2d
from refiners.fluxion.layers.pixelshuffle import PixelUnshuffle
from refiners.fluxion.layers.pooling import MaxPool1d, MaxPool2d
from refiners.fluxion.layers.sampling import Downsample, Upsample

IMAGE = (2, 4, 9, 12)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: Linear(4, 3), lambda: nn.Linear(4, 3), (2, 5, 4)),
    "Linear without bias": (lambda: Linear(4, 3, bias=False), lambda: nn.Linear(4, 3, bias=False), (2, 4)),
    "Conv2d": (lambda: Conv2d(4, 6, 3), lambda: nn.Conv2d(4, 6, 3), IMAGE),
    "Conv2d, all arguments": (
        lambda: Conv2d(
            4, 6, (3, 2), stride=2, padding=(1, 2), groups=2, use_bias=False, dilation=(1, 2), padding_mode="reflect"
        ),
        lambda: nn.Conv2d(
            4, 6, (3, 2), stride=2, padding=(1, 2), groups=2, bias=False, dilation=(1, 2), padding_mode="reflect"
        ),
        IMAGE,
    ),
    "Conv2d, same": (lambda: Conv2d(4, 6, 3, padding="same"), lambda: nn.Conv2d(4, 6, 3, padding="same"), IMAGE),
    "ConvTranspose2d": (
        lambda: ConvTranspose2d(4, 6, 2, stride=2),
        lambda: nn.ConvTranspose2d(4, 6, 2, stride=2),
        IMAGE,
    ),
    "ConvTranspose2d, all arguments": (
        lambda: ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, False, 2),
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, False, 2),
        IMAGE,
    ),
    "LayerNorm": (lambda: LayerNorm(12), lambda: nn.LayerNorm(12), IMAGE),
    "LayerNorm over two axes": (lambda: LayerNorm((9, 12), eps=0.1), lambda: nn.LayerNorm((9, 12), eps=0.1), IMAGE),
    "GroupNorm": (lambda: GroupNorm(4, 2, eps=0.1), lambda: nn.GroupNorm(2, 4, eps=0.1), IMAGE),
    "InstanceNorm2d": (lambda: InstanceNorm2d(4, eps=0.1), lambda: nn.InstanceNorm2d(4, eps=0.1), IMAGE),
    "MaxPool1d": (lambda: MaxPool1d(2), lambda: nn.MaxPool1d(2), (2, 4, 9)),
    "MaxPool2d": (lambda: MaxPool2d((2, 3), stride=1, padding=1), lambda: nn.MaxPool2d((2, 3), 1, 1), IMAGE),
    "ReflectionPad2d": (lambda: ReflectionPad2d((1, 2, 3, 4)), lambda: nn.ReflectionPad2d((1, 2, 3, 4)), IMAGE),
    "PixelUnshuffle": (lambda: PixelUnshuffle(3), lambda: nn.PixelUnshuffle(3), (2, 4, 9, 12)),
}


def randomized(module: nn.Module) -> nn.Module:
    for tensor in module.state_dict().values():
        tensor.normal_()
    return module


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_leaf_has_the_bits_and_the_weights_of_torchs_layer(name: str, dtype: torch.dtype) -> None:
    ours, theirs, shape = CASES[name]
    layer, reference = ours().to(dtype), randomized(theirs().to(dtype))
    layer.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(shape).to(dtype)
    assert torch.equal(layer(x), reference(x))


def test_embedding_reads_its_table_by_index() -> None:
    embedding = Embedding(10, 4)
    index = torch.tensor([[1, 9], [0, 1]])
    assert torch.equal(embedding(index), embedding.weight[index])


def test_layer_norm_2d_normalizes_the_channels_of_each_pixel() -> None:
    norm = randomized(LayerNorm2d(5, eps=0.1)).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    last = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (5,), norm.weight, norm.bias, 0.1)
    assert torch.equal(norm(x), last.permute(0, 3, 1, 2))


def test_multi_linear_puts_a_relu_between_its_layers() -> None:
    mlp = MultiLinear(3, 4, inner_dim=5, num_layers=3)
    assert [type(layer) for layer in mlp] == [Linear, ReLU, Linear, ReLU, Linear]
    assert [tuple(layer.weight.shape) for layer in mlp.layers(Linear)] == [(5, 3), (5, 5), (4, 5)]
    assert mlp(torch.randn(2, 3)).shape == (2, 4)


def test_multi_linear_of_one_layer_maps_input_to_output() -> None:
    mlp = MultiLinear(3, 4, inner_dim=5, num_layers=1)
    assert mlp(torch.randn(2, 3)).shape == (2, 4)
    with pytest.raises(InputError, match="at least 1, got 0"):
        MultiLinear(3, 4, inner_dim=5, num_layers=0)


# --- lines of the tree -----------------------------------------------------------------------------------------------

ON_CPU = "device=cpu, dtype=float32)"
LINES = [
    (lambda: Linear(1, 2), f"Linear(in_features=1, out_features=2, {ON_CPU}"),
    (lambda: Conv2d(3, 4, 3), f"Conv2d(in_channels=3, out_channels=4, kernel_size=(3, 3), {ON_CPU}"),
    (
        lambda: Conv2d(3, 4, 3, stride=1, padding=0, dilation=1),
        f"Conv2d(in_channels=3, out_channels=4, kernel_size=(3, 3), {ON_CPU}",
    ),
    (
        lambda: Conv2d(3, 4, 3, stride=2, padding=1, use_bias=False),
        f"Conv2d(in_channels=3, out_channels=4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), use_bias=False, "
        f"{ON_CPU}",
    ),
    (
        lambda: ConvTranspose2d(3, 4, 2, stride=2),
        f"ConvTranspose2d(in_channels=3, out_channels=4, kernel_size=(2, 2), stride=(2, 2), {ON_CPU}",
    ),
    (lambda: Embedding(5, 6), f"Embedding(num_embeddings=5, embedding_dim=6, {ON_CPU}"),
    (lambda: LayerNorm(4), f"LayerNorm(normalized_shape=(4,), {ON_CPU}"),
    (lambda: LayerNorm([3, 4], eps=1e-6), f"LayerNorm(normalized_shape=(3, 4), eps=1e-06, {ON_CPU}"),
    (lambda: GroupNorm(32, 4), f"GroupNorm(num_groups=4, channels=32, {ON_CPU}"),
    (lambda: GroupNorm(32, 4, eps=1e-6), f"GroupNorm(num_groups=4, eps=1e-06, channels=32, {ON_CPU}"),
    (lambda: LayerNorm2d(4), f"LayerNorm2d(channels=4, {ON_CPU}"),
    (lambda: Parameter(1, 2), f"Parameter(dims=(1, 2), {ON_CPU}"),
    (lambda: InstanceNorm2d(3), "InstanceNorm2d(num_features=3)"),
    (lambda: MaxPool2d(2), "MaxPool2d(kernel_size=2, stride=2)"),
    (lambda: MaxPool1d(2, padding=1), "MaxPool1d(kernel_size=2, stride=2, padding=1)"),
    (lambda: ReflectionPad2d(1), "ReflectionPad2d(padding=(1, 1, 1, 1))"),
    (lambda: PixelUnshuffle(2), "PixelUnshuffle(downscale_factor=2)"),
]


@pytest.mark.parametrize(
    ("build", "line"), LINES, ids=[line.partition("(")[0] + f" {i}" for i, (_, line) in enumerate(LINES)]
)
def test_a_leaf_prints_the_arguments_that_are_not_its_defaults(build: Callable[[], Module], line: str) -> None:
    assert str(build()) == line
    assert repr(build()) == line


# --- where weights are built -----------------------------------------------------------------------------------------

WEIGHTED: dict[str, Callable[..., nn.Module]] = {
    "Linear": lambda **factory: Linear(4, 8, **factory),
    "MultiLinear": lambda **factory: MultiLinear(4, 8, 6, 3, **factory),
    "Conv2d": lambda **factory: Conv2d(4, 8, 3, **factory),
    "ConvTranspose2d": lambda **factory: ConvTranspose2d(4, 8, 3, **factory),
    "Embedding": lambda **factory: Embedding(4, 8, **factory),
    "LayerNorm": lambda **factory: LayerNorm(4, **factory),
    "GroupNorm": lambda **factory: GroupNorm(4, 2, **factory),
    "LayerNorm2d": lambda **factory: LayerNorm2d(4, **factory),
    "Parameter": lambda **factory: Parameter(4, **factory),
    "Attention": lambda **factory: Attention(4, 2, **factory),
    "SelfAttention": lambda **factory: SelfAttention(4, num_heads=2, **factory),
    "SelfAttention2d": lambda **factory: SelfAttention2d(4, num_heads=2, **factory),
    "Downsample": lambda **factory: Downsample(4, 2, **factory),
    "Upsample": lambda **factory: Upsample(4, **factory),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_are_built_on_the_device_and_in_the_dtype_asked_for(name: str) -> None:
    tensors = list(WEIGHTED[name](device="meta", dtype=torch.float64).parameters())
    assert tensors
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {("meta", torch.float64)}


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_follow_the_default_device(name: str) -> None:
    with torch.device("meta"):
        tensors: list[Tensor] = list(WEIGHTED[name]().parameters())
        assert all(tensor.is_meta for tensor in tensors)
    assert not any(tensor.is_meta for tensor in WEIGHTED[name](device=None, dtype=None).parameters())


@pytest.mark.parametrize("name", WEIGHTED)
def test_an_unknown_argument_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="devise"):
        WEIGHTED[name](devise="meta")


def test_the_leaves_with_weights_are_weighted_modules() -> None:
    weighted = (Linear, Conv2d, ConvTranspose2d, Embedding, LayerNorm, GroupNorm, LayerNorm2d, Parameter)
    others = (InstanceNorm2d, MaxPool1d, MaxPool2d, ReflectionPad2d, PixelUnshuffle)
    assert all(issubclass(leaf, WeightedModule) for leaf in weighted)
    assert not any(issubclass(leaf, WeightedModule) for leaf in others)
    assert all(issubclass(leaf, Module) for leaf in others)


# --- the leaves that read their weights past torch's `__getattr__` ---------------------------------------------------

QUICK: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: Linear(4, 3), lambda: nn.Linear(4, 3), (2, 5, 4)),
    "Conv2d": (lambda: Conv2d(4, 6, 3), lambda: nn.Conv2d(4, 6, 3), IMAGE),
    "LayerNorm": (lambda: LayerNorm(4), lambda: nn.LayerNorm(4), (2, 5, 4)),
    "GroupNorm": (lambda: GroupNorm(4, 2), lambda: nn.GroupNorm(2, 4), IMAGE),
}
quick = pytest.mark.parametrize(("ours", "theirs", "shape"), QUICK.values(), ids=QUICK.keys())


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(other.normal_())


def python_calls(layer: nn.Module, x: Tensor) -> int:
    def note(_frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        calls += event == "call"

    calls = 0
    sys.setprofile(note)
    try:
        layer.forward(x)
    finally:
        sys.setprofile(None)
    return calls


@quick
def test_a_forward_makes_fewer_calls_of_python_than_that_of_torch(
    ours: Callable[[], nn.Module], theirs: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    assert python_calls(ours(), x) < python_calls(theirs(), x)


@quick
def test_a_weight_that_is_no_parameter_any_more_is_found(
    ours: Callable[[], nn.Module], theirs: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    mine, other = ours(), theirs()
    same_weights(mine, other)
    x = torch.randn(shape)
    weight = 2 * other.weight.detach()
    for layer in (mine, other):
        del layer.weight
        layer.weight = weight
    assert "weight" not in mine._parameters
    assert torch.equal(mine(x), other(x))


@quick
def test_a_parametrized_weight_is_computed_anew_in_each_forward(
    ours: Callable[[], nn.Module], theirs: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    mine, other = ours(), theirs()
    same_weights(mine, other)
    for layer in (mine, other):
        parametrize.register_parametrization(layer, "weight", Doubled())
    x = torch.randn(shape)
    assert torch.equal(mine(x), other(x))
    for layer in (mine, other):
        parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(mine(x), other(x))


@quick
def test_weights_that_are_lent_for_a_call_or_replaced_are_used(
    ours: Callable[[], nn.Module], theirs: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    mine, other = ours(), theirs()
    same_weights(mine, other)
    x = torch.randn(shape)
    lent = {name: value.detach() + 1 for name, value in other.named_parameters()}
    assert torch.equal(functional_call(mine, lent, (x,)), functional_call(other, lent, (x,)))
    for layer in (mine, other):
        layer.weight = nn.Parameter(lent["weight"])
        layer.bias = None
    assert torch.equal(mine(x), other(x))


@quick
def test_who_watches_functions_sees_those_of_torch(
    ours: Callable[[], nn.Module], theirs: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    def functions(layer: nn.Module) -> list[Any]:
        class Watch(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(func)
                return func(*args, **(kwargs or {}))

        seen: list[Any] = []
        with Watch():
            layer(torch.zeros(shape))
        return seen

    assert functions(ours()) == functions(theirs())


def test_a_group_of_one_value_has_no_variance() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        GroupNorm(4, 4)(torch.zeros(1, 4, 1, 1))
