import pytest
import torch
from torch import nn

from reference_ports.blocks.activations import ACTIVATIONS

TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_python_tanh", "gelu_pytorch_tanh")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_keeps_shape_and_dtype(name: str) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    y = ACTIVATIONS[name]()(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("name", TANH_GELUS)
def test_the_gelus_through_tanh_agree_to_nine_digits_in_float64(name: str) -> None:
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    expected = nn.functional.gelu(x, approximate="tanh")
    assert [f"{y:.9f}" for y in ACTIVATIONS[name]()(x).abs()] == [f"{y:.9f}" for y in expected.abs()]


def test_each_spelling_of_gelu_has_bits_of_its_own() -> None:
    x = torch.linspace(-4, 4, 4001)
    outputs = [ACTIVATIONS[name]()(x) for name in ("gelu", "quick_gelu", "gelu_new", "gelu_pytorch_tanh")]
    assert not any(torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
