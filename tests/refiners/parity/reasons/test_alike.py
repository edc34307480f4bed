"""One mistake in every layer is told once; what differs in more than the number of a layer is told by itself."""

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.explained import plain
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.reasons.alike import Look, alike, in_one
from refiners.parity.told import Depth, Told, tell
from refiners.parity.weights import fill_informative

LANE = Lane("float64")
X = torch.linspace(-2, 2, 3 * 5 * 8, dtype=LANE.dtype).sin().view(3, 5, 8)


class Layer(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8, eps=eps), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))


class Model(nn.Module):
    def __init__(self, *eps: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(one) for one in eps])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def explained(*eps: float) -> Explanation:
    with held_equal(LANE):
        upstream, port = (Model(*some).to(LANE.dtype).eval() for some in ([1e-6] * len(eps), eps))
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        runs = (lambda model=model: {"y": model(X.clone())} for model in (upstream, port))
        return explain_modules(upstream, port, *runs)


def heads(explanation: Explanation) -> list[str]:
    """The first line of each fault that is shown."""
    return [line.split()[1] for line in plain(explanation).splitlines() if re.match(r"\d+\. ", line)]


def test_one_mistake_in_every_layer_is_told_once() -> None:
    explanation = explained(1e-2, 1e-2, 1e-2)
    assert heads(explanation) == ["Model.layers.{0,1,2}.norm"]
    assert "3 faults of 1 kind" in plain(explanation)


def test_another_number_in_one_layer_is_told_by_itself() -> None:
    assert heads(explained(1e-2, 1e-6, 1e-2)) == ["Model.layers.{0,2}.norm"]


def test_data_keeps_each_fault_and_groups_them_again_when_read() -> None:
    told = tell(explained(1e-2, 1e-2, 1e-2), LANE.name, Depth())
    assert [fault["port"] for fault in told.to_json()["faults"]] == [f"layers.{i}.norm" for i in range(3)]
    assert [group.where for group in Told.from_json(told.to_json()).kinds] == ["layers.{0,1,2}.norm"]


def look(fault: tuple[str, str]) -> Look:
    return Look(fault[0], fault[1], None)


@pytest.mark.parametrize(
    ("first", "second", "groups"),
    [
        (("a.0", "`eps` is 1e-6, not 1e-5"), ("a.1", "`eps` is 1e-6, not 1e-5"), 1),
        (("a.0", "`eps` is 1e-6, not 1e-5"), ("a.1", "`eps` is 1e-6, not 1e-4"), 2),
        (("a.0", "without `relu(float32[2, 8])`"), ("a.1", "without `relu(float32[2, 4])`"), 1),
        (("a.0", "what `a.0.gate` returns"), ("a.1", "what `a.1.gate` returns"), 1),
        (("a.0", "it is `[1, 2]`"), ("a.1", "it is `[1, 3]`"), 2),
        (("a.0", "the same"), ("b.0", "the same"), 2),
    ],
)
def test_faults_are_alike_where_paths_and_shapes_alone_differ(
    first: tuple[str, str], second: tuple[str, str], groups: int
) -> None:
    assert len(alike([first, second], look)) == groups


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        (["norm"], "norm"),
        ([""], ""),
        (["a.0.b.1", "a.0.b.2", "a.3.b.1", "a.3.b.2"], "a.{0,3}.b.{1,2}"),
        (["a.0.b.1", "a.3.b.2"], "a.0.b.1, a.3.b.2"),
        (["a.0.b.0", "a.1.b.0", "a.1.b.1"], "a.0.b.0, a.1.b.{0,1}"),
    ],
)
def test_paths_are_told_in_one_where_they_have_all_combinations(paths: Sequence[str], told: str) -> None:
    assert in_one(paths) == told
