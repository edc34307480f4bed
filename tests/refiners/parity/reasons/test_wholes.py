"""Modules that compute outside of their leaves are taught as a whole, where both sides hold the same weights there."""

import torch
from torch import Tensor, nn

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.leaf_again import leaf_of_modules
from refiners.parity.reasons.wholes import wholes
from refiners.parity.weights import fill_informative


class Styled(nn.Module):
    """Weights that are scaled for each row, by what a leaf makes of a style."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.weight, self.bias = nn.Linear(4, 8), nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        weight = self.weight * self.look(style)[:, None]
        return torch.sin(torch.einsum("boi,bi->bo", weight, x) + self.bias)


class Scaled(Styled):
    """What is multiplied is scaled in place of the weights."""

    is_late = False

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = (x * self.look(style)) @ self.weight.T
        return torch.sin(x) + self.bias if self.is_late else torch.sin(x + self.bias)


class Late(Scaled):
    """The bias is added too late."""

    is_late = True


class Open(Scaled):
    """The sine belongs to the network, which computes it before the next layer."""

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return (x * self.look(style)) @ self.weight.T + self.bias


class Twice(Open):
    """The same with a mistake."""

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return super().forward(x, style) + self.bias


class Network(nn.Module):
    """Three layers, between which no leaf stands."""

    def __init__(self, *kinds: type[Styled]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for kind in kinds)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, style)
            x = x.sin() if isinstance(layer, Open) else x
        return x


RIGHT = Styled, Styled, Styled


def sides(*kinds: type[Styled]) -> tuple[Network, Network]:
    upstream, port = Network(*RIGHT).double().eval(), Network(*kinds).double().eval()
    fill_informative(upstream, 0)
    port.load_state_dict(upstream.state_dict(), assign=True)
    return upstream, port


def explained(*kinds: type[Styled]) -> Explanation:
    lane = Lane("float64")
    with held_equal(lane):
        upstream, port = sides(*kinds)
        x, style = (torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (8, 4))
        runs = (lambda: {"x": upstream(x, style)}), (lambda: {"x": port(x, style)})
        assert "call 1" in leaf_of_modules(upstream, port, *runs, "layers.1")
        return explain_modules(upstream, port, *runs, by_closeness=True)


def test_each_layer_that_is_wrong_is_told_and_no_other() -> None:
    assert explained(Late, Scaled, Late).leaves == ["layers.0", "layers.2"]


def test_a_fault_in_a_layer_that_others_follow_has_its_reason() -> None:
    (fault,) = explained(Late, Scaled, Scaled).faults
    assert "`sin`" in fault.diagnosis
    assert "behind `add`" in fault.diagnosis


def test_layers_that_are_written_otherwise_are_not_told() -> None:
    assert not explained(Scaled, Scaled, Scaled).faults


def test_layers_that_end_elsewhere_than_upstreams_are_not_told() -> None:
    assert not explained(Open, Open, Open).faults
    assert len(explained(Open, Twice, Open).faults) == 1


def test_modules_are_paired_by_all_of_their_weights() -> None:
    looks = {f"layers.{i}.look": f"layers.{i}.look" for i in range(3)}
    assert wholes(*sides(*RIGHT), looks) == {f"layers.{i}": f"layers.{i}" for i in range(3)}


def test_a_module_with_a_half_of_a_weight_does_not_hold_the_whole() -> None:
    wide = nn.Linear(4, 6, bias=False)
    upstream = nn.ModuleDict({"wide": wide})
    port = nn.ModuleDict({"gate": nn.Linear(4, 3, bias=False), "up": nn.Linear(4, 3, bias=False)})
    gate, up = wide.weight.detach().chunk(2)
    port.load_state_dict({"gate.weight": gate, "up.weight": up}, assign=True)
    assert wholes(upstream, port, {}) == {}
    assert wholes(upstream, upstream, {}) == {"wide": "wide"}
