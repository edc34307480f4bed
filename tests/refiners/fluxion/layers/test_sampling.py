import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from refiners.fluxion.context import Contexts
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.context_access import SetContext
from refiners.fluxion.layers.conv import Conv2d
from refiners.fluxion.layers.sampling import Downsample, Interpolate, Upsample


class UShaped(Chain):
    def __init__(self) -> None:
        super().__init__(Downsample(3, 2), Downsample(3, 2, padding=1), Upsample(3), Upsample(3))

    def init_context(self) -> Contexts:
        return {"sampling": {"shapes": []}}


def test_interpolate_takes_the_nearest_pixel_by_default() -> None:
    x = torch.randn(1, 2, 3, 5)
    assert torch.equal(Interpolate()(x, torch.Size([7, 4])), functional.interpolate(x, size=(7, 4), mode="nearest"))


def test_interpolate_passes_its_mode_and_antialias() -> None:
    x = torch.randn(1, 2, 8, 8)
    expected = functional.interpolate(x, size=(3, 4), mode="bicubic", antialias=True)
    assert torch.equal(Interpolate("bicubic", antialias=True)(x, (3, 4)), expected)
    assert not torch.equal(Interpolate("bicubic")(x, (3, 4)), expected)


def test_downsample_without_padding_pads_below_and_on_the_right() -> None:
    layer = Downsample(3, scale_factor=2, register_shape=False)
    x = torch.randn(1, 3, 8, 6)
    conv = layer.ensure_find(Conv2d)
    assert torch.equal(layer(x), functional.conv2d(functional.pad(x, (0, 1, 0, 1)), conv.weight, conv.bias, stride=2))


def test_downsample_with_padding_is_its_convolution() -> None:
    layer = Downsample(3, scale_factor=2, padding=1, register_shape=False)
    x = torch.randn(1, 3, 8, 6)
    assert len(layer) == 1
    conv = layer.ensure_find(Conv2d)
    assert torch.equal(layer(x), functional.conv2d(x, conv.weight, conv.bias, stride=2, padding=1))


def test_downsample_pushes_the_size_of_its_input() -> None:
    chain = Chain(Downsample(3, scale_factor=2))
    chain.set_context("sampling", {"shapes": []})
    chain(torch.randn(1, 3, 7, 6))
    assert chain.use_context("sampling")["shapes"] == [torch.Size([7, 6])]
    assert len(list(chain.layers(SetContext, recurse=True))) == 1


def test_upsample_by_a_factor_needs_no_context() -> None:
    layer = Upsample(3, upsample_factor=2)
    x = torch.randn(1, 3, 4, 5)
    conv = layer.ensure_find(Conv2d)
    enlarged = functional.interpolate(x, scale_factor=2, mode="nearest")
    assert torch.equal(layer(x), functional.conv2d(enlarged, conv.weight, conv.bias, padding=1))


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (11, 6)])
def test_upsample_returns_to_the_size_before_downsample(size: tuple[int, int]) -> None:
    model = UShaped()
    x = torch.randn(2, 3, *size)
    first = model(x)
    assert first.shape == x.shape
    assert torch.equal(model(x), first)


COPIES: dict[str, Callable[[Chain], Chain]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "structural copy": lambda model: model.structural_copy(),
}


@pytest.mark.parametrize("kind", COPIES)
def test_sampling_layers_can_be_copied(kind: str) -> None:
    model = Chain(UShaped(), Upsample(3, upsample_factor=2))
    x = torch.randn(1, 3, 7, 5)
    clone = COPIES[kind](model)
    clone[1].upsample_factor = 3
    assert clone(x).shape == (1, 3, 21, 15)
    assert model(x).shape == (1, 3, 14, 10)


def test_sampling_compiles_without_a_break() -> None:
    model = UShaped()
    x = torch.randn(1, 3, 7, 9)
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
