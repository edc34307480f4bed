"""A port that holds the moments of a video in another order than upstream, and does its paddings by itself."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.reasons.axes import Orders, orders
from refiners.parity.reasons.layout import padded
from refiners.parity.weights import fill_informative
from tests.refiners.parity.toys import explained_pair

LANE = Lane("float64")
VIDEO = torch.linspace(-2, 2, 2 * 6 * 5 * 4 * 3, dtype=LANE.dtype).sin().view(2, 6, 5, 4, 3)


class Causal(nn.Conv3d):
    """Repeats the first frame before itself."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.cat([input[:, :, :1]] * 2 + [input], dim=2))


class Upstream(nn.Module):
    """A convolution over the past, then what happens between two convolutions of 1x1 for each place by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.past = Causal(6, 8, (3, 1, 1))
        self.before, self.behind = nn.Conv3d(8, 8, 1), nn.Conv3d(8, 8, 1)
        self.last = Causal(8, 6, (3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.past(x)
        y = self.before(x).permute(0, 3, 4, 2, 1).flatten(0, 2)
        y = (y @ y.mT / 8**0.5).softmax(-1) @ y
        return self.last(x + self.behind(y.view(2, 4, 3, 5, 8).permute(0, 4, 3, 1, 2)))


class Port(nn.Module):
    """The same with linear layers on rows of moments, and the paddings outside."""

    root, kind = 8**0.5, "replicate"

    def __init__(self) -> None:
        super().__init__()
        self.past, self.last = nn.Conv3d(6, 8, (3, 1, 1)), nn.Conv3d(8, 6, (3, 1, 1))
        self.before, self.behind = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.past(F.pad(x, (0, 0, 0, 0, 2, 0), mode=self.kind))
        y = self.before(x.permute(0, 3, 4, 2, 1).flatten(0, 2))
        y = self.behind((y @ y.mT / self.root).softmax(-1) @ y)
        x = x + y.view(2, 4, 3, 5, 8).permute(0, 4, 3, 1, 2)
        return self.last(F.pad(x, (0, 0, 0, 0, 2, 0), mode="replicate"))


def explained(**faults: object) -> Explanation:
    with held_equal(LANE):
        upstream, port = Upstream().to(LANE.dtype).eval(), Port().to(LANE.dtype).eval()
        fill_informative(upstream, 0)
        held = upstream.state_dict()
        port.load_state_dict(
            {key: held[key].reshape_as(value) for key, value in port.state_dict().items()}, assign=True
        )
        for name, value in faults.items():
            setattr(port, name, value)
        runs = (lambda model=model: {"y": model(VIDEO.clone())} for model in (upstream, port))
        return explain_modules(upstream, port, *runs, by_closeness=True)


def test_a_port_with_rows_in_another_order_is_not_blamed() -> None:
    assert not explained().faults


def test_a_fault_between_rows_in_another_order_is_named_alone() -> None:
    (fault,) = explained(root=4.0).faults
    assert "2.828" in fault.diagnosis
    assert "4.0" in fault.diagnosis


@pytest.mark.parametrize("kind", ["constant", "reflect"])
def test_a_padding_of_another_kind_is_named_alone(kind: str) -> None:
    (fault,) = explained(kind=kind).faults
    assert "repeats the edge" in fault.diagnosis


class Moments(nn.Module):
    """Attention between the moments of each place, in a batch of all frames of all videos."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.attended(x))

    def attended(self, x: Tensor) -> Tensor:
        y = x.view(2, 5, 6, 8).transpose(1, 2).reshape(12, 5, 8)
        y = self.o(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return y.view(2, 6, 5, 8).transpose(1, 2).reshape(x.shape)


class ProjectedBefore(Moments):
    """The same, with the projections in front of the moves."""

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(2, 5, 6, 8).transpose(1, 2).reshape(12, 5, 8) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).view(2, 6, 5, 8).transpose(1, 2)
        return self.o(y.reshape(x.shape))


class Sharper(ProjectedBefore):
    """With another scale."""

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(2, 5, 6, 8).transpose(1, 2).reshape(12, 5, 8) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5).view(2, 6, 5, 8).transpose(1, 2)
        return self.o(y.reshape(x.shape))


class Places(Moments):
    """Attention between the places of each moment."""

    def attended(self, x: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Joined(Moments):
    """A mean over the moments of each place."""

    def attended(self, x: Tensor) -> Tensor:
        mean = self.cut(x).mean(2, keepdim=True).permute(0, 2, 3, 1)
        return self.o(mean.expand(2, 5, 6, 8).reshape(x.shape))

    def cut(self, x: Tensor) -> Tensor:
        return x.view(2, 5, 6, 8).permute(0, 3, 1, 2)


class FramesFirst(Joined):
    """The axis of all frames of all videos is taken for that of all videos of all frames."""

    def cut(self, x: Tensor) -> Tensor:
        return x.view(5, 2, 6, 8).permute(1, 3, 0, 2)


FRAMES = torch.linspace(-2, 2, 10 * 6 * 8, dtype=LANE.dtype).sin().view(10, 6, 8)
MOMENTS = {key: key for key in Moments().state_dict()}


def test_projections_in_front_of_the_moves_are_right() -> None:
    assert not explained_pair(Moments(), ProjectedBefore(), MOMENTS, [FRAMES]).faults


def test_a_scale_behind_projections_in_front_of_the_moves_is_told() -> None:
    (fault,) = explained_pair(Moments(), Sharper(), MOMENTS, [FRAMES]).faults
    assert "scale of attention" in fault.diagnosis


def test_attention_along_the_wrong_axis_is_told_once() -> None:
    (fault,) = explained_pair(Moments(), Places(), MOMENTS, [FRAMES]).faults
    assert fault.finding.point.port == "o"


def test_an_axis_that_is_cut_in_the_other_order_is_named() -> None:
    (fault,) = explained_pair(Joined(), FramesFirst(), MOMENTS, [FRAMES]).faults
    assert "the shape is [2, 5, 6, 8], not [5, 2, 6, 8]" in fault.diagnosis


def test_an_order_is_seen_through_a_fault() -> None:
    whole = torch.randn(2, 8, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    rows = whole.permute(0, 3, 4, 2, 1).reshape(24, 5, 8)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    seen = Orders()
    seen.look(rows + noise, whole, rows.reshape(whole.shape))
    found = seen.known(rows, whole.shape)
    back = seen.known(whole, rows.shape)
    assert found is not None
    assert back is not None
    assert torch.equal(found, whole)
    assert torch.equal(back, rows)


def test_what_has_nothing_in_common_has_no_order() -> None:
    whole = torch.randn(2, 8, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(24, 5, 8, generator=torch.Generator().manual_seed(1))
    seen = Orders()
    seen.look(rows, whole, rows.reshape(whole.shape))
    assert seen.known(rows, whole.shape) is None


@pytest.mark.parametrize(("own", "other"), [((24, 5, 8), (2, 8, 5, 4, 3)), ((24, 5, 8), (10, 12, 8))])
def test_orders_lead_back(own: tuple[int, ...], other: tuple[int, ...]) -> None:
    x = torch.arange(960).view(own)
    found = list(orders(own, other))
    assert found
    assert all(torch.equal(order.back().of(order.of(x, other), own), x) for order in found)


@pytest.mark.parametrize("kind", ["constant", "replicate", "reflect", "circular"])
def test_paddings_are_those_of_torch(kind: str) -> None:
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(padded(x, (1, 2, 2, 1), kind), F.pad(x, (1, 2, 2, 1), mode=kind))
