"""The engine with a real key map: what is cut or merged shares what it can, and gradients find their way back."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiners.conversion import KeyMap, Split
from refiners.parity import Case, Verdict
from refiners.parity.weights import ALIGNMENT, share
from tests.refiners.parity.toys import result_of


class Fused(nn.Module):
    """Attention whose query, key and value are one layer, as in GPT-2."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(query, key, value))


class Separate(nn.Module):
    """The same with three layers."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)))


RIGHT = KeyMap({"qkv": Split("query", "key", "value"), "out": "out"})
SWAPPED = KeyMap({"qkv": Split("key", "query", "value"), "out": "out"})


def make(key_map: KeyMap, **changes: Any) -> Case:
    def run(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"y": model(inputs["x"])}

    given: dict[str, Any] = {
        "id": "toy/attention",
        "upstream": Fused,
        "port": Separate,
        "key_map": key_map,
        "inputs": lambda generator: {"x": torch.randn(2, 5, 8, generator=generator)},
        "run_upstream": run,
        "run_port": run,
    }
    return Case(**{**given, **changes})


@pytest.mark.parametrize("lane", ["float64", "float32", "bfloat16"])
def test_gradients_of_cut_weights_are_compared_under_upstreams_keys(lane: str) -> None:
    result = result_of(make(RIGHT), lane)
    assert result.verdict in (Verdict.BITWISE, Verdict.ROUNDING)
    assert result.tensors == 1 + 4 + 1
    assert result.notes == ()


def test_swapped_weights_in_the_key_map_are_different() -> None:
    result = result_of(make(SWAPPED))
    assert result.verdict is Verdict.DIFFERENT
    assert "output `y` differs in float64" in result.reason


def test_a_key_map_that_does_not_fit_is_a_result_that_lists_the_keys() -> None:
    result = result_of(make(KeyMap({"out": "out"})))
    assert result.verdict is Verdict.DIFFERENT
    assert result.reason.startswith("converting the weights raised ConversionError")
    assert "qkv.weight" in result.reason


def test_cut_weights_share_upstreams_storage_where_they_are_aligned() -> None:
    upstream, port = Fused(), Separate()
    sharing = share(upstream, port, RIGHT)
    assert sharing.copied == ()
    assert port.key.weight.data_ptr() == upstream.qkv.weight.data_ptr() + 8 * 8 * 4
    upstream, port = Fused(3), Separate(3)
    sharing = share(upstream, port, RIGHT)
    assert set(sharing.copied) == {"key.weight", "key.bias", "value.weight", "value.bias"}
    assert all(parameter.data_ptr() % ALIGNMENT == 0 for parameter in port.parameters())
    assert torch.equal(port.key.weight, upstream.qkv.weight[3:6])
