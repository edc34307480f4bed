"""What several findings ask for is recorded together, and is what each of them would record alone."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refiners.parity.explain import explain_modules
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.reasons import session as module
from refiners.parity.weights import fill_informative

LAYERS = 6


class Network(nn.Module):
    """Layers whose activation no leaf returns."""

    slope = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(LAYERS))
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.sigmoid(layer(x)) * self.slope
        return self.last(x)


class Slow(Network):
    """One mistake in every layer."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * 0.75
        return self.last(x)


def test_a_mistake_in_every_layer_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[nn.Module] = []
    record = module.record

    def counted(model: nn.Module, *given: Any, **options: Any) -> tuple[Any, Mapping[str, Tensor]]:
        recorded.append(model)
        return record(model, *given, **options)

    monkeypatch.setattr(module, "record", counted)
    lane = Lane("float64")
    with held_equal(lane):
        upstream, port = Network().to(lane.dtype).eval(), Slow().to(lane.dtype).eval()
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        x = torch.linspace(-2, 2, 24, dtype=lane.dtype).sin().view(3, 8)
        found = explain_modules(upstream, port, lambda: {"y": upstream(x)}, lambda: {"y": port(x)})
    places = [one for fault in found.faults for one in (fault.finding, *fault.finding.others)]
    assert len(places) == LAYERS
    assert recorded.count(upstream) == recorded.count(port) == 1
