"""Where many nodes differ by rounding alone, hypotheses are tried on the first few only; what is more is told still."""

import pytest
import torch
from torch import Tensor, nn

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.reasons import diagnose
from refiners.parity.reasons.causes import ONLY_ROUNDING
from refiners.parity.weights import fill_informative

LANE = Lane("float32")
X = torch.linspace(-2, 2, 3 * 5 * 32).sin().view(3, 5, 32)
LAYERS = diagnose.MOST_ROUNDED + 3


class Layer(nn.Module):
    """A gate between two products."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y * y.sigmoid() / 3)


class OtherOrder(Layer):
    """The same, in another order of operations."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y * (y.sigmoid() / 3))


class OtherGate(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y * (y.tanh() / 3))


def explained(*layers: type[Layer]) -> Explanation:
    with held_equal(LANE):
        upstream = nn.Sequential(*(Layer() for _ in layers)).eval()
        port = nn.Sequential(*(layer() for layer in layers)).eval()
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        runs = (lambda model=model: {"y": model(X.clone())} for model in (upstream, port))
        return explain_modules(upstream, port, *runs)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths at which hypotheses were tried."""
    paths: list[str] = []
    search = diagnose.by_hypothesis

    def counted(finding: diagnose.Finding, session: diagnose.Session) -> object:
        paths.append(finding.port)
        return search(finding, session)

    monkeypatch.setattr(diagnose, "by_hypothesis", counted)
    return paths


def test_hypotheses_are_tried_on_the_first_few_that_differ_by_rounding(searched: list[str]) -> None:
    faults = explained(*[OtherOrder] * LAYERS).faults
    assert [fault.diagnosis for fault in faults] == [ONLY_ROUNDING] * LAYERS
    assert searched == [str(place) for place in range(diagnose.MOST_ROUNDED)]


def test_a_fault_behind_many_that_differ_by_rounding_is_told(searched: list[str]) -> None:
    (fault,) = explained(*[OtherOrder] * LAYERS, OtherGate).faults
    assert fault.finding.port == searched[-1] == str(LAYERS)
    assert "sigmoid" in fault.diagnosis


class Thirds(Layer):
    """Upstream of the next one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * (1 / 3))


class Divided(Layer):
    """The same but for its bits."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) / 3)


class Halved(Layer):
    """Another number."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) / 2)


@pytest.mark.parametrize(("port", "is_of_bits"), [(Divided, True), (Halved, False)])
def test_what_only_gives_upstreams_bits_is_told_to_be_that(port: type[Layer], is_of_bits: bool) -> None:
    with held_equal(LANE):
        upstream, other = Thirds().eval(), port().eval()
        fill_informative(upstream, 0)
        other.load_state_dict(upstream.state_dict(), assign=True)
        runs = (lambda model=model: {"y": model(X.clone())} for model in (upstream, other))
        (fault,) = explain_modules(upstream, other, *runs).faults
    assert fault.was_run
    assert fault.diagnosis.endswith(diagnose.OF_BITS) is is_of_bits
