"""Values that are equal, or that were written piece by piece: the node that made what is read is blamed."""

import pytest
import torch
from torch import Tensor, nn

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.fingerprint import Values
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.trace import record
from refiners.parity.weights import fill_informative

LANE = Lane("float32")
X = torch.linspace(-2, 2, 2 * 6 * 8).sin().view(2, 6, 8)


class Waves(nn.Module):
    """A table of waves for one kind of layer."""

    def __init__(self, base: float) -> None:
        super().__init__()
        self.base = base

    def forward(self, length: int) -> Tensor:
        speeds = self.base ** (-torch.arange(0, 8, 2, dtype=torch.float32) / 8)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * speeds
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Far(nn.Module):
    """Layers by turns with one table and with the other."""

    def __init__(self, near: float = 100.0, far: float = 10000.0) -> None:
        super().__init__()
        self.near, self.far = Waves(near), Waves(far)
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        return self.near(length), self.far(length)

    def forward(self, x: Tensor) -> Tensor:
        near, far = self.tables(x.shape[1])
        x = self.one(x) * near
        x = self.two(x) * far
        return self.three(x) * near


class BatchedWaves(Waves):
    """The same with an axis for the batch."""

    def forward(self, length: int) -> Tensor:
        speeds = self.base ** (-torch.arange(0, 8, 2, dtype=torch.float32) / 8)
        angles = torch.arange(length)[None, :, None].float() * speeds
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Batched(Far):
    """Upstream's: no value of a table has the shape that it has in the port."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = BatchedWaves(100.0), BatchedWaves(10000.0)


def explained(upstream: nn.Module, port: nn.Module, lane: Lane = LANE) -> Explanation:
    with held_equal(lane):
        for model in (upstream, port):
            model.to(lane.dtype).eval()
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        runs = (lambda model=model: {"y": model(X.to(lane.dtype))} for model in (upstream, port))
        return explain_modules(upstream, port, *runs)


@pytest.mark.parametrize("wrong", ["near", "far"])
def test_of_two_nodes_that_make_one_value_the_one_that_was_read_is_blamed(wrong: str) -> None:
    base, right = {"near": (10000.0, 100.0), "far": (100.0, 10000.0)}[wrong]
    found = explained(Batched(), Far(base, base))
    assert [(fault.finding.port, fault.diagnosis) for fault in found.faults] == [(wrong, f"when `base` is {right}")]


class Turned(nn.Module):
    """A layer that makes its own table."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.up, self.down, self.sign = nn.Linear(8, 8), nn.Linear(8, 8), sign

    def angles(self, length: int) -> Tensor:
        return torch.arange(length, dtype=torch.float32)[:, None] * 10.0 ** -torch.arange(4, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        angles = self.angles(x.shape[1]) * self.sign
        one, two = self.up(x).chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return x + self.down(torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1))


def two_layers(first: float, second: float) -> nn.Module:
    return nn.Sequential(Turned(first), Turned(second))


@pytest.mark.parametrize(("first", "second"), [(-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)])
def test_each_layer_that_makes_a_wrong_table_is_blamed_and_no_other(first: float, second: float) -> None:
    found = explained(two_layers(1.0, 1.0), two_layers(first, second))
    assert found.leaves == [str(place) for place, sign in enumerate((first, second)) if sign < 0]


class Filled(nn.Module):
    """A table of waves that is filled column by column, as many write it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def table(self, length: int) -> Tensor:
        places = torch.arange(length - 1, -length, -1.0)[:, None]
        speeds = torch.exp(torch.arange(0, 8, 2) * (-torch.tensor(10000.0).log() / 8))
        table = torch.zeros(2 * length - 1, 8)
        table[:, 0::2] = torch.sin(places * speeds)
        table[:, 1::2] = torch.cos(places * speeds)
        return table

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x) @ self.up(self.table(x.shape[1]).to(x.dtype)).mT


class Joined(Filled):
    """The same, joined of both."""

    is_reversed = False

    def table(self, length: int) -> Tensor:
        places = torch.arange(length - 1, -length, -1, dtype=torch.float32)
        places = torch.arange(-(length - 1), length, dtype=torch.float32) if self.is_reversed else places
        speeds = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float32) / 8)
        angles = places[:, None] * speeds
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def test_a_table_that_is_filled_column_by_column_differs_by_rounding_from_one_that_is_joined() -> None:
    found = explained(Filled(), Joined())
    assert all(fault.diagnosis.startswith("within rounding") for fault in found.faults)


def test_what_is_wrong_with_a_table_is_told_where_upstreams_is_filled_column_by_column() -> None:
    port = Joined()
    port.is_reversed = True
    (fault,) = explained(Filled(), port).faults
    assert "in the place of" in fault.diagnosis
    assert "arange(-5, 6" in fault.diagnosis


def test_two_values_that_are_no_function_of_one_are_no_activations() -> None:
    port = Joined()
    port.is_reversed = True
    assert not any("activation" in fault.diagnosis for fault in explained(Filled(), port).faults)


class Written(nn.Module):
    """Parts of a tensor that are written to by a slice, an index, both, and in place."""

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.zeros(2, 6, 8)
        whole[0] = x[0].sin()
        whole[:, 0::2] = x[:, 1::2].cos()
        whole[1, 1:3] = 2 * x[1, :2]
        whole[:, :, 2] += x[:, :, 0]
        return whole + 1


def test_a_trace_runs_again_to_what_was_written_part_by_part() -> None:
    model = Written()
    with torch.no_grad():
        trace, outputs = record(model, lambda: {"y": model(X)}, Values(), read_views=True)
        (number,) = trace.outputs.values()
        made = {value: op for op in trace.operations for value in op.outputs if value not in op.inputs}
        names = [made[number].name]
        number = made[number].inputs[0]
        while made[number].inputs:
            names.append(made[number].name.removeprefix("aten."))
            number = made[number].inputs[0]
    assert names[1:] == ["select_scatter", "as_strided_scatter", "slice_scatter", "select_scatter"]
    assert torch.equal(outputs["y"], model(X))


class Blank(nn.Module):
    """Pairs of neighbours are turned into a tensor that holds nothing yet, and lies in memory in another order."""

    is_flipped = False

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).transpose(1, 2).contiguous().transpose(1, 2)
        one, two, waves = x[..., ::2], x[..., 1::2], torch.arange(4).to(x.dtype)
        whole = torch.empty_like(x)
        whole[..., ::2] = one * waves.cos() - two * waves.sin()
        whole[..., 1::2] = two * waves.cos() + (-one if self.is_flipped else one) * waves.sin()
        return self.down(whole)


def test_a_trace_runs_again_to_what_was_written_into_an_empty_tensor() -> None:
    model = Blank()
    with torch.no_grad():
        trace, _ = record(model, lambda: {"y": model(X)}, Values(), read_views=True)
    made = [op.name.removeprefix("aten.") for op in trace.operations]
    assert made.count("slice_scatter") == 2
    assert "full_like" in made
    assert "empty_like" not in made


class Stacked(Blank):
    """Upstream's of it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        waves = torch.arange(4).to(x.dtype).repeat_interleave(2)
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return self.down(x * waves.cos() + turned * waves.sin())


@pytest.mark.parametrize("is_flipped", [False, True])
def test_what_is_wrong_in_a_tensor_that_is_filled_part_by_part_is_named(is_flipped: bool) -> None:
    port = Blank()
    port.is_flipped = is_flipped
    told = [fault.diagnosis for fault in explained(Stacked(), port, Lane("float64")).faults]
    assert len(told) == is_flipped
    assert all("neg" in one or "sign" in one for one in told)
