import pytest
import torch

from refiners.errors import ParentError
from refiners.fluxion.layers.basics import Identity
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.converter import Converter
from refiners.fluxion.layers.linear import Linear


def test_a_converter_casts_to_the_dtype_of_its_chain() -> None:
    chain = Chain(Converter(), Linear(2, 3, dtype=torch.float64))
    assert chain(torch.randn(1, 2, dtype=torch.float16)).dtype == torch.float64


def test_a_converter_moves_to_the_device_of_its_chain() -> None:
    chain = Chain(Converter(), Linear(2, 3, device="meta"))
    assert chain(torch.randn(1, 2)).is_meta


def test_a_converter_returns_a_tuple_of_all_its_inputs() -> None:
    converter = Converter()
    _ = Chain(converter, Linear(2, 3, dtype=torch.float64))
    x, y = torch.randn(1), torch.randn(1, dtype=torch.float64)
    converted = converter(x, y)
    assert isinstance(converted, tuple)
    assert converted[0].dtype == torch.float64
    assert converted[1] is y


def test_a_converter_leaves_alone_what_it_was_not_asked_to_convert() -> None:
    chain = Chain(Converter(set_dtype=False), Linear(2, 3, device="meta", dtype=torch.float64))
    converted = chain[0](torch.randn(1))[0]
    assert converted.is_meta
    assert converted.dtype == torch.float32
    chain = Chain(Converter(set_device=False), Linear(2, 3, device="meta", dtype=torch.float64))
    converted = chain[0](torch.randn(1))[0]
    assert not converted.is_meta
    assert converted.dtype == torch.float64


def test_a_converter_needs_a_chain_with_weights() -> None:
    with pytest.raises(ParentError):
        Converter()(torch.ones(1))
    chain = Chain(Converter(), Identity())
    with pytest.raises(ParentError, match="no layer with weights"):
        chain[0](torch.ones(1))
