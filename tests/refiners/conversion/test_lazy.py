"""Weights that are made when they are asked for are those that the key map makes at once."""

import pytest
import torch
from torch import Tensor, nn

from refiners.conversion import (
    ConvertedWeights,
    KeyMap,
    Merge,
    Recomputed,
    Split,
    Transpose,
    WeightsBelow,
    WeightsInMemory,
)
from refiners.conversion.lazy import LazyWeights
from refiners.errors import ConversionError

UPSTREAM = {
    "qkv.weight": torch.randn(6, 2),
    "one.bias": torch.randn(2),
    "two.bias": torch.randn(2),
    "proj": torch.randn(2, 3),
    "ids": torch.arange(4),
    "head.weight": torch.randn(3, 3),
}
KEYS = KeyMap(
    {
        "qkv": Split("Q", "K", "V"),
        ("one", "two"): Merge("Both"),
        "proj": Transpose("Linear.weight"),
        "head": "Embedding",
    },
    ignore={"ids": Recomputed("counts", lambda shape: torch.arange(shape[0]))},
    tied={"head_2": "head"},
    name="the toy",
)
SHAPES = {"Q.weight": (2, 2), "K.weight": (2, 2), "V.weight": (2, 2), "Both.bias": (4,), "Linear.weight": (3, 2)}
PORT: dict[str, tuple[int, ...]] = {**SHAPES, "Embedding.weight": (3, 3)}


class Counted(LazyWeights):
    """Weights that note what was asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.asked: list[str] = []

    def meta(self) -> dict[str, Tensor]:
        return {key: tensor.to("meta") for key, tensor in self.tensors.items()}

    def __getitem__(self, key: str) -> Tensor:
        self.asked.append(key)
        return self.tensors[key]


def test_the_same_tensors_are_made_as_at_once() -> None:
    source = Counted(UPSTREAM)
    lazy = ConvertedWeights(source, KEYS, PORT)
    assert source.asked == []
    at_once = KEYS.convert(UPSTREAM, PORT)
    assert list(lazy) == list(at_once)
    assert all(torch.equal(lazy[key], tensor) for key, tensor in at_once.items())
    assert {key: (t.shape, t.dtype) for key, t in lazy.meta().items()} == {
        k: (t.shape, t.dtype) for k, t in at_once.items()
    }


def test_only_what_a_tensor_is_made_of_is_read() -> None:
    source = Counted(UPSTREAM)
    lazy = ConvertedWeights(source, KEYS, PORT)
    assert torch.equal(lazy["Both.bias"], torch.cat([UPSTREAM["one.bias"], UPSTREAM["two.bias"]]))
    assert source.asked == ["one.bias", "two.bias"]


def test_conversions_follow_one_another() -> None:
    below = WeightsBelow(
        WeightsInMemory({f"model.{key}": t for key, t in UPSTREAM.items()} | {"x": torch.ones(1)}), "model."
    )
    first = ConvertedWeights(below, KEYS, PORT)
    renamed = {key.replace("Linear", "Dense"): shape for key, shape in PORT.items()}
    second = ConvertedWeights(first, KeyMap({"Linear": "Dense", "{rest}": "{rest}"}), renamed)
    assert torch.equal(second["Dense.weight"], UPSTREAM["proj"].t())
    assert torch.equal(second["V.weight"], UPSTREAM["qkv.weight"][4:])


def test_one_parameter_under_two_names_is_made_for_both() -> None:
    port = nn.Module()
    port.register_parameter("A", nn.Parameter(torch.zeros(2)))
    port.register_parameter("B", port.get_parameter("A"))
    lazy = ConvertedWeights(WeightsInMemory({"a": torch.ones(2)}), KeyMap({"a": "A", "b": "B"}), port)
    assert list(lazy) == ["A", "B"]
    assert lazy["B"].tolist() == [1, 1]


def test_what_does_not_fit_is_told_before_anything_is_read() -> None:
    source = Counted({**UPSTREAM, "stray": torch.zeros(1), "proj": torch.zeros(5, 5)})
    with pytest.raises(ConversionError) as error:
        ConvertedWeights(source, KEYS, {**PORT, "Gate.weight": (1,)})
    for text in ("stray", "Gate.weight", "Linear.weight: needs (3, 2)"):
        assert text in str(error.value)
    assert source.asked == []


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("ids", torch.zeros(4, dtype=torch.int64), "is recomputed"),
        ("head_2.weight", torch.zeros(3, 3), "declared to repeat"),
    ],
)
def test_tensors_whose_values_are_known_are_checked(key: str, tensor: Tensor, message: str) -> None:
    lazy = ConvertedWeights(WeightsInMemory({**UPSTREAM, key: tensor}), KEYS, PORT)
    with pytest.raises(ConversionError, match=message):
        lazy.check_values()
    outer = ConvertedWeights(lazy, KeyMap({"{rest}": "{rest}"}), PORT)
    with pytest.raises(ConversionError, match=message):
        outer.check_values()
    ConvertedWeights(WeightsInMemory(UPSTREAM), KEYS, PORT).check_values()
