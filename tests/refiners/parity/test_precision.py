"""A cast that is missing, too much or at another place turns a case red, also where no bit of any output shows it."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.conversion import KeyMap
from refiners.parity import Lane, Result, Verdict
from refiners.parity.explain import explain
from tests.refiners.parity.toys import Port, Upstream, make_case, result_of

MESSAGE = "the same value is computed in other dtypes"


class Island(Upstream):
    """Upstream computes its activation in float32."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.relu(self.up(self.norm_1(x)).float()).to(x.dtype)
        return self.down(self.norm_2(x))


class IslandToo(Island):
    """The same."""


class NoIsland(Upstream):
    """The activation in the dtype of the model: ReLU is exact in any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.relu(self.up(self.norm_1(x)))
        return self.down(self.norm_2(x))


class DowncastTooLate(Upstream):
    """The sum behind the activation is in float32 as well, and rounds to the same bits."""

    def forward(self, x: Tensor) -> Tensor:
        x = (x.float() + F.relu(self.up(self.norm_1(x)).float())).to(x.dtype)
        return self.down(self.norm_2(x))


class RoundTrip(Port):
    """A cast up and down, between which nothing is computed."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float32 else torch.float32
        return super().forward(x.to(wide).to(x.dtype))


class NormOutside(Port):
    """Its norm is computed in float32; torch's own kernel of bfloat16 does so by itself."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm_2
        x = x + F.gelu(self.up(self.norm_1(x)))
        wide = F.layer_norm(x.float(), (8,), norm.weight.float(), norm.bias.float(), norm.eps)
        return self.down(wide.to(x.dtype))


@pytest.mark.parametrize(
    ("upstream", "port", "lane"),
    [
        (Island, NoIsland, "bfloat16"),
        (NoIsland, Island, "float16"),
        (Island, DowncastTooLate, "bfloat16"),
        (DowncastTooLate, Island, "float16"),
        (Upstream, RoundTrip, "bfloat16"),
        (Upstream, RoundTrip, "float32"),
        (RoundTrip, Upstream, "float16"),
    ],
)
def test_a_cast_on_one_side_is_red_although_all_bits_agree(upstream: Any, port: Any, lane: str) -> None:
    result = result_of(make_case(port, upstream=upstream), lane)
    assert result.verdict is Verdict.DIFFERENT
    assert MESSAGE in result.reason
    assert result.worst is None


def test_the_reason_names_both_sides_and_their_lines() -> None:
    reason = result_of(make_case(NoIsland, upstream=Island), "bfloat16").reason
    upstream, _, port = reason.partition("; the port ")
    assert "float32 rounded to bfloat16" in upstream
    assert "test_precision.py" in upstream
    assert "`relu` bfloat16" in port
    assert "test_precision.py" in port


def test_a_cast_that_shows_in_no_bit_is_explained_at_the_node_that_lacks_it() -> None:
    found = explain(make_case(NoIsland, upstream=Island), Lane("bfloat16"))
    (fault,) = found.faults
    assert fault.finding.port == ""
    assert "upstream's dtypes: `relu` in float32" in fault.diagnosis
    assert "here `relu` in bfloat16" in fault.diagnosis
    assert "computes the same values as upstream in other dtypes" in str(found)


def test_a_norm_in_another_dtype_is_told_beside_values_that_differ() -> None:
    result = result_of(make_case(NormOutside), "bfloat16")
    assert any(MESSAGE in reason and "native_layer_norm" in reason for reason in result.reasons)


class NumberInFloat32(Upstream):
    """Multiplies by a number that it computes in float32, whatever the lane."""

    def forward(self, x: Tensor) -> Tensor:
        level = torch.tensor(2.0)
        return super().forward((level * 4.0).sqrt() * level * x)


class NumberReady(Upstream):
    """The same number, computed beforehand."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tensor(32.0).sqrt() * x)


class NumberOfTheInput(Upstream):
    """Multiplies by the size of its input, computed in float32 as a number without axes."""

    wide = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        largest = x.detach().abs().amax().to(self.wide)
        return super().forward(x * (largest * 0 + 1).to(x.dtype))


class NumberOfTheInputInItsDtype(NumberOfTheInput):
    """The same in the dtype of the lane."""

    wide = torch.float64


def test_numbers_that_no_input_reaches_may_be_computed_beforehand() -> None:
    result = result_of(make_case(NumberReady, upstream=NumberInFloat32), "float64")
    assert not any(MESSAGE in reason for reason in result.reasons)


def test_a_number_without_axes_that_an_input_reaches_is_compared() -> None:
    result = result_of(make_case(NumberOfTheInputInItsDtype, upstream=NumberOfTheInput), "float64")
    assert any(MESSAGE in reason for reason in result.reasons)


class CountsInFloat32(Upstream):
    """Adds whole numbers that float32 holds exactly."""

    wide = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(8, dtype=torch.int64).to(self.wide) * 2
        return super().forward(x + counts.to(x.dtype))


class CountsInFloat32Too(CountsInFloat32):
    """The same."""


class CountsInFloat64(CountsInFloat32):
    """In float64, with the same bits."""

    wide = torch.float64


def test_an_island_of_float32_on_one_side_is_red_in_float64_although_all_bits_agree() -> None:
    result = result_of(make_case(CountsInFloat64, upstream=CountsInFloat32), "float64")
    assert result.verdict is Verdict.DIFFERENT
    assert MESSAGE in result.reason
    assert "`mul` float32" in result.reason.partition("; the port ")[0]


def test_an_island_on_both_sides_is_green_and_listed() -> None:
    result = result_of(make_case(CountsInFloat32Too, upstream=CountsInFloat32), "float64")
    assert result.verdict is Verdict.BITWISE
    told = [note for note in result.notes if note.startswith("outside of float64")]
    assert len(told) == 2
    assert all("`mul` float32" in note and "test_precision.py" in note for note in told)


@pytest.mark.parametrize("lane", ["float64", "float32", "bfloat16", "float16"])
def test_equal_islands_are_green(lane: str) -> None:
    assert result_of(make_case(IslandToo, upstream=Island), lane).verdict is Verdict.BITWISE


# Chains


class Activation(fl.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class WideActivation(fl.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x.float()).to(x.dtype)


KEYS = KeyMap({"norm_1": "Residual.LayerNorm", "up": "Residual.Linear", "norm_2": "LayerNorm", "down": "Linear"})


def chain(activation: type[fl.Module]) -> fl.Chain:
    residual = fl.Residual(fl.LayerNorm(8), fl.Linear(8, 8), activation())
    return fl.Chain(residual, fl.LayerNorm(8), fl.Linear(8, 8))


def result_of_chain(upstream: type[nn.Module], activation: type[fl.Module], lane: str) -> Result:
    return result_of(make_case(lambda: chain(activation), upstream=upstream, key_map=KEYS), lane)


@pytest.mark.parametrize("lane", ["float64", "bfloat16"])
def test_a_chain_with_the_same_casts_is_green(lane: str) -> None:
    assert result_of_chain(Island, WideActivation, lane).verdict is Verdict.BITWISE


def test_a_chain_with_an_upcast_too_much_is_red() -> None:
    result = result_of_chain(NoIsland, WideActivation, "bfloat16")
    assert result.verdict is Verdict.DIFFERENT
    assert "`Residual.WideActivation`" in result.reason


def test_a_chain_with_an_upcast_too_few_is_red() -> None:
    result = result_of_chain(Island, Activation, "bfloat16")
    assert result.verdict is Verdict.DIFFERENT
    assert "`Residual.Activation`" in result.reason


# The same arithmetic in other words


class Fused(nn.Module):
    """One product whose result is split; scores and softmax by torch."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(q @ k.T, -1, dtype=torch.float32).to(x.dtype) @ v


class Apart(nn.Module):
    """Three products of the rows of one weight; a softmax that is cast by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
        scores = torch.matmul(q, k.transpose(0, 1)).to(torch.float32)
        return torch.matmul(torch.softmax(scores, -1).type_as(x), v)


class Ready(Upstream):
    """Has a table in which upstream's counts lie ready."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.arange(8, dtype=torch.float32) * 2, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.table.to(x.dtype))


class Table(Upstream):
    """Multiplies by the first rows of a table, computed in float32 on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", (torch.arange(9, dtype=torch.float32)[:, None] + 1).sqrt() * 2, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.rows().to(x.dtype))

    def rows(self) -> Tensor:
        return (torch.arange(3, dtype=torch.float32)[:, None] + 1).sqrt() * 2


class TableCut(Table):
    """The first rows of a longer table in a buffer."""

    def rows(self) -> Tensor:
        return self.table[:3]


class TableIndexed(Table):
    """The same rows by their numbers."""

    def rows(self) -> Tensor:
        return self.table[torch.arange(3)]


class LevelOfTable(Table):
    """Multiplies by the root of one number of a table, computed in float32 from a buffer."""

    def rows(self) -> Tensor:
        return self.table[4, 0] ** 0.5


class LevelReady(Table):
    """The same number out of a table of roots."""

    def __init__(self) -> None:
        super().__init__()
        self.roots: Tensor
        self.register_buffer("roots", self.table**0.5, persistent=False)

    def rows(self) -> Tensor:
        return self.roots[4, 0]


class MaskAdded(Upstream):
    """Hides what comes later by adding -inf, and weighs in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.hidden(x @ x.T).softmax(-1, dtype=torch.float32).to(x.dtype)
        return super().forward(weights @ x)

    def hidden(self, scores: Tensor) -> Tensor:
        return scores + torch.full((3, 3), -torch.inf, dtype=scores.dtype).triu(1)


class MaskFilled(MaskAdded):
    """The same by filling it in."""

    def hidden(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -torch.inf)


class MaskChosen(MaskAdded):
    """The same by choosing."""

    def hidden(self, scores: Tensor) -> Tensor:
        return torch.where(torch.ones(3, 3, dtype=torch.bool).tril(), scores, -torch.inf)


class MaskFilledInFloat64(MaskAdded):
    """The same with a cast there and back."""

    def hidden(self, scores: Tensor) -> Tensor:
        return super().hidden(scores.double()).to(scores.dtype)


@pytest.mark.parametrize("lane", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Table, TableCut),
        (Table, TableIndexed),
        (LevelOfTable, LevelReady),
        (MaskAdded, MaskFilled),
        (MaskAdded, MaskChosen),
    ],
)
def test_a_move_may_stand_for_a_computation_in_the_same_dtype(one: Any, other: Any, lane: str) -> None:
    assert result_of(make_case(one, upstream=other), lane).verdict is Verdict.BITWISE
    assert result_of(make_case(other, upstream=one), lane).verdict is Verdict.BITWISE


@pytest.mark.parametrize("upstream", [MaskFilled, MaskChosen])
@pytest.mark.parametrize("lane", ["float32", "bfloat16", "float16"])
def test_a_move_does_not_stand_for_a_computation_in_another_dtype(upstream: Any, lane: str) -> None:
    result = result_of(make_case(MaskFilledInFloat64, upstream=upstream), lane)
    assert result.verdict is Verdict.DIFFERENT
    assert MESSAGE in result.reason
    assert result.besides_dtypes is Verdict.BITWISE


def test_other_words_for_the_same_arithmetic_are_no_mismatch() -> None:
    case = make_case(Apart, upstream=Fused, without_influence={"qkv.bias": "softmax removes that of keys, in part"})
    for lane in ("bfloat16", "float16", "float32"):
        assert not any(MESSAGE in reason for reason in result_of(case, lane).reasons)


def test_a_table_that_lies_ready_is_no_mismatch() -> None:
    result = result_of(make_case(Ready, upstream=CountsInFloat32), "bfloat16")
    assert not any(MESSAGE in reason for reason in result.reasons)


def test_a_cast_outside_of_all_modules_counts_too() -> None:
    def with_cast_outside(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"y": model(inputs["x"]).double().to(inputs["x"].dtype)}

    result = result_of(make_case(run_port=with_cast_outside), "float32")
    assert MESSAGE in result.reason
    assert "no module" in result.reason


TURN = torch.polar(torch.ones(4, dtype=torch.float64), torch.linspace(0.3, 1.7, 4, dtype=torch.float64))


class Turned(Upstream):
    """Pairs of numbers turned by angles in float64: as complex numbers."""

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(self.up(self.norm_1(x)).float().unflatten(-1, (4, 2))) * TURN
        return self.down(self.norm_2(torch.view_as_real(turned).flatten(-2).to(x.dtype) * 3.0))


class TurnedByHand(Upstream):
    """The same with their two parts, in another order, so that bits differ on the way."""

    wide = torch.float64

    def forward(self, x: Tensor) -> Tensor:
        a, b = (self.up(self.norm_1(x)) * 3.0).float().unflatten(-1, (4, 2)).unbind(-1)
        cos, sin = TURN.real.to(self.wide), TURN.imag.to(self.wide)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
        return self.down(self.norm_2(turned.flatten(-2).to(x.dtype)))


class TurnedInFloat32(TurnedByHand):
    """In a narrower dtype."""

    wide = torch.float32


def test_complex_numbers_compute_in_the_dtype_of_their_parts() -> None:
    right = result_of(make_case(TurnedByHand, upstream=Turned), "float32")
    wrong = result_of(make_case(TurnedInFloat32, upstream=Turned), "float32")
    assert not any(MESSAGE in reason for reason in right.reasons)
    assert any(MESSAGE in reason for reason in wrong.reasons)
